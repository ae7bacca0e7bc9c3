"""ShardedReducer: FSDP2's gradients, slot by slot, summed canonically into the shards.

FSDP2 reduces a unit's gradients in the backward pass of every micro-batch, by a communication
that may be replaced. Here rank r of W plays slot j * W + r in round j, and the unit's flat
gradient goes, unsummed, to the owners of its parts: they push the W rows that come in, slot by
slot, into the one fixed tree (`slots`). An owner holds log2(slots) + 1 partial sums of its part,
never a gradient of the whole unit, and the traffic is that of FSDP2's own reduce-scatter of every
micro-batch. ::

    round 0   slots 0 1 2     rows 0 1 2 of each part -> the tree of its owner
    round 1   slots 3 4 5     rows 3 4 5
    round 2   slots 6 7 -     row 2 is of a rank that had no slot left: it is dropped

Until the last round the unit's output is zeros, then it is the sum over all slots, scaled. With
replicas (HSDP) a part is cut once more, each replica sums its cut, and FSDP2's own all-reduce of
disjoint cuts, zeros elsewhere, puts the part together.

On the CPU nobody waits in the backward pass for what was just sent: the output is filled two units
later, or at the end of the step, where an exchange that failed is noticed too. What FSDP2 makes of it
by then is a view. So it takes the all-reduce of replicas from us, and where it would not be content
with a view (another dtype, parameters elsewhere, hooks that look at gradients) we wait.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from ftkit.collectives.gradients import norm_of
from ftkit.collectives.sharded_unit import AHEAD, Flying, Pending, Unit
from ftkit.core.errors import StateChanged, UsageError


class Exchange(Protocol):
    """Gives every rank its rows: row r of `rows` goes to rank r, row r of `out` came from it."""

    def __call__(self, out: torch.Tensor, rows: torch.Tensor, *, last: bool) -> Pending:
        """Start it. `last`: no gradient of this step comes after it. JobFault as for `Pending`."""


def rounds_of(slots: int, world_size: int) -> int:
    """Micro-batches that every rank plays in a step."""
    return -(-slots // world_size)


def assign_rounds(slots: int, world_size: int, rank: int) -> list[int]:
    """The slot of `rank` in each round. From `slots` on there is none: it plays along."""
    return [j * world_size + rank for j in range(rounds_of(slots, world_size))]


def sharded_units(modules: Iterable[nn.Module]) -> list[tuple[Any, list[torch.Tensor]]]:
    """The modules that `fully_shard` was called on, with what each of them trains itself, if any."""
    from torch.distributed.fsdp import FSDPModule

    found: list[tuple[Any, list[torch.Tensor]]] = []
    for root in modules:
        units = [m for m in root.modules() if isinstance(m, FSDPModule)]
        owner = {id(p): unit for unit in units for p in unit.parameters()}  # the innermost wins
        for unit in units:
            own: list[torch.Tensor] = [
                p for p in unit.parameters() if p.requires_grad and owner[id(p)] is unit
            ]
            if own:
                found.append((unit, own))
    return found


class ShardedReducer:
    """Owns the reduction of one sharded model in one world. One thread, the training thread."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        *,
        slots: int,
        world_size: int,
        rank: int,
        exchange: Exchange,
        mean: bool = True,
        weights: int | None = None,
    ) -> None:
        """Put our reduction into every unit of the modules.

        Args:
          modules: sharded over all ranks of the world, replicated or not; every parameter that
            is trained is a shard.
          slots: slots of the global batch.
          world_size: ranks, each of which plays `rounds_of` micro-batches in a step.
          rank: this one.
          exchange: moves the rows.
          mean: whether the sum is divided by `slots`.
          weights: of all slots together, where they differ; the mean divides by it then.

        Raises:
          UsageError: a parameter is not sharded, or over other ranks than these, or a unit has
            several meshes.
        """
        self._modules = modules
        self._slots, self._size, self._rank = slots, world_size, rank
        self._exchange = exchange
        self.scale = 1.0 / (weights or slots) if mean else 1.0
        self._params = _sharded(modules, world_size)
        self._scratch: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}
        self._turn = 0
        self._flying: deque[Flying] = deque()
        self.unfilled: torch.Tensor | None = None
        """The output of the newest exchange, where FSDP2 has it before it is filled."""
        self._adding: list[Pending] = []
        """All-reduces of replicas."""
        self._slot, self._last, self._weight = 0, False, 1
        self._called = 0
        self._units = [self._take_over(*found) for found in sharded_units(modules)]
        self.look_at: Callable[[int, int, torch.Tensor], None] | None = None
        """Called with (slot, unit, its flat gradients of that slot), which may be changed."""

    @property
    def ids(self) -> set[int]:
        """`id` of every parameter that is reduced."""
        return {id(p) for p in self._params}

    @property
    def buckets(self) -> int:
        """How many exchanges the last round takes."""
        return len(self._units)

    @property
    def norms(self) -> list[float]:
        """Of what this rank adds to each unit in this step, once all are under way."""
        return [math.hypot(*(n.item() for n in unit.norms)) for unit in self._units]

    def parts_of(
        self, unit: int, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The parameters of a unit, each with the gradients of them all: they lie in shards."""
        for param in self._units[unit].params:
            yield param, values

    def drop(self) -> None:
        """Take `.grad` away from all parameters."""
        for param in self._params:
            param.grad = None

    def begin(self) -> None:
        """A new attempt: forget whatever an earlier one left, clean `.grad`."""
        if self._flying:
            # Left without waiting: what still comes in must not come into memory that is used.
            self._scratch.clear()
        self._flying.clear()
        self._adding.clear()
        for unit in self._units:
            unit.forget()
        self.drop()

    def start_slot(self, slot: int, *, last: bool, weight: int = 1) -> None:
        """Backward of this round's slot comes next; its gradients count `weight` times in the sum."""
        self._slot, self._last, self._called, self._weight = slot, last, 0, weight
        # Zeros so far. Without them FSDP2 takes the output as it is, filled or not, and adds nothing.
        self.drop()

    def end_slot(self) -> None:
        """Backward of the slot is over; FSDP2 has reduced what it made."""

    def finish(self, *, held: int) -> int:
        """Wait until all slots of all ranks are in `.grad`. Blocks.

        Returns:
          A 64-bit digest of the reduced shards, equal on ranks that hold the same ones.

        Raises:
          JobFault: an exchange was cut.
          UsageError: a slot was left out, or a parameter took part in some slots only.
        """
        self.settle()
        for adding in self._adding:
            adding.wait()
        self._adding.clear()
        if odd := [unit for unit in self._units if unit.seen not in (0, self._slots)]:
            raise UsageError(
                f"{len(odd)} of {len(self._units)} sharded units had gradients in some slots and "
                f"not in others (the first in {odd[0].seen} of {self._slots}): call backward() once "
                "a batch, and use every parameter in every batch"
            )
        digest = xxhash.xxh3_64()
        for param in self._params:
            if param.grad is not None:
                local: torch.Tensor = param.grad._local_tensor  # type: ignore[attr-defined]
                flat = local.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.intdigest()

    def end(self) -> None:
        """The step is over."""

    def close(self) -> None:
        """Give up what was kept. The model is not to be trained any more."""
        self._units.clear()
        self._scratch.clear()
        self._flying.clear()
        self._adding.clear()

    def scratch(self, use: str, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Memory that a unit uses again once this one's exchange has ended."""
        key = use, self._turn, like.dtype
        kept = self._scratch.get(key)
        if kept is None or kept.numel() < numel or kept.device != like.device:
            kept = self._scratch[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return kept[:numel]

    def weigh(self, unit: Unit, gradient: torch.Tensor) -> None:
        """(unit) Look at a slot's gradient and weigh it; what a rank without a slot makes is dropped."""
        if self._slot >= self._slots:
            return
        if not self._weight:
            gradient.zero_()
            return
        if self.look_at is not None:
            self.look_at(self._slot, self._units.index(unit), gradient)
        if self._weight != 1:
            gradient.mul_(self._weight)
        unit.norms.append(norm_of(gradient))

    def settle(self, unit: Unit | None = None, *, most: int = 0) -> None:
        """(unit) Wait until so many exchanges are under way at most, and none of this unit's."""
        while len(self._flying) > most or any(f.unit is unit for f in self._flying):
            flying = self._flying.popleft()
            flying.exchange.wait()
            flying.unit.fill(flying)

    def gather_rows(
        self, unit: Unit, came: torch.Tensor, rows: torch.Tensor, out: torch.Tensor
    ) -> None:
        """(unit) Begin to move its rows of this round; `fill` follows."""
        self._called += 1
        last = self._last and self._called == len(self._units)
        exchange = self._exchange(came, rows, last=last)
        self._flying.append(Flying(unit, exchange, came, rows, out, self.unfilled is not None))
        self._turn = (self._turn + 1) % AHEAD

    def add_replicas(self, out: torch.Tensor, group: Any) -> None:
        """(unit) Begin to add up what replicas have of a part."""
        work = dist.all_reduce(out, group=group, async_op=True)
        assert work is not None, "replicas of this rank's part"
        self._adding.append(work)

    def _take_over(self, module: Any, own: list[torch.Tensor]) -> Unit:
        unit = Unit(self, own, slots=self._slots, world_size=self._size, rank=self._rank)
        try:
            # Ours divides by the slots; an all-reduce of replicas adds, it does not average.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_reduce_scatter(unit)
            unit.stand_in_for_replicas(module)
            if self._size == 1:  # alone, FSDP2 has nothing to reduce and calls nobody but this
                module.set_all_reduce_hook(unit.reduce_alone)
        except ValueError as error:
            raise UsageError(f"this sharding is not supported: {error}") from error
        return unit


def _sharded(modules: Iterable[nn.Module], world_size: int) -> list[torch.Tensor]:
    """The parameters that are trained, each once; UsageError when one is not sharded by FSDP2."""
    from torch.distributed.tensor import DTensor

    unique: dict[int, tuple[str, torch.Tensor]] = {}
    for module in modules:
        for name, found in module.named_parameters():
            if found.requires_grad:
                unique.setdefault(id(found), (name, found))
    for name, param in unique.values():
        if not isinstance(param, DTensor):
            raise UsageError(
                f"parameter {name} is not sharded: call fully_shard on the whole model, too, so that "
                "what its blocks leave over is sharded with it"
            )
        if param.device_mesh.size() != world_size:
            raise UsageError(
                f"parameter {name} is sharded over {param.device_mesh.size()} of {world_size} ranks: "
                "give fully_shard the mesh that build() is given"
            )
        if not param.dtype.is_floating_point:
            raise StateChanged(f"cannot reduce gradients of dtype {param.dtype}")
    return [param for _, param in unique.values()]
