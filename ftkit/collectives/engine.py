"""Engine: the one communication thread of a process, and everything it owns.

One loop over all links: read, run the operations that became ready, fetch a segment of what
peers offered, write. Other threads only hand in commands (`call`) and look at the reason why
a generation stopped (`stopped`).

A *generation* ends in one of three ways, all through `_end_generation`: a fault (a link of
the world broke, a peer said ABORT, somebody called `abort`), an edit to the next world, or
close. Its order matters: first the valid word is withdrawn and what is half sent is copied
(no peer can then read memory that its owner gets back), then peers are told, then handles
fail.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from ftkit.collectives.channel import Channel
from ftkit.collectives.cma import ValidWord
from ftkit.collectives.commands import Commands
from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.faults import DoubtError, FaultError
from ftkit.collectives.frames import Header, Kind
from ftkit.collectives.handle import COMM_THREADS, Handle
from ftkit.collectives.link import Link
from ftkit.collectives.linkset import LinkSet
from ftkit.collectives.mesh import Greeted
from ftkit.collectives.op import Op
from ftkit.collectives.ports import OpRecorder
from ftkit.collectives.runner import Runner
from ftkit.collectives.transfers import Transfers
from ftkit.core.errors import GenerationAborted, ProtocolError
from ftkit.core.ids import Generation, MemberId
from ftkit.core.world import World

logger = logging.getLogger(__name__)

FaultCallback = Callable[[Generation, frozenset[MemberId], str], None]
TellCallback = Callable[[MemberId, bytes], None]

_DOUBT_S = 2.0
#: Dialled both ways within this, two links are one meeting; later, one had broken.
_CROSSING_S = 1.0
_PARTING_S = 0.5
#: An operation that takes longer than this says whose bytes it waits for, and how often.
_TELL_AWAITED_S = 0.25
#: Receipts come without a message: they have to be looked for.
_LOOK_AGAIN_S = 0.001


class Engine:
    """See the module. Public methods say which thread may call them."""

    def __init__(
        self,
        member: MemberId,
        config: CollectivesConfig,
        word: ValidWord,
        world: World,
        *,
        recorder: OpRecorder,
        on_fault: FaultCallback,
        on_tell: TellCallback,
    ) -> None:
        """Start the thread, in `world`, which holds only `member`."""
        self.member = member
        self.config = config
        self.recorder = recorder
        self._set_world(world)
        self._word = word
        self._on_fault = on_fault
        self._on_tell = on_tell
        self.parted: frozenset[MemberId] = frozenset()
        """Peers that have said goodbye, and to whom no link was made since."""
        self._channels: dict[int, Channel] = {}
        self._abort_told: tuple[Header, bytes] | None = None
        """What all were told of the end of the current generation, once it ended by a fault."""
        self._doubt: tuple[float, str] | None = None
        self._parting: list[tuple[Handle[None], float]] = []
        self._awaited_told_s = 0.0
        self._early_aborts: dict[int, tuple[frozenset[MemberId], str]] = {}
        # Shared with other threads, under the lock.
        self._lock = threading.Lock()
        self._stopped: tuple[int, str] | None = None
        self._generation = world.generation
        self._closing: str | None = None
        self._commands = Commands(self._guard)
        self.net = LinkSet(config.segment_bytes, self._commands.give, self._link_lost)
        self.net.watch(self._commands.wake_fd)
        self.transfers = Transfers(member, config, self.net, self._is_over, self._control)
        self.net.router = self.transfers
        self.runner = Runner(member, recorder, self.stopped, self._commands.later)
        # At the priority of training: lower, steps were up to half a percent shorter where cores are
        # idle, and up to a tenth longer where computing fills them.
        self._thread = threading.Thread(target=self._run, name="ftkit-comm", daemon=True)
        self._word.publish(world.generation)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------

    def call(self, command: Callable[[], None]) -> None:
        """Run `command` soon on the communication thread."""
        self._commands.give(command)

    def submit(self, op: Op) -> None:
        """Start `op`. Called with its channel's lock held."""
        self.call(lambda: self.runner.start(op))

    def stopped(self, generation: Generation) -> str | None:
        """Why operations of `generation` fail at once, or None while it lives."""
        with self._lock:
            if self._closing is not None:
                return self._closing
            if self._stopped is not None and self._stopped[0] >= generation:
                return self._stopped[1]
            if generation != self._generation:
                return f"generation {generation} was replaced by {self._generation}"
            return None

    def stop_reason(self, generation: int) -> str | None:
        """Why `generation` was aborted, also one that has not begun here."""
        with self._lock:
            if self._stopped is not None and self._stopped[0] == generation:
                return self._stopped[1]
            early = self._early_aborts.get(generation)
            return None if early is None else early[1]

    def abort(self, generation: Generation, reason: str) -> None:
        """End `generation`, now or as soon as it begins here. Idempotent, does not block."""
        with self._lock:
            if generation < self._generation:
                return
            if generation == self._generation and self._stopped is None:
                self._stopped = (generation, reason)
            elif generation > self._generation:
                self._early_aborts.setdefault(generation, (frozenset(), reason))
        self.net.tell_news()
        self.call(lambda: self._abort(generation, frozenset(), reason))

    def channel(self, id_: int, fixed: tuple[MemberId, ...] | None) -> Handle[Channel]:
        """A new channel, or the one with this id. ValueError: that one has other members."""
        handle: Handle[Channel] = Handle()

        def create() -> None:
            channel = self._channels.get(id_)
            if channel is None:
                channel = Channel(self, id_, fixed)
                channel.enter(self.world, self.member)
                self._channels[id_] = channel
            elif channel.fixed != fixed:
                handle.fail(
                    ValueError(f"channel {id_} is one of members {channel.fixed}, not {fixed}")
                )
            handle.finish(channel)

        self.call(create)
        return handle

    def release_channel(self, id_: int) -> None:
        """Forget a channel that will not be used again."""

        def forget() -> None:
            self._channels.pop(id_, None)

        self.call(forget)

    def enter(self, world: World) -> Handle[list[MemberId]]:
        """Begin the generation of `world`: value [], or the members whose links are missing."""
        handle: Handle[list[MemberId]] = Handle()
        self.call(lambda: self._enter(world, handle))
        return handle

    def add_link(self, greeted: Greeted) -> None:
        """Take over a connection that passed the greeting."""
        with self._lock:
            closing = self._closing is not None
        if closing:
            greeted.close()
            return
        self.call(lambda: self._add_link(greeted))

    def tell(self, member: MemberId, payload: bytes) -> None:
        """Queue a message outside any generation. Dropped when the member is gone."""
        self.call(lambda: self._tell(member, payload))

    def light_fuse(self, nbytes: int, strike: Callable[[], None]) -> None:
        """Call `strike`, on the communication thread, once `nbytes` more were moved."""
        self.call(lambda: self.net.fuse.light(nbytes, strike))

    def suspend(self, reason: str) -> None:
        """End the current generation quietly: an edit is about to replace it.

        Blocks, though not for long, until peers have read what operations that have ended here
        still show them: theirs shall end well, too.
        """
        parted: Handle[None] = Handle()
        limit_s = time.monotonic() + _PARTING_S
        self.call(lambda: self._begin_parting(parted, limit_s))
        parted.wait()
        self.call(lambda: self._end_generation(reason))

    def barrier(self) -> None:
        """Block until all commands given so far were carried out."""
        handle: Handle[None] = Handle()
        self.call(lambda: handle.finish(None))
        handle.wait()

    @property
    def closing(self) -> str | None:
        """Why nothing new is accepted, or None."""
        return self._closing

    def close(self) -> None:
        """Say goodbye, fail what is pending, end the thread. Blocks; twice is fine."""
        with self._lock:
            if self._closing is not None:
                return
            self._closing = "the group was closed"
        self.call(lambda: None)
        self._thread.join()

    def let_go(self) -> None:
        """(in a forked child, which has no communication thread) See `forks`."""
        if self._commands.over:
            return
        self._lock = threading.Lock()
        self._closing = "this process was forked from the one that is a member"
        self._commands.let_go()
        self.net.let_go()

    # -- the loop ---------------------------------------------------------------------------

    def _run(self) -> None:
        COMM_THREADS.add(threading.get_ident())
        np.seterr(all="ignore")  # an overflow belongs to the user's numbers, not to us
        try:
            while self._closing is None:
                self._turn()
            self._settle(self.config.close_timeout_s)
            self._end_generation("the group was closed")
            self.net.farewell(self._bye(), self.config.close_timeout_s)
        except Exception as error:
            # A bug here must not leave anybody waiting for ever.
            logger.exception("the communication thread failed")
            reason = f"the communication thread of member {self.member} failed: {error!r}"
            self._abort(self.world.generation, frozenset(), reason)
            with self._lock:
                self._closing = reason
        finally:
            COMM_THREADS.discard(threading.get_ident())
            self._end_generation(self._closing or "the group was closed")
            self.net.close()
            self.transfers.offers.close()
            self._word.close()
            self._commands.close()
            self._part(math.inf)
            self.net.tell_news()

    def _settle(self, timeout_s: float) -> None:
        """Let peers read what operations that have ended here still show them."""
        deadline = time.monotonic() + timeout_s
        while self.transfers.offers.lent and time.monotonic() < deadline:
            self._turn(_LOOK_AGAIN_S)

    def _turn(self, patience_max_s: float = math.inf) -> None:
        patience_s = 0.0 if self._commands.asleep() else self._patience_s()
        events = self.net.poll(min(patience_s, patience_max_s))
        self._commands.awake()
        for fd, event in events:
            link = self.net.by_fd(fd)
            if link is not None:
                self._guard(partial(self.net.serve, link, event))
        self._commands.obey()
        self.runner.step_ready(self._guard)
        self._commands.obey()  # what follows an operation that ended begins in this turn
        if self.transfers.fetching:
            self._guard(self.transfers.fetch_segment)
        for link in list(self.net.dirty):
            self._guard(partial(self.net.flush, link))
        self._check_deadlines()

    def _patience_s(self) -> float:
        if self.runner.busy or self.net.dirty or self.transfers.fetching:
            return 0.0
        if self._parting:
            return _LOOK_AGAIN_S
        first_s = self.runner.deadline_s()
        if self.runner.active:
            first_s = min(first_s, time.monotonic() + _TELL_AWAITED_S)
        if self._doubt is not None:
            first_s = min(first_s, self._doubt[0])
        if first_s == math.inf:
            return math.inf
        return min(max(first_s - time.monotonic(), 0.001), 60.0)

    def _guard(self, action: Callable[[], None]) -> None:
        """Run a piece of work; a fault in it ends the generation, not the thread."""
        try:
            action()
        except FaultError as fault:
            self._abort(self.world.generation, fault.lost, fault.reason)
        except DoubtError as doubt:
            # The operation stays as it is. The peer told everybody why before it let go of
            # its memory; that message names the lost, which we cannot.
            if self._doubt is None:
                self._doubt = (time.monotonic() + _DOUBT_S, str(doubt))

    def _tell_awaited(self, now: float) -> None:
        """Note whose bytes operations wait for: for when nobody can ask any more."""
        self._awaited_told_s = now
        for op in self.runner.waiting_since(now - _TELL_AWAITED_S):
            self.recorder.awaiting(op.recorded, op.seq, self.transfers.awaited_of(op))

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self.runner.active and now - self._awaited_told_s > _TELL_AWAITED_S:
            self._tell_awaited(now)
        if self._parting:
            self._part(now)
        if self._doubt is not None and self._doubt[0] <= now:
            self._abort(self.world.generation, frozenset(), self._doubt[1])
            return
        op = self.runner.overdue(now)
        if op is not None:
            self._abort(
                self.world.generation,
                frozenset(),
                f"{op.name} (operation {op.seq} of group {op.channel.id}) exceeded its timeout; "
                f"nothing came from members {self.transfers.awaited_of(op)}",
            )

    def _begin_parting(self, parted: Handle[None], limit_s: float) -> None:
        if self._commands.over or not self.transfers.offers.lent:
            parted.finish(None)
        else:
            self._parting.append((parted, limit_s))

    def _part(self, now: float) -> None:
        """Let go of those who wait for peers to have read what we show, where they have."""
        for parted, limit_s in self._parting:
            if not self.transfers.offers.lent or limit_s <= now:
                parted.finish(None)
        self._parting = [p for p in self._parting if not p[0].done()]

    # -- links ------------------------------------------------------------------------------

    def _add_link(self, greeted: Greeted) -> None:
        if self._closing is not None:
            greeted.close()
            return
        old = self.net.links.get(greeted.peer)
        if old is not None:
            if old.process != greeted.process and not old.said_bye:
                logger.warning(
                    "refused a second process that claims to be member %s, which is linked",
                    greeted.peer,
                )
                greeted.close()
                return
            if self._crossed(old, greeted):
                greeted.close()
                return
            self.net.drop(old)
            if greeted.peer in self.world.member_ids:
                self._abort(
                    self.world.generation,
                    frozenset(),
                    f"member {greeted.peer} replaced its connection",
                )
        self.net.add(greeted)
        self.parted -= {greeted.peer}
        if self._abort_told is not None and greeted.peer in self.world.member_ids:
            # There was no link to tell it over; who begins this generation now, waits in vain.
            header, payload = self._abort_told
            self.net.queue(self.net.links[greeted.peer], header, memoryview(payload))

    def _crossed(self, old: Link, greeted: Greeted) -> bool:
        """Whether two dialled each other at once, and the new link is the one that both give up.

        Were each to keep what comes last, each might close what the other keeps.
        """
        stays = self.member > greeted.peer
        return (
            old.dialled is stays
            and greeted.dialled is not stays
            and not old.said_bye
            and time.monotonic() - old.made_at < _CROSSING_S
        )

    def _link_lost(self, link: Link, reason: str) -> None:
        if link.peer in self.world.member_ids and not link.said_bye:
            raise FaultError(reason, frozenset({link.peer}))
        if link.said_bye:
            self.parted |= {link.peer}
        logger.debug("link to member %s ended: %s", link.peer, reason)

    def _tell(self, member: MemberId, payload: bytes) -> None:
        link = self.net.links.get(member)
        if link is None or link.said_bye:
            logger.debug("no link to member %s; %s bytes dropped", member, len(payload))
            return
        size, generation = len(payload), self.world.generation
        header = Header(Kind.TELL, 0, 0, generation, 0, 0, 0, self.member, 0, size, size)
        self.net.queue(link, header, memoryview(payload))

    def _control(self, link: Link, header: Header, view: memoryview) -> None:
        match header.kind:
            case Kind.ABORT:
                self._abort_arrived(header, view)
            case Kind.TELL:
                try:
                    self._on_tell(link.peer, bytes(view))
                except Exception:
                    logger.exception("the receiver of a told message raised")
            case Kind.BYE:
                link.ended = True
                self.net.tell_news()
                link = link.root
                if (
                    link.said_bye
                    and not self._is_over(self.world.generation)
                    and (link.awaited or link.owes)
                    and link.peer in self.world.member_ids
                ):
                    raise FaultError(
                        f"member {link.peer} left in the middle of an operation",
                        frozenset({link.peer}),
                    )

    def _is_over(self, generation: int) -> bool:
        current = self.world.generation
        return generation < current or (
            generation == current and self._stopped is not None and self._stopped[0] == generation
        )

    # -- generations ------------------------------------------------------------------------

    def _abort_arrived(self, header: Header, view: memoryview) -> None:
        try:
            message = json.loads(bytes(view))
            lost = frozenset(MemberId(int(m)) for m in message["lost"])
            reason = str(message["reason"])[:2000]
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"an abort that says nothing: {error}") from error
        self._abort(Generation(header.generation), lost, reason)

    def _abort(self, generation: Generation, lost: frozenset[MemberId], reason: str) -> None:
        """End `generation` with a fault: flood it, and report it once."""
        with self._lock:
            if generation > self.world.generation:
                self._early_aborts.setdefault(generation, (lost, reason))
        self.net.tell_news()
        if generation != self.world.generation or self._abort_told or self._closing is not None:
            return
        logger.info("generation %s ends: %s", generation, reason)
        payload = json.dumps({"lost": sorted(lost), "reason": reason}).encode()
        header = Header(
            Kind.ABORT, 0, 0, generation, 0, 0, 0, self.member, 0, len(payload), len(payload)
        )
        self._abort_told = header, payload
        self._end_generation(reason, header, payload)
        try:
            self._on_fault(generation, lost, reason)
        except Exception:
            logger.exception("on_fault raised")

    def _end_generation(
        self, reason: str, flood: Header | None = None, payload: bytes = b""
    ) -> None:
        """See the module for the order. Idempotent."""
        generation = self.world.generation
        with self._lock:
            if self._stopped is None or self._stopped[0] != generation:
                self._stopped = (generation, reason)
            reason = self._stopped[1]
        self._word.withdraw()
        self._doubt = None
        self.transfers.end(generation)
        if flood is not None:
            for link in self.net.links.values():
                if link.peer in self.world.member_ids and not link.said_bye:
                    self.net.queue(link, flood, memoryview(payload))
        self.runner.end(self._channels.values(), reason)

    def _set_world(self, world: World) -> None:
        self.world = world
        self.on_one_host = (
            self.config.transport is not Transport.TCP
            and len({member.host for member in world.members}) <= 1
        )
        """Whether all members name the same host: decided alike by all."""

    def _bye(self) -> Header:
        return Header(Kind.BYE, 0, 0, self.world.generation, 0, 0, 0, self.member, 0, 0, 0)

    def _enter(self, world: World, handle: Handle[list[MemberId]]) -> None:
        if self._closing is not None:
            handle.fail(GenerationAborted(self._closing))
            return
        missing = self.net.missing(world.member_ids - {self.member})
        if missing:
            handle.finish(missing)
            return
        self._end_generation(f"generation {self.world.generation} was replaced")
        gone = self.world.member_ids - world.member_ids
        for peer in gone:
            link = self.net.links.get(peer)
            if link is not None:
                self.net.dismiss(link, self._bye())
        self.transfers.purge(world.generation - 1)
        self.transfers.memory.generation = world.generation
        with self._lock:
            self._set_world(world)
            self._generation = world.generation
            self._stopped = None
            self._abort_told = None
            early = self._early_aborts.get(world.generation)
            self._early_aborts = {
                g: a for g, a in self._early_aborts.items() if g > world.generation
            }
        self._word.publish(world.generation)
        for channel in self._channels.values():
            channel.enter(world, self.member)
        for link in self.net.links.values():
            self.net.unpark(link)
        handle.finish([])
        if early is not None:
            self._abort(world.generation, *early)
