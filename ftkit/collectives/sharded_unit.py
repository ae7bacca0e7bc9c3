"""Unit: the reduction of one of FSDP2's sharded units, in the shape of its ReduceScatter.

See `sharded`, whose reducer owns the units, and what of theirs is on its way.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from ftkit.collectives.handle import finished
from ftkit.collectives.slots import Subtree, leaf, parent, siblings
from ftkit.collectives.work import FtkitWork
from ftkit.core.errors import UsageError

#: Exchanges under way at once. Each keeps a unit's gradient, and what comes in for it, in memory.
AHEAD = 2


class Pending(Protocol):
    """What has been started."""

    def wait(self) -> object:
        """Block until it is done. JobFault when it was cut."""


class Owner(Protocol):
    """The reducer of a unit."""

    scale: float
    unfilled: torch.Tensor | None
    """The output of the newest exchange, where FSDP2 has it before it is filled."""

    def weigh(self, unit: "Unit", gradient: torch.Tensor) -> None:
        """Look at a slot's gradient and weigh it; what a rank without a slot makes is dropped."""

    def scratch(self, use: str, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Memory that a unit uses again once this one's exchange has ended."""

    def settle(self, unit: "Unit | None" = None, *, most: int = 0) -> None:
        """Wait until so many exchanges are under way at most, and none of this unit's."""

    def gather_rows(
        self, unit: "Unit", came: torch.Tensor, rows: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Begin to move its rows of this round; `fill` follows."""

    def add_replicas(self, out: torch.Tensor, group: Any) -> None:
        """Begin to add up what replicas have of a part."""


class Unit:
    """The reduction of one unit, in the shape of FSDP2's ReduceScatter."""

    def __init__(
        self,
        owner: Owner,
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
        self._shards = world_size
        """Of the parameters; as many ranks hold each of them as is left."""
        self._stack: list[_Sum] = []
        self._spare: list[torch.Tensor] = []
        self.seen = 0
        """Slots pushed in this attempt."""
        self._replicas: Any = None
        """The group of those who hold the same part, where it is for us to add up."""

    def stand_in_for_replicas(self, module: Any) -> None:
        """Take over FSDP2's all-reduce of replicas, where it has one and this is how to get at it.

        These places are torch's own. Where they are not, FSDP2 adds replicas up itself, and each
        exchange is waited for.
        """
        state = getattr(module, "_get_fsdp_state", lambda: None)()
        for group in getattr(state, "_fsdp_param_groups", ()):
            info: Any = getattr(group, "mesh_info", None)
            real = getattr(info, "replicate_process_group", None)
            if isinstance(real, _Replicas):  # several units have one mesh
                self._replicas, real.owner = real.group, self._owner
            elif real is not None:
                info.replicate_process_group = ours = _Replicas(self._owner, real)
                if getattr(group, "_all_reduce_process_group", None) is ours:
                    self._replicas = real
                else:  # FSDP2 asks another
                    info.replicate_process_group = real

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
        self._shards = group.size()
        replicas = self._size // self._shards
        part = -(-output_tensor.numel() // replicas)
        self._owner.settle(self, most=AHEAD - 1)
        rows = input_tensor if replicas == 1 else self._cut(input_tensor, self._shards, part)
        came = self._owner.scratch("came", self._size * part, rows)
        output_tensor.zero_()
        defers = self._may_defer(output_tensor) and (replicas == 1 or self._replicas is not None)
        self._owner.unfilled = output_tensor if defers else None
        self._owner.gather_rows(self, came, rows, output_tensor)
        if not defers:
            self._owner.settle()

    def fill(self, flying: "Flying") -> None:
        """(owner) The rows are there: sum them, and fill the output once all slots are in."""
        total = self._push(flying.came.view(self._size, flying.came.numel() // self._size))
        if total is None:
            return
        replicas = self._size // self._shards
        part = total.numel()
        mine = (
            flying.out[self._rank // self._shards * part :][:part] if replicas > 1 else flying.out
        )
        _finish(total[: mine.numel()], mine, self._owner.scale)
        if replicas > 1 and flying.defers:
            self._owner.add_replicas(flying.out, self._replicas)

    def _may_defer(self, out: torch.Tensor) -> bool:
        """Whether `.grad` will be a view of the output, which nobody reads before `finish`."""
        return out.device.type == "cpu" and all(
            p.dtype == out.dtype
            and p.device == out.device
            and not getattr(p, "_post_accumulate_grad_hooks", None)
            for p in self.params
        )

    def reduce_alone(self, gradient: torch.Tensor) -> None:
        """(FSDP2) As the call, in a world of one, in place."""
        self._owner.weigh(self, gradient)
        total = self._push(
            self._owner.scratch("came", gradient.numel(), gradient).copy_(gradient)[None]
        )
        if total is None:
            gradient.zero_()
        else:
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


class Flying(NamedTuple):
    """An exchange under way, and the memory that it needs."""

    unit: Unit
    exchange: Pending
    came: torch.Tensor
    rows: torch.Tensor
    out: torch.Tensor
    defers: bool
    """Whether the backward pass goes on without it."""


class _Replicas(dist.ProcessGroup):  # type: ignore[misc,unused-ignore]
    """For FSDP2, the group over which it adds up replicas: outputs that are not filled yet are left."""

    def __init__(self, owner: Owner, group: Any) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]
        self.owner, self.group = owner, group

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        unfilled = self.owner.unfilled
        if unfilled is not None and unfilled.data_ptr() == tensors[0].data_ptr():
            return FtkitWork(finished(None), tensors, lambda reason: None)
        return self.group.allreduce(tensors, opts)


class _Sum(NamedTuple):
    """The value of a node of the tree."""

    node: Subtree
    value: torch.Tensor
    own: bool
    """Whether it lies in memory of the unit, rather than in this round's rows."""


def _finish(total: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    # Whether zeros were added to it must not show: -0.0 becomes 0.0.
    torch.mul(total, scale, out=out).add_(0.0)
