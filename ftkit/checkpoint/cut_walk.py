"""Walking an optimizer of which every rank holds the state of some rows of the parameters.

The parameters themselves are whole on every rank. What a rank captures are the rows that it answers
for, of parameters and of state, as boxes by the names that a whole optimizer would have: a snapshot of
such a job is loaded by one that holds all, or is sharded otherwise, and the other way round.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.walk import Live, OptimizerWalk, check_kind, dtype_name, state_device
from ftkit.core.errors import StateChanged, UsageError


class Piece(NamedTuple):
    """Rows of one parameter."""

    block: int
    parameter: torch.Tensor
    """The whole one."""
    box: Box
    rows: nn.Parameter
    """A view of their memory."""


@runtime_checkable
class CutOptimizer(Protocol):
    """An optimizer whose state is cut into pieces."""

    inner: Optimizer
    """Trains the rows of the pieces that are here, and has their state."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """All there are, in order, wherever their state is."""

    @property
    def held(self) -> Collection[int]:
        """Blocks whose state is here."""

    @property
    def owned(self) -> Collection[int]:
        """Of those, the blocks that this rank answers for."""


class CutWalk(OptimizerWalk):
    """One such optimizer. What is captured is what is owned, what is loaded what is held."""

    def __init__(
        self, name: str, optimizer: Any, parameter_name: Callable[[torch.Tensor], str | None]
    ) -> None:
        """Walk `optimizer`, a torch Optimizer and a `CutOptimizer`, as `name`."""
        super().__init__(name, optimizer, parameter_name)
        self.cut: CutOptimizer = optimizer
        self._goals = dict[str, list[tuple[Piece, torch.Tensor]]]()
        """Memory of a load under way, by entry."""

    @property
    def watched(self) -> Optimizer:
        return self.cut.inner

    @property
    def parameter_ids(self) -> set[int]:
        """`id` of every parameter that is cut."""
        return {id(piece.parameter) for piece in self.cut.pieces}

    def owned_rows(self, live: Live) -> Iterator[Live]:
        """The rows of a parameter that this rank captures."""
        for piece in self.cut.pieces:
            if piece.parameter is live.tensor and piece.block in self.cut.owned:
                yield Live(live.name, piece.rows, False, live.global_shape, piece.box.offsets)

    def live(self) -> Iterator[Live]:
        """The state of the rows that this rank captures."""
        told = set[str]()
        for piece in self.cut.pieces:
            if piece.block not in self.cut.owned:
                continue
            for key, value in self.cut.inner.state.get(piece.rows, {}).items():
                full = self._full(piece, key)
                if not isinstance(value, torch.Tensor):
                    raise UsageError(
                        f"{full} is a {type(value).__name__}: of an optimizer whose state is cut "
                        "only tensors can be protected"
                    )
                check_kind(full, value)
                if value.shape == piece.rows.shape and key != "step":
                    whole = tuple(piece.parameter.shape)
                    yield Live(full, value, False, whole, piece.box.offsets)
                elif value.dim():
                    raise UsageError(
                        f"{full} is {list(value.shape)} and its rows {list(piece.rows.shape)}: an "
                        "optimizer that looks at more than one element at a time cannot be cut"
                    )
                elif full not in told:  # a count, which all pieces of a parameter have alike
                    told.add(full)
                    yield Live(full, value, False, (), ())

    def room(self) -> Iterator[TensorBox]:
        """Every box that any rank may have to capture of the parameters and their state."""
        # Every piece has, or will have, the state of those here whose parameters are of its dtype.
        like = {rows.dtype: state for rows, state in self.cut.inner.state.items()}
        told = set[str]()
        for piece in self.cut.pieces:
            whole, name = tuple(piece.parameter.shape), self._name(piece)
            yield TensorBox(name, dtype_name(piece.parameter), whole, piece.box)
            for key, value in like.get(piece.rows.dtype, {}).items():
                full, dtype = self._full(piece, key), dtype_name(value)
                if value.dim() and key != "step":
                    yield TensorBox(full, dtype, whole, piece.box)
                elif full not in told:
                    told.add(full)
                    yield TensorBox(full, dtype, (), Box((), ()))

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """None that is whole."""
        return iter(())

    def prepare(
        self,
        entry: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        parameters: Mapping[str, tuple[torch.Tensor, dict[str, Any]]],
    ) -> torch.Tensor:
        """See `OptimizerWalk.prepare`. What comes back has no memory: `boxes` has."""
        key, parameter, group = self._trained(entry, parameters)
        by_row = shape == tuple(parameter.shape) and key != "step"
        if shape and not by_row:
            raise StateChanged(
                f"{entry} is {list(shape)} and its parameter {list(parameter.shape)}: it was saved "
                f"by an optimizer that {self.name} is not"
            )
        device = state_device(key, parameter, group)
        self._goals[entry] = [
            (piece, torch.empty(piece.box.shape if by_row else (), dtype=dtype, device=device))
            for piece in self.cut.pieces
            if piece.parameter is parameter and piece.block in self.cut.held
        ]
        return torch.empty(shape, dtype=dtype, device="meta")

    def boxes(self, entry: str, tensor: torch.Tensor) -> list[tuple[Box, torch.Tensor]]:
        """Where the parts of an entry go that are to be here, after `prepare`."""
        count = Box((), ())  # of which every piece has one of its own
        return [(p.box if tensor.dim() else count, goal) for p, goal in self._goals[entry]]

    def put(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Make what was read into `boxes` the state of the rows."""
        goals, self._goals = self._goals, {}
        for entry in sorted(saved):
            key = self._split(entry)[1]
            for piece, value in goals[entry]:
                self.cut.inner.state[piece.rows][key] = value

    def load(
        self,
        small: Mapping[str, Any],
        saved: Mapping[str, torch.Tensor],
        tensor: Callable[[str], torch.Tensor],
    ) -> None:
        """See `OptimizerWalk.load`."""
        self.cut.inner.state.clear()
        super().load(small, saved, tensor)

    def _name(self, piece: Piece) -> str:
        name = self._parameter_name(piece.parameter)
        if name is None:
            raise UsageError(
                f"a parameter of {self.name} (shape {tuple(piece.parameter.shape)}) belongs to no "
                "protected module: pass its module to protect() too"
            )
        return name

    def _full(self, piece: Piece, key: object) -> str:
        return self._state_name(self._name(piece), key)


def of_rows(live: Iterable[Live], walks: Sequence[CutWalk]) -> Iterator[Live]:
    """The same tensors, of parameters that are cut the rows that this rank captures."""
    ids = [walk.parameter_ids for walk in walks]
    for item in live:
        walk = next(
            (w for w, known in zip(walks, ids, strict=True) if id(item.tensor) in known), None
        )
        if walk is None:
            yield item
        else:
            yield from walk.owned_rows(item)
