"""ZeroOptimizer: any elementwise optimizer, its state cut over the ranks of the job (ZeRO-1).

Parameters are whole on every rank. Each block of their rows is updated by two ranks, which hold its
state: the owner, and a stand-in that does the same to the same gradients and so holds the same bits,
without a byte being sent for it. The owners then hand the updated rows to all.

ZeRO (arXiv 1910.02054, stage 1) has one owner and no stand-in; ElasWave (arXiv 2510.00606) copies
each shard to its neighbour after every step, where ours computes it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from ftkit.checkpoint.box import Box
from ftkit.checkpoint.cut_walk import Piece
from ftkit.core.errors import UsageError
from ftkit.recovery.row_blocks import row_blocks

State = Mapping[str, torch.Tensor]


class Stepped(Protocol):
    """What the session does with an optimizer's step."""

    def before(self) -> None:
        """The gradients are there, and nothing has changed."""

    def after(self) -> None:
        """The rows of the blocks held have changed; those of others are to come."""


class ZeroOptimizer(Optimizer):
    """Holds the state of some blocks of its parameters; `session.protect` says of which.

    Give it to `session.protect(model=..., optimizer=...)` with a model that every rank has whole. By
    itself, without a session, it is the optimizer it is made of. Used by the training thread.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer_class: Callable[..., Optimizer],
        **defaults: Any,
    ) -> None:
        """As `torch.distributed.optim.ZeroRedundancyOptimizer`, which cannot change its world.

        Args:
          params: parameters, or groups of them, as any optimizer takes.
          optimizer_class: of torch, or one like them; it must treat each element by itself, and keep
            its state in tensors.
          **defaults: its arguments.
        """
        self.inner = optimizer_class(params, **defaults)
        """Trains the rows that are held here."""
        groups = [dict(group) for group in self.inner.param_groups]
        self._begin: Callable[..., Optimizer] | None = None
        """Makes the optimizer anew, where it has state before its first step (Adagrad)."""
        if self.inner.state:
            self._begin = partial(optimizer_class, **defaults)
            self.inner.state.clear()
        self._built = False
        self.stepped = False
        """Whether it has changed anything yet."""
        super().__init__(groups, self.inner.defaults)
        self._built = True
        self.session: Stepped | None = None
        self._pieces: tuple[Piece, ...] = ()
        self._held: frozenset[int] = frozenset()
        self._owned: frozenset[int] = frozenset()
        self.blocks = 0
        self.cut(1)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces of all blocks, in order of the parameters."""
        return self._pieces

    @property
    def held(self) -> frozenset[int]:
        """Blocks whose state is here."""
        return self._held

    @property
    def owned(self) -> frozenset[int]:
        """Of those, the blocks whose rows this rank hands to the others, and captures."""
        return self._owned

    @owned.setter
    def owned(self, blocks: Collection[int]) -> None:
        self._owned = frozenset(blocks)
        assert self._owned <= self._held, "a block is owned where its state is"

    def cut(self, blocks: int) -> None:
        """Cut the rows of all parameters into so many blocks, and hold them all, without state.

        Raises:
          UsageError: it has stepped already.
        """
        if self.stepped:
            raise UsageError("give a ZeroOptimizer to session.protect() before its first step")
        params = [p for group in self.param_groups for p in group["params"]]
        cut = row_blocks([tuple(p.shape) for p in params], blocks)
        self._pieces = tuple(
            _piece(block, params[rows.parameter], rows.first, rows.end)
            for block, runs in enumerate(cut)
            for rows in runs
        )
        self.blocks = blocks
        self.inner.state.clear()
        self.hold(range(blocks))
        self.owned = range(blocks)

    def hold(self, blocks: Collection[int]) -> None:
        """Hold these blocks from now on: state of others is let go, that of new ones is as at first."""
        self._held = frozenset(blocks)
        self._owned &= self._held
        where = {
            id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]
        }
        mine: list[list[nn.Parameter]] = [[] for _ in self.param_groups]
        kept = set[int]()
        for piece in self._pieces:
            if piece.block in self._held:
                mine[where[id(piece.parameter)]].append(piece.rows)
                kept.add(id(piece.rows))
        for group, rows in zip(self.inner.param_groups, mine, strict=True):
            group["params"] = rows
        for gone in [p for p in self.inner.state if id(p) not in kept]:
            del self.inner.state[gone]
        if self._begin is not None:
            new = [
                {**group, "params": bare}
                for group in self.inner.param_groups
                if (bare := [p for p in group["params"] if p not in self.inner.state])
            ]
            self.inner.state.update(self._begin(new).state if new else {})

    def adopt(self, block: int, states: Iterable[State]) -> None:
        """Hold `block` too, with the state of each of its pieces, in order; it becomes ours."""
        self.hold(self._held | {block})
        pieces = [p for p in self._pieces if p.block == block]
        for piece, state in zip(pieces, states, strict=True):
            if state:
                self.inner.state[piece.rows] = dict(state)

    def state_bytes(self, blocks: Collection[int]) -> int:
        """Bytes of the state of these blocks, as far as it is here."""
        return sum(
            value.numel() * value.element_size()
            for piece in self._pieces
            if piece.block in blocks
            for value in self.inner.state.get(piece.rows, {}).values()
            if isinstance(value, torch.Tensor)
        )

    def follow(self) -> None:
        """Have `inner` use the hyperparameters that schedulers and the script have set here."""
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update({key: value for key, value in group.items() if key != "params"})

    def _look_where_parameters_are(self) -> None:
        """`model.to(...)` puts other memory behind a parameter: rows are views of what it has now."""
        for piece in self._pieces:
            if _memory(piece.rows) != _memory(piece.parameter):
                piece.rows.data = piece.parameter.detach()[piece.box.slices]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the rows held here, and take those of the others. Blocks for both.

        When a rank is lost meanwhile, the others repair the world first: afterwards the parameters
        are those of this step on all of them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow()
        self._look_where_parameters_are()
        if self.session is not None:
            self.session.before()
        held = [piece for piece in self._pieces if piece.block in self._held]
        for piece in held:
            piece.rows.grad = gradient_of(piece)
        self.stepped = True
        if held:
            self.inner.step()
        for piece in held:
            piece.rows.grad = None
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key != "params"})
        if self.session is not None:
            self.session.after()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: blocks are cut once."""
        if self._built:
            raise UsageError("a ZeroOptimizer gets all its parameters when it is made")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Refused: no rank has it all. ftkit keeps it with every step, and in checkpoints."""
        raise UsageError(
            "no rank holds the whole state of a ZeroOptimizer: give it to session.protect(), which "
            "keeps it; `ftkit ckpt` exports checkpoints"
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refused, as `state_dict`."""
        self.state_dict()


def gradient_of(piece: Piece) -> torch.Tensor | None:
    """The gradient of its rows: a view."""
    whole = piece.parameter.grad
    return None if whole is None else whole[piece.box.slices]


def _memory(tensor: torch.Tensor) -> int:
    # Rows keep what they view: as long as they do, nothing else is at this address.
    return tensor.untyped_storage().data_ptr()


def _piece(block: int, parameter: torch.Tensor, first: int, end: int) -> Piece:
    shape = tuple(parameter.shape)
    box = Box.whole(shape)
    if shape:
        box = Box((first, *(0,) * (len(shape) - 1)), (end - first, *shape[1:]))
    rows = nn.Parameter(parameter.detach()[box.slices], requires_grad=parameter.requires_grad)
    return Piece(block, parameter, box, rows)
