"""Channel: an ordered set of members that issue operations together.

Channel 0 is the world and follows it through every edit. Another one is a fixed set of
members: it works in each generation that still has all of them, and its operations fail in
one that has not. Collectives run in the order of issue, one at a time; send and receive run
beside them. A channel also has a *ring*, the order in which bulk goes round between hosts.
"""

import math
import threading
import time
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from ftkit.collectives.frames import P2P
from ftkit.collectives.handle import Handle, failed
from ftkit.collectives.op import Op, Program
from ftkit.collectives.rates import Matrix, dropped
from ftkit.collectives.ring_order import Ring, natural
from ftkit.core.errors import GenerationAborted
from ftkit.core.ids import Generation, MemberId
from ftkit.core.world import World

if TYPE_CHECKING:
    from ftkit.collectives.engine import Engine


class HasChannel(Protocol):
    """A Group or an FtkitProcessGroup: whose members take part."""

    @property
    def channel(self) -> "Channel": ...


class Channel:
    """See the module. `issue` may be called from any thread."""

    def __init__(self, engine: "Engine", id_: int, fixed: tuple[MemberId, ...] | None) -> None:
        self.id = id_
        self.fixed = fixed
        """The members it was made of; None for the world's."""
        self._engine = engine
        self._lock = threading.Lock()
        self._generation = Generation(0)
        self._members: tuple[MemberId, ...] = ()
        self._rank = -1
        self._missing: frozenset[MemberId] = frozenset()
        self._seq = 0
        self._p2p: dict[tuple[str, int, int], int] = {}
        #: owned by the communication thread; others may look
        self.hosts: tuple[str, ...] = ()
        """Each member's host."""
        self.ring: tuple[int, ...] = ()
        """Ranks, each sending to the next. Changed between two operations, by `adopt`."""
        self._planned = False
        self._planned_rate: float | None = None
        self._looked = 0
        self.queue: deque[Op] = deque()
        self.running: Op | None = None

    def enter(self, world: World, me: MemberId) -> None:
        """Begin a generation: membership as of `world`, every count from 0."""
        with self._lock:
            self._generation = world.generation
            order = self.fixed or tuple(m.member for m in world.members)
            self._missing = frozenset(order) - world.member_ids
            self._members = order
            self._rank = order.index(me)
            self._seq = 0
            self._p2p.clear()
            by_id = {m.member: m.host for m in world.members}
            self.hosts = tuple(by_id.get(m, "") for m in order)
            self.ring = natural(self.hosts)
            self._planned, self._planned_rate, self._looked = False, None, 0

    @property
    def members(self) -> tuple[MemberId, ...]:
        return self._members

    @property
    def rank(self) -> int:
        """Our place among the members."""
        return self._rank

    @property
    def size(self) -> int:
        return len(self._members)

    def adopt(self, ring: Ring, rates: Matrix) -> None:
        """(the planning operation) Use `ring` from the next operation on."""
        self.ring, self._planned = ring.order, True
        rate = float(rates[self._rank, self._after])
        self._planned_rate = None if math.isnan(rate) else rate

    def look_due(self) -> bool:
        """(a ring operation, on all members alike) Whether this one begins with a look."""
        every = self._engine.config.plan_every
        if not every or not self._choices:
            return False
        self._looked += 1
        return self._looked % every == 1 % every

    @property
    def _choices(self) -> bool:
        """Whether there is more than one ring to choose from."""
        return len(self.hosts) > 2 and len(set(self.hosts)) > 1

    @property
    def wants_plan(self) -> bool:
        """Whether this member has a reason to plan the ring.

        It has when none was planned since the generation began, when the edge it sends over
        has become slow, and when that was first measured after the plan. Any thread.
        """
        with self._lock:  # an edit changes all of it
            if not self._choices:
                return False
            if not self._planned:
                return True
            link = self._engine.net.links.get(self._members[self._after])
            if link is None or self.hosts[self._after] == self.hosts[self._rank]:
                return False
            planned = self._planned_rate
        return bool(link.windows) if planned is None else dropped(planned, link.windows)

    @property
    def _after(self) -> int:
        return self.ring[(self.ring.index(self._rank) + 1) % len(self.ring)]

    def issue(
        self, name: str, program: Program, *, nbytes: int, timeout_s: float | None = None
    ) -> Handle[Any]:
        """Start a collective. Does not block; failures, too, come through the handle.

        Args:
          name: what the recorder and messages call it.
          program: runs on the communication thread.
          nbytes: this rank's payload, for the recorder.
          timeout_s: after it the generation is aborted; None waits for ever.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            refusal = self._refusal()
            if refusal is not None:
                return failed(refusal)
            op = self._op(name, program, self._seq, 0, 0, deadline_s, self.id)
            self._seq += 1
            # Queued under the lock: the order of numbers is the order of execution.
            self._engine.recorder.enter(self.id, op.seq, name, nbytes)
            self._engine.submit(op)
        return op.handle

    def issue_p2p(
        self,
        direction: str,
        peer: int,
        tag: int,
        program: Program,
        *,
        nbytes: int,
        timeout_s: float | None = None,
    ) -> Handle[Any]:
        """Start a send to, or a receive from, rank `peer`; -1 receives from anybody.

        The n-th send with a tag meets the n-th receive with it.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            refusal = self._refusal()
            if refusal is not None:
                return failed(refusal)
            seq = 0
            if peer >= 0:
                seq = self._p2p.get((direction, peer, tag), 0)
                self._p2p[direction, peer, tag] = seq + 1
            other = self._members[peer] if peer >= 0 else "any"
            # Sends and receives are counted apart from collectives, and for each peer and tag.
            recorded = zlib.crc32(f"{self.id} {direction} {peer} {tag}".encode())
            op = self._op(direction, program, seq, P2P, tag, deadline_s, recorded)
            self._engine.recorder.enter(recorded, seq, f"{direction} {other}", nbytes)
            self._engine.submit(op)
        return op.handle

    def take_from(self, peer: int, tag: int, seq: int) -> bool:
        """Count a receive from rank `peer`, if message `seq` is the next: True if so."""
        with self._lock:
            if self._p2p.get(("recv", peer, tag), 0) != seq:
                return False
            self._p2p["recv", peer, tag] = seq + 1
            return True

    def _refusal(self) -> GenerationAborted | None:
        reason = self._engine.stopped(self._generation)
        if reason is None and self._missing:
            reason = (
                f"members {sorted(self._missing)} of this group are not in generation "
                f"{self._generation}; make a new group of the members that are"
            )
        return None if reason is None else GenerationAborted(reason)

    def _op(
        self,
        name: str,
        program: Program,
        seq: int,
        flags: int,
        tag: int,
        deadline_s: float | None,
        recorded: int,
    ) -> Op:
        return Op(
            self._engine,
            self,
            name,
            program,
            generation=self._generation,
            members=self._members,
            rank=self._rank,
            seq=seq,
            flags=flags,
            tag=tag,
            deadline_s=deadline_s,
            recorded=recorded,
        )
