"""Blocks: which rank holds and owns which block of a ZeroOptimizer's state, from world to world.

::

    enter(world)   all tell what they hold; owners follow from it (`promotion.settle`): stand-ins of
                   those who are gone own their blocks now, and nothing is read
    before, after  around the optimizer's step: it updates the blocks held here, then the owners hand
                   their rows round, each with word of what it holds
    copies         beside training, after the first step of a world: a stand-in for every block

A rank may die while rows are handed round. Whoever did not get them all still has its own and those
it stands in for, of the new step; it enters the next world there and then, inside the optimizer's step,
where they are handed round once more. So no script sees parameters of two steps.
"""

import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ftkit.checkpoint.cut_walk import Piece
from ftkit.core.errors import GenerationAborted
from ftkit.core.ids import NodeId, Seat, Step
from ftkit.core.world import World
from ftkit.recovery.promotion import copies, fresh, layouts, settle
from ftkit.recovery.row_blocks import block_count
from ftkit.recovery.virtual_blocks import Placement
from ftkit.session.block_copies import BlockCopies
from ftkit.session.parts import Parts
from ftkit.session.snapshots import Snapshots
from ftkit.session.zero import ZeroOptimizer

#: Between two looks whether a world whose collective broke is known to be over.
LOOK_S = 0.005

#: Rows lie in messages at multiples of this, for any dtype.
ALIGN = 16


@dataclass(slots=True, kw_only=True)
class _Taken:
    """Blocks that came to this rank by the loss of others, told of after the next step."""

    blocks: int
    state_bytes: int
    again_bytes: int
    """Rows handed round once more."""
    read_before: int
    seconds: float


class _Message(NamedTuple):
    """What a rank hands to all."""

    memory: torch.Tensor
    """Which blocks it holds, as bits, then the rows that it owns."""
    rows: list[tuple[Piece, torch.Tensor]]
    """Each piece that it owns, with the place of its rows."""


