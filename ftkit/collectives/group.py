"""Group: one process's membership in the world, edited in place from one world to the next.

Who is a member is decided elsewhere; a group is told. It starts as generation 0, a world of
itself alone, in which every operation is local.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

from ftkit.collectives import forks
from ftkit.collectives.channel import Channel
from ftkit.collectives.cma import ValidWord
from ftkit.collectives.config import CollectivesConfig
from ftkit.collectives.engine import Engine, FaultCallback, TellCallback
from ftkit.collectives.frames import CONTROL_BYTES_MAX
from ftkit.collectives.mesh import Mesh
from ftkit.collectives.meter import Flow
from ftkit.collectives.operations import Operations
from ftkit.collectives.ports import Detour, NullRecorder, OpRecorder
from ftkit.core.errors import GenerationAborted, Unreachable, WireError
from ftkit.core.ids import Generation, MemberId, NodeId, Rank, Seat
from ftkit.core.world import Member, World

WORLD_CHANNEL = 0


@dataclass(frozen=True, slots=True)
class Traffic:
    """What passed between us and one peer, of large messages."""

    sent: Flow
    """To it, over all connections."""
    read: Flow | None
    """From its memory; None where that is not possible."""


class Group(Operations):
    """See the module. Thread-safe, except that only one thread may `edit` or `connect`."""

    def __init__(
        self,
        *,
        member: MemberId,
        secret: bytes,
        host: str = "127.0.0.1",
        config: CollectivesConfig | None = None,
        on_fault: FaultCallback,
        on_tell: TellCallback | None = None,
        recorder: OpRecorder | None = None,
        detour: Detour | None = None,
    ) -> None:
        """Listen on `host` and start the communication thread.

        Args:
          member: who we are; never reused in the life of the job.
          secret: the job's secret, at least 16 bytes.
          host: address to bind and be reached at.
          config: the same on every member.
          on_fault: called once for a generation that ends by a fault, from the communication
            thread, with the members known to be lost (may be empty) and the reason. Must
            not block. Also called for an abort of our own.
          on_tell: receives what peers `tell` us, from the communication thread.
          recorder: told of every operation.
          detour: opens our connections; None dials members where they listen.

        Raises:
          OSError: nothing can listen on `host`.
          ValueError: the secret is too short to be one.
        """
        if len(secret) < 16:
            raise ValueError(f"the secret has {len(secret)} bytes; at least 16 are needed")
        self.member = member
        self._detour = detour
        self.config = config or CollectivesConfig()
        self.meetings = 0
        """Overlapped operations begun, in which ranks need each other in the middle of a model."""
        self._on_fault = on_fault
        self._fault_listeners: list[Callable[[Generation], None]] = []
        word = ValidWord()
        alone = Member(member=member, seat=Seat(0), node=NodeId(0), host=host, port=0)
        self._engine = Engine(
            member,
            self.config,
            word,
            World(generation=Generation(0), members=(alone,)),
            recorder=recorder or NullRecorder(),
            on_fault=self._faulted,
            on_tell=on_tell or _ignore,
        )
        try:
            self._mesh = Mesh(member, secret, host, self.config, word, self._engine.add_link)
        except OSError:
            self._engine.close()
            raise
        self.address = self._mesh.address
        self._editing = threading.Lock()
        self._listeners: list[Callable[[World], None]] = []
        self.channel: Channel = self._engine.channel(WORLD_CHANNEL, None).wait()
        forks.watch(self)

    # -- membership -----------------------------------------------------------------------

    @property
    def world(self) -> World:
        """The world of the current generation."""
        return self._engine.world

    @property
    def rank(self) -> Rank:
        """Our rank in the current world."""
        rank = self.world.rank_of(self.member)
        assert rank is not None, "we are in our own world"
        return rank

    @property
    def size(self) -> int:
        return self.world.size

    @property
    def aborted(self) -> bool:
        """Whether the current generation is over and waits to be replaced by an edit."""
        return self._engine.stopped(self.world.generation) is not None

    @property
    def unlinked(self) -> frozenset[MemberId]:
        """The members of the current world to whom no link lives. Any thread; does not block."""
        return frozenset(self._engine.net.missing(self.world.member_ids - {self.member}))

    def parted(self, world: World) -> frozenset[MemberId]:
        """The members of `world` that have said goodbye to us, and to whom no link was made since.

        Any thread; does not block.
        """
        return frozenset(self._engine.parted & world.member_ids)

    def connect(self, members: Sequence[Member], *, timeout_s: float) -> None:
        """Link to all of `members`. For who is in no world of theirs yet, or no more; blocks.

        They may be training meanwhile, and learn nothing but that a link exists.

        Raises:
          Unreachable: one of them cannot be reached, or does not let us in.
        """
        deadline = time.monotonic() + timeout_s
        by_id = {m.member: m for m in members if m.member != self.member}
        while missing := self._engine.net.missing(frozenset(by_id)):
            for member in missing:
                self._dial(by_id[member], deadline)
            self._wait_if_dropped(missing)

    def edit(self, world: World, *, timeout_s: float) -> None:
        """Move to `world`: blocks until its links are up and its generation has begun.

        The current generation ends at once; what is pending fails. Links between members of
        both worlds stay; those to former members are closed, which may connect again and wait.
        Sequence numbers begin again at 0.

        Raises:
          ValueError: the generation is not newer than ours, or we are not in this world.
          GenerationAborted: somebody aborted that generation before it began here.
          Unreachable: a member cannot be reached, or did not connect in `timeout_s`. We are
            then in no living generation; edit to a later world to go on.
        """
        if world.generation <= self.world.generation:
            raise ValueError(
                f"cannot edit to generation {world.generation}: this is already "
                f"{self.world.generation}"
            )
        if world.rank_of(self.member) is None:
            raise ValueError(
                f"member {self.member} is not in the world of generation {world.generation}"
            )
        deadline = time.monotonic() + timeout_s
        with self._editing:
            self._engine.suspend(
                f"generation {self.world.generation} is replaced by {world.generation}"
            )
            while missing := self._engine.enter(world).wait():
                self._bring_up(world, missing, deadline)
        for listener in list(self._listeners):
            listener(world)

    def abort(self, generation: Generation, reason: str) -> None:
        """End a generation everywhere. Any thread; idempotent; does not block.

        One that is older than ours is over anyway; one that has not begun here is
        remembered, and an `edit` that waits for it ends.
        """
        self._engine.abort(generation, reason)

    def add_edit_listener(self, listener: Callable[[World], None]) -> None:
        """Call `listener(world)` after each edit, on the thread that edits."""
        self._listeners.append(listener)

    def remove_edit_listener(self, listener: Callable[[World], None]) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    def add_fault_listener(self, listener: Callable[[Generation], None]) -> None:
        """Call `listener(generation)` when one ends by a fault, as `on_fault`: do not block."""
        self._fault_listeners.append(listener)

    def remove_fault_listener(self, listener: Callable[[Generation], None]) -> None:
        if listener in self._fault_listeners:
            self._fault_listeners.remove(listener)

    def tell(self, member: MemberId, payload: bytes) -> None:
        """Send `payload` outside any operation and generation; does not block.

        Delivered once and in order if the link lives; there is no answer.

        Raises:
          WireError: we have no link to that member.
          ValueError: over 1 MiB.
        """
        if len(payload) > CONTROL_BYTES_MAX:
            raise ValueError(f"{len(payload)} bytes are too many to tell")
        if member not in self._engine.net.links:
            raise WireError(f"there is no link to member {member}")
        self._engine.tell(member, bytes(payload))

    @property
    def traffic(self) -> dict[MemberId, Traffic]:
        """What went to, and was read from, each linked member, and how fast. Any thread."""
        return {
            member: Traffic(link.flow, link.cma.pace.flow if link.cma is not None else None)
            for member, link in list(self._engine.net.links.items())
        }

    def light_fuse(self, nbytes: int, strike: Callable[[], None]) -> None:
        """For drills: call `strike` in the middle of a transfer, after `nbytes` more.

        What is counted is what this process sends through sockets, headers included, and reads
        from peers' memory. `strike` runs on the communication thread.
        """
        self._engine.light_fuse(nbytes, strike)

    def subset(self, id_: int, members: tuple[MemberId, ...]) -> Channel:
        """A channel of these members, in this order; all must pass the same `id_` (not 0)."""
        if not 0 < id_ < 1 << 32:
            raise ValueError(f"a channel's id must be in 1..2**32-1, got {id_}")
        if self.member not in members:
            raise ValueError(f"member {self.member} is not among {members}")
        return self._engine.channel(id_, members).wait()

    def release(self, channel: Channel) -> None:
        """Forget a channel made by `subset`."""
        self._engine.release_channel(channel.id)

    def close(self) -> None:
        """Say goodbye and release everything: threads joined, sockets closed. Twice is fine.

        Blocks for at most about `close_timeout_s` per member that does not listen.
        """
        self._mesh.close()
        self._engine.close()

    def let_go(self) -> None:
        """(in a forked child) It is the parent's: close its descriptors, refuse operations."""
        self._mesh.let_go()
        self._engine.let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- helpers --------------------------------------------------------------------------

    def _faulted(self, generation: Generation, lost: frozenset[MemberId], reason: str) -> None:
        for listener in list(self._fault_listeners):
            listener(generation)
        self._on_fault(generation, lost, reason)

    def _bring_up(self, world: World, missing: Sequence[MemberId], deadline: float) -> None:
        by_id = {m.member: m for m in world.members}
        dialled = [by_id[m] for m in missing if m < self.member]
        for member in dialled:
            self._check_not_aborted(world)
            self._dial(member, deadline)
        engine = self._engine
        if dialled:
            self._wait_if_dropped([m.member for m in dialled])
            return
        with engine.net.news:
            while silent := engine.net.missing(frozenset(missing)):
                self._check_not_aborted(world)
                left = deadline - time.monotonic()
                if left <= 0:
                    raise Unreachable(
                        f"members {silent} did not connect in time for "
                        f"generation {world.generation}; they dial {self.address}",
                        frozenset(silent),
                    )
                engine.net.news.wait(left)

    def _wait_if_dropped(self, dialled: Sequence[MemberId]) -> None:
        """A moment, where a member let us in and dropped us again: two dialled each other at once."""
        with self._engine.net.news:
            if self._engine.net.missing(frozenset(dialled)):
                self._engine.net.news.wait(0.05)

    def _dial(self, member: Member, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unreachable(
                f"no time left to reach member {member.member}", frozenset({member.member})
            )
        try:
            link = self._mesh.dial(
                member.member,
                (member.host, member.port),
                timeout_s=left,
                connect=None if self._detour is None else partial(self._detour.connect, member),
            )
        except WireError as error:
            raise Unreachable(str(error), frozenset({member.member})) from error
        self._engine.add_link(link)
        # The link is installed by the communication thread; a member that is gone again shows as
        # missing in the next round.
        self._engine.barrier()

    def _check_not_aborted(self, world: World) -> None:
        reason = self._engine.stop_reason(world.generation) or self._engine.closing
        if reason is not None:
            raise GenerationAborted(reason)


def _ignore(member: MemberId, payload: bytes) -> None:
    """Nobody listens to what is told."""
