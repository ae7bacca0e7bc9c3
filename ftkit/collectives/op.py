"""Op: one operation, written as a generator that yields the transfers it waits for.

A program is a function `(op) -> Generator[Wait, None, T]`. It runs on the communication
thread, asks for transfers with `send`, `recv` and `offered`, and yields a ticket, several
tickets, or None ("let others run, then go on"). What it returns becomes the handle's value.
"""

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ftkit.collectives.arithmetic import Bytes
from ftkit.collectives.config import SENT_PIECE_BYTES
from ftkit.collectives.frames import Offer
from ftkit.collectives.handle import Handle
from ftkit.collectives.keys import Key
from ftkit.collectives.link import Ticket
from ftkit.core.ids import Generation, MemberId

if TYPE_CHECKING:
    from ftkit.collectives.channel import Channel
    from ftkit.collectives.engine import Engine

Wait: TypeAlias = Ticket | Iterable[Ticket] | None
Program: TypeAlias = Callable[["Op"], Generator[Wait, None, Any]]


class Op:
    """One operation in flight. Everything but the constructor is the communication thread's."""

    __slots__ = (
        "channel",
        "deadline_s",
        "ended",
        "engine",
        "flags",
        "generation",
        "generator",
        "handle",
        "members",
        "name",
        "program",
        "rank",
        "recorded",
        "seq",
        "since_s",
        "tag",
        "waiting",
    )

    def __init__(
        self,
        engine: "Engine",
        channel: "Channel",
        name: str,
        program: Program,
        *,
        generation: Generation,
        members: tuple[MemberId, ...],
        rank: int,
        seq: int,
        flags: int,
        tag: int,
        deadline_s: float | None,
        recorded: int,
    ) -> None:
        self.engine = engine
        self.channel = channel
        self.name = name
        self.program = program
        self.generation = generation
        self.members = members
        self.rank = rank
        self.seq = seq
        self.flags = flags
        self.tag = tag
        self.deadline_s = deadline_s
        self.recorded = recorded
        """The group that the recorder knows it by: with `seq` it is one operation's alone."""
        self.since_s = time.monotonic()
        self.handle: Handle[Any] = Handle()
        self.generator: Generator[Wait, None, Any] | None = None
        self.waiting = 0
        self.ended = False

    @property
    def size(self) -> int:
        return len(self.members)

    @property
    def segment(self) -> int:
        """Bytes of a frame."""
        return self.engine.config.segment_bytes

    @property
    def piece(self) -> int:
        """Bytes of a piece of a flow."""
        most = self.engine.config.piece_bytes
        return most if self.engine.on_one_host else min(most, SENT_PIECE_BYTES)

    def others(self) -> list[int]:
        """The other ranks, beginning with the one after us, so that not all talk to rank 0."""
        return [(self.rank + i) % self.size for i in range(1, self.size)]

    @property
    def neighbours(self) -> tuple[int, int]:
        """The ranks before and after us in the channel's ring."""
        ring = self.channel.ring
        place = ring.index(self.rank)
        return ring[place - 1], ring[(place + 1) % self.size]

    def key(self, rank: int, tag: int, part: int) -> Key:
        return Key(
            self.generation, self.members[rank], self.channel.id, self.seq, tag, part, self.flags
        )

    def pulls(self, source: int, nbytes: int) -> bool:
        """Whether a message of `nbytes` from `source` comes as an offer that we fetch."""
        return self.engine.transfers.memory.can_read(self.members[source], nbytes)

    def pushes(self, target: int, nbytes: int) -> bool:
        """Whether a message of `nbytes` to `target` goes through the socket."""
        return not self.engine.transfers.offers.wanted(self.members[target], nbytes)

    def send(self, target: int, data: Bytes, *, tag: int = 0, part: int = 0) -> Ticket:
        """Send `data`; it must stay untouched until the ticket is done."""
        return self.engine.transfers.send(self.key(target, tag, part), data)

    def recv(self, source: int, into: Bytes | None, *, tag: int = 0, part: int = 0) -> Ticket:
        """Receive into `into`, or, when None, into new memory (`ticket.data`, a Bytes)."""
        return self.engine.transfers.post(self.key(source, tag, part), into, raw=False)

    def lend(
        self,
        targets: Sequence[int],
        data: Bytes,
        *,
        tag: int,
        part: int,
        told: bool,
        copied: bool = False,
    ) -> tuple[list[Ticket], bool]:
        """Offer at most a piece to all `targets`; see `Offers.lend`."""
        keys = [self.key(target, tag, part) for target in targets]
        return self.engine.transfers.offers.lend(keys, data, told=told, copied=copied)

    def offered(self, source: int, *, tag: int = 0, part: int = 0) -> Ticket:
        """Wait for an offer without fetching it: `ticket.data` is an Offer."""
        return self.engine.transfers.post(self.key(source, tag, part), None, raw=True)

    def look(self, source: int, offer: Offer) -> Bytes | None:
        """What `source` offered, to be read in place; None when it must be fetched."""
        return self.engine.transfers.memory.look(self.members[source], offer)

    def fetch(self, source: int, offer: Offer, into: Bytes) -> None:
        """Read the beginning of what `source` offered."""
        self.engine.transfers.memory.fetch(self.members[source], offer, 0, into)

    def fetched(self, source: int, offer: Offer, *, tag: int, part: int) -> None:
        """Make sure that what was read still held, then release the offer."""
        self.engine.transfers.memory.acknowledge(self.key(source, tag, part), offer)

    def scratch(self) -> Bytes:
        """Scratch memory for a piece or a segment; give it back with `release`."""
        return self.engine.transfers.take_scratch()

    def release(self, *buffers: Bytes) -> None:
        self.engine.transfers.give_scratch(*buffers)

    def ticket_done(self) -> None:
        """One awaited transfer is done; with the last one the program goes on."""
        self.waiting -= 1
        if self.waiting == 0:
            self.engine.runner.ready(self)


def empty(nbytes: int) -> Bytes:
    """New memory, not zeroed."""
    return np.empty(nbytes, dtype=np.uint8)