class Blocks:
    """Of one rank; the training thread's."""

    def __init__(self, optimizer: ZeroOptimizer, parts: Parts, snapshots: Snapshots) -> None:
        """Cut the optimizer's state for this job. It has none yet."""
        self._optimizer, self._parts, self._snapshots = optimizer, parts, snapshots
        optimizer.cut(block_count(parts.env.seats if parts.env else 1))
        optimizer.session = self
        self._copies = BlockCopies(optimizer, snapshots)
        self._pieces: dict[int, list[Piece]] = {b: [] for b in range(optimizer.blocks)}
        for piece in optimizer.pieces:
            self._pieces[piece.block].append(piece)
        self._placement: Placement = settle({parts.seat: optimizer.held}, optimizer.blocks)
        self._told: dict[Seat, frozenset[int]] = {}
        self._heads: list[bytes] = []
        """What the members of this world hold, in order, as they tell it."""
        self._nodes: dict[Seat, NodeId] = {}
        self._messages: dict[Seat, _Message] = {}
        self._taken: _Taken | None = None
        self._planned = False
        """Whether the copies of the present placement are under way."""
        self._bare_since: float | None = None
        """When this world began, where a block has no stand-in."""
        self.torn = False
        """Whether rows of the last step are still to come: parameters here are of two steps."""
        self.complete: Callable[[], None] = _alone
        """Enters the next world in the middle of a step."""

    @property
    def layouts(self) -> int:
        """How many different parts of the state the ranks of this world capture."""
        return layouts(self._placement, self._told)

    @property
    def trained(self) -> bool:
        """Whether the optimizer has stepped in this process."""
        return self._optimizer.stepped

    def enter(self, world: World, step: Step | None) -> None:
        """Settle with all members of `world` who owns what. Blocks; all call it.

        Args:
          world: entered just now.
          step: whose state this rank holds; None (or 0) for none. Where nobody holds any, the
            blocks are dealt anew, without state.

        Raises:
          BlocksLost: the holders of some block are gone. Nothing was changed.
          GenerationAborted: the world ended meanwhile.
        """
        began, optimizer, seat = time.monotonic(), self._optimizer, self._parts.seat
        read_before = self._read
        self._copies.want({}, world, step or Step(0))
        mine = {
            "seat": seat,
            "held": f"{_bits(optimizer.held):x}" if step else "",
            "owned": f"{_bits(optimizer.owned):x}" if step else "0",
            "torn": self.torn and bool(step),
        }
        told = self._parts.group.exchange(json.dumps(mine).encode()).wait()
        said = [json.loads(one) for one in told]
        held = {Seat(int(one["seat"])): _blocks(int(one["held"] or "0", 16)) for one in said}
        nodes = {member.seat: member.node for member in world.members}
        if not any(one["held"] for one in said):
            held = fresh(list(held), optimizer.blocks, nodes)
        # Where two say so, as one heard of a change that the other did not, the first.
        owners = {
            block: Seat(int(one["seat"]))
            for one in reversed(said)
            for block in _blocks(int(one["owned"], 16))
        }
        placement = settle(held, optimizer.blocks, nodes, before=owners)
        self._nodes = nodes
        if not step:
            optimizer.inner.state.clear()
            optimizer.hold(held[seat])
            self.torn = False
        before = optimizer.owned if step else frozenset()
        self._follow(placement, held)
        again = 0
        if any(one["torn"] for one in said):
            moved = self._hand_round()
            if moved is None:
                raise GenerationAborted("the world ended while rows were handed round once more")
            again = moved
        taken = optimizer.owned - before
        if step and taken:
            self._taken = _Taken(
                blocks=len(taken),
                state_bytes=optimizer.state_bytes(taken),
                again_bytes=again,
                read_before=read_before,
                seconds=time.monotonic() - began,
            )
        self._bare_since = began if None in placement.replica.values() else None

    def before(self) -> None:
        """(optimizer) It is about to take the gradients."""
        self._copies.keep(self._step)

    def after(self) -> None:
        """(optimizer) The blocks held here are a step further: hand rows round. Blocks.

        When the world ends meanwhile, returns in the next one.

        Raises:
          StepRolledBack: the next one begins from a snapshot.
        """
        world, step = self._parts.group.world, self._step
        if self._hand_round() is None:
            self._complete()
            return
        if self._taken is not None:
            self._tell_taken(self._taken, world, step)
            self._taken = None
        self._copies.take(step)
        if not self._planned:
            self._planned = True
            wanted = {
                c.block: c.source
                for c in copies(self._placement, list(self._nodes), self._nodes)
                if c.target == self._parts.seat and c.block not in self._optimizer.held
            }
            self._copies.want(wanted, world, step)

    def _complete(self) -> None:
        """Get the rows that are missing, in the next world."""
        while True:
            self.complete()
            if not self.torn:
                return
            # The news reached this thread before it reached membership.
            self._parts.membership.wait_changed(LOOK_S)

    def close(self) -> None:
        """End what runs beside training."""
        self._copies.close()

    @property
    def _step(self) -> Step:
        return self._parts.membership.step or Step(0)

    @property
    def _read(self) -> int:
        """Bytes of state that this process has read from others' arenas, for whatever reason."""
        return self._copies.bytes + self._snapshots.moved

    def _follow(self, placement: Placement, told: dict[Seat, frozenset[int]]) -> None:
        """This is the placement from here on, by what the ranks have told."""
        optimizer, seat = self._optimizer, self._parts.seat
        self._placement, self._told, self._planned = placement, told, False
        self._heads = [_head(told[each], self._head) for each in sorted(told)]
        kept = {
            block
            for block in optimizer.held
            if seat in (placement.owner[block], placement.replica[block])
        }
        if kept != optimizer.held:
            optimizer.hold(kept)
        optimizer.owned = placement.owned(seat)
        self._messages.clear()
        self._snapshots.look_again()

    def _hand_round(self) -> int | None:
        """Give all ranks the rows that this one owns, and take theirs.

        Returns the bytes taken; None, and it is torn, where the world ended meanwhile.
        """
        group = self._parts.group
        world, rank = group.world, group.rank
        if world.size == 1:
            self.torn = False
            return 0
        messages = [self._message(member.seat) for member in world.members]
        outs = [message.memory for message in messages]
        self._write(messages[rank])
        self.torn = True
        try:
            group.all_gather(outs, outs[rank]).wait()
        except GenerationAborted:
            return None
        with torch.no_grad():
            for message in messages:
                for piece, rows in message.rows if message is not messages[rank] else ():
                    piece.rows.copy_(rows)
        self.torn = False
        heads = [out[: self._head].numpy().tobytes() for out in outs]
        if heads != self._heads:
            told = {
                member.seat: _blocks(int.from_bytes(head, "little"))
                for member, head in zip(world.members, heads, strict=True)
            }
            blocks, owners = self._optimizer.blocks, self._placement.owner
            self._follow(settle(told, blocks, self._nodes, before=owners), told)
            self._tell_replicated(world)
        return sum(out.numel() for out in outs if out is not outs[rank])

    @property
    def _head(self) -> int:
        """Bytes of a message that say what its sender holds."""
        return _aligned(-(-self._optimizer.blocks // 8))

    def _message(self, seat: Seat) -> _Message:
        """Memory for what a rank hands round, as long as it owns the same."""
        if seat in self._messages:
            return self._messages[seat]
        pieces = [p for block in sorted(self._placement.owned(seat)) for p in self._pieces[block]]
        sizes = [piece.rows.numel() * piece.rows.element_size() for piece in pieces]
        memory = torch.zeros(self._head + sum(map(_aligned, sizes)), dtype=torch.uint8)
        places, at = list[torch.Tensor](), self._head
        for piece, size in zip(pieces, sizes, strict=True):
            place = memory[at : at + size].view(piece.rows.dtype).reshape(piece.box.shape)
            places.append(place)
            at += _aligned(size)
        made = self._messages[seat] = _Message(memory, list(zip(pieces, places, strict=True)))
        return made

    def _write(self, message: _Message) -> None:
        held = bytearray(_head(self._optimizer.held, self._head))
        message.memory[: self._head] = torch.frombuffer(held, dtype=torch.uint8)
        with torch.no_grad():
            for piece, place in message.rows:
                place.copy_(piece.rows)

    def _tell_taken(self, taken: _Taken, world: World, step: Step) -> None:
        self._parts.trace.event(
            "promote",
            step=step,
            generation=world.generation,
            blocks=taken.blocks,
            bytes=taken.state_bytes,
            moved=self._read - taken.read_before,
            again=taken.again_bytes,
            seconds=taken.seconds,
        )

    def _tell_replicated(self, world: World) -> None:
        bare = None in self._placement.replica.values()
        if self._bare_since is not None and not bare and world.size > 1:
            self._parts.trace.event(
                "replicated",
                step=self._step,
                generation=world.generation,
                bytes=self._copies.bytes,
                seconds=time.monotonic() - self._bare_since,
            )
            self._bare_since = None


def _alone() -> None:
    raise AssertionError("a world of one does not end")


def _head(blocks: Collection[int], nbytes: int) -> bytes:
    return _bits(blocks).to_bytes(nbytes, "little")


def _bits(blocks: Collection[int]) -> int:
    return sum(1 << block for block in blocks)


def _blocks(bits: int) -> frozenset[int]:
    return frozenset(block for block in range(bits.bit_length()) if bits >> block & 1)


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
