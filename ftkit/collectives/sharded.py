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
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import xxhash
from torch import nn

from ftkit.collectives.gradients import norm_of
from ftkit.collectives.slots import Subtree, leaf, parent, siblings
from ftkit.core.errors import StateChanged, UsageError


class Exchange(Protocol):
    """Gives every rank its rows: row r of `rows` goes to rank r, row r of `out` came from it."""

    def __call__(self, out: torch.Tensor, rows: torch.Tensor, *, last: bool) -> None:
        """Blocks. `last`: no gradient of this step comes after it. JobFault when it was cut."""


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
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}
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
        for unit in self._units:
            unit.forget()
        self.drop()

    def start_slot(self, slot: int, *, last: bool, weight: int = 1) -> None:
        """Backward of this round's slot comes next; its gradients count `weight` times in the sum."""
        self._slot, self._last, self._called, self._weight = slot, last, 0, weight

    def end_slot(self) -> None:
        """Backward of the slot is over; FSDP2 has reduced what it made."""

    def finish(self, *, held: int) -> int:
        """Check that all slots of all ranks are in `.grad`.

        Returns:
          A 64-bit digest of the reduced shards, equal on ranks that hold the same ones.

        Raises:
          UsageError: a slot was left out, or a parameter took part in some slots only.
        """
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

    def scratch(self, use: str, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Memory that the next unit uses again."""
        key = use, like.dtype
        kept = self._scratch.get(key)
        if kept is None or kept.numel() < numel or kept.device != like.device:
            kept = self._scratch[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return kept[:numel]

    def weigh(self, unit: "_Unit", gradient: torch.Tensor) -> None:
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

    def gather_rows(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """(unit) Move one unit's rows of this round."""
        self._called += 1
        last = self._last and self._called == len(self._units)
        self._exchange(out, rows, last=last)

    def _take_over(self, module: Any, own: list[torch.Tensor]) -> "_Unit":
        unit = _Unit(self, own, slots=self._slots, world_size=self._size, rank=self._rank)
        try:
            # Ours divides by the slots; an all-reduce of replicas adds, it does not average.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_reduce_scatter(unit)
            if self._size == 1:  # alone, FSDP2 has nothing to reduce and calls nobody but this
                module.set_all_reduce_hook(unit.reduce_alone)
        except ValueError as error:
            raise UsageError(f"this sharding is not supported: {error}") from error
        return unit


class _Unit:
    """The reduction of one unit, in the shape of FSDP2's ReduceScatter."""

    def __init__(
        self,
        owner: ShardedReducer,
        params: Sequence[torch.Tensor],
        *,
        slots: int,
        world_size: int,
        rank: int,
    ) -> None:
        self._owner = owner
        self.params = params
        self.norms: list[torch.Tensor] = []
        """Of what this rank adds, slot by slot."""
        self._slots, self._size, self._rank = slots, world_size, rank
        self._stack: list[_Sum] = []
        self._spare: list[torch.Tensor] = []
        self.seen = 0
        """Slots pushed in this attempt."""

    def forget(self) -> None:
        """Begin a step anew."""
        self._free(self._stack)
        self._stack.clear()
        self.norms.clear()
        self.seen = 0

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """(FSDP2) Memory for one call's input or output."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: Any,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """(FSDP2) A micro-batch's flat gradient of the unit, row s for the owner of part s."""
        self._owner.weigh(self, input_tensor)
        replicas = self._size // group.size()
        part = -(-output_tensor.numel() // replicas)
        rows = input_tensor if replicas == 1 else self._cut(input_tensor, group.size(), part)
        came = self._owner.scratch("came", self._size * part, rows)
        self._owner.gather_rows(came, rows)
        total = self._push(came.view(self._size, part))
        if replicas == 1:
            _finish(total, output_tensor, self._owner.scale)
            return
        output_tensor.zero_()
        if total is not None:
            mine = output_tensor[self._rank // group.size() * part :][:part]
            _finish(total[: mine.numel()], mine, self._owner.scale)

    def reduce_alone(self, gradient: torch.Tensor) -> None:
        """(FSDP2) As the call, in a world of one, in place."""
        self._owner.weigh(self, gradient)
        total = self._push(
            self._owner.scratch("came", gradient.numel(), gradient).copy_(gradient)[None]
        )
        _finish(total, gradient, self._owner.scale)

    def _cut(self, flat: torch.Tensor, shards: int, part: int) -> torch.Tensor:
        """Rows by rank: replica i of shard s is to have cut i of part s."""
        replicas = self._size // shards
        rows = self._owner.scratch("rows", self._size * part, flat).view(replicas, shards, part)
        parts = flat.view(shards, -1)
        for i in range(replicas):
            piece = parts[:, i * part : (i + 1) * part]
            rows[i, :, : piece.shape[1]] = piece
            rows[i, :, piece.shape[1] :] = 0
        return rows.reshape(-1)

    def _push(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Sum a round's rows into the tree; the sum of all slots once they are all in.

        The rows are changed; afterwards they belong to whoever gave them, except that the sum,
        when there is one, may lie in them.
        """
        if self._stack and self._stack[0].value.numel() != rows.shape[1]:
            raise UsageError(
                f"a sharded unit had {self._stack[0].value.numel()} gradients in one slot and "
                f"{rows.shape[1]} in another: use every parameter of the model in every batch"
            )
        for row in rows[: self._slots - self.seen]:
            top = _Sum(leaf(self.seen, self._slots), row, False)
            self.seen += 1
            while self._stack and siblings(self._stack[-1].node, top.node):
                left = self._stack.pop()
                left.value.add_(top.value)
                self._free([top])
                top = _Sum(parent(left.node, self._slots), left.value, left.own)
            self._stack.append(top)
        if self.seen == self._slots:
            (total,) = self._stack
            return total.value
        for at, top in enumerate(self._stack):
            if not top.own:
                mine = self._spare.pop() if self._spare else torch.empty_like(top.value)
                self._stack[at] = _Sum(top.node, mine.copy_(top.value), True)
        return None

    def _free(self, sums: Iterable["_Sum"]) -> None:
        self._spare += [s.value for s in sums if s.own]


class _Sum(NamedTuple):
    """The value of a node of the tree."""

    node: Subtree
    value: torch.Tensor
    own: bool
    """Whether it lies in memory of the unit, rather than in this round's rows."""


def _finish(total: torch.Tensor | None, out: torch.Tensor, scale: float) -> None:
    if total is None:
        out.zero_()
    else:
        # Whether zeros were added to it must not show: -0.0 becomes 0.0.
        torch.mul(total, scale, out=out).add_(0.0)


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
