"""Holder: a node's half of parity. It makes what a leader orders, and keeps what counts."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.parity.buffer import Heads, ParityBuffer
from ftkit.checkpoint.parity.combine import InPlace, Pace, Superseded, combine
from ftkit.checkpoint.parity.parts import Pins, find_part, local_parts
from ftkit.checkpoint.parity.protocol import (
    Ask,
    Event,
    Failed,
    Keep,
    Made,
    Make,
    Standing,
    obey,
)
from ftkit.checkpoint.parity.rounds import (
    Ballot,
    Holding,
    RoundId,
    StripeSet,
)
from ftkit.checkpoint.parity.streams import Peers, open_shard
from ftkit.checkpoint.rebuild import shards_to_read
from ftkit.core.errors import IntegrityError, ProtocolError
from ftkit.core.ids import JobId, NodeId

logger = logging.getLogger(__name__)

#: The longest that an end waits for work that is going on.
CLOSE_S = 2.0

MakePace = Callable[[Callable[[], bool]], Pace]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a node spent on a round."""

    bytes: int
    """Of the parity it made."""
    seconds: float


class Holder:
    """A node's parity. Any thread may call; one at a time writes a buffer."""

    def __init__(
        self,
        directory: Path,
        job: JobId,
        node: NodeId,
        peers: Callable[[], Peers],
        *,
        make_pace: MakePace = Pace,
    ) -> None:
        """Hold nothing yet.

        Args:
          directory: where the arenas lie; the buffers go beside them.
          job: whose.
          node: this one.
          peers: how to reach the others, at this moment.
          make_pace: makes the pace of one piece of work, given whether it is still wanted.
        """
        self.directory, self.node, self.peers = directory, node, peers
        self._job = job
        self.make_pace = make_pace
        self.working = threading.Lock()
        """Held while a buffer is written, or must not be."""
        self._buffers = [
            ParityBuffer(directory / f"ftkit-{job}-{number}.parity") for number in range(2)
        ]
        self._lock = threading.Lock()
        # ---- under the lock ----
        self._state = Standing()
        self._sets: dict[RoundId, StripeSet] = {}
        self._where: dict[RoundId, ParityBuffer] = {}
        self._pins = Pins(directory, node)
        self._closed = False

    def ask(self, ballot: Ballot) -> str:
        """A leader wants to be obeyed; why it is not, or "".

        The newest snapshots are pinned, so that they are still there when it asks for one.
        """
        parts = local_parts(self.directory, self._job, self.node)
        with self._lock:
            self._state, refused = obey(self._state, Ask(ballot))
            if not refused:
                self._pins.offer(parts)
            return refused

    @property
    def promised(self) -> Ballot:
        """The ballot that is obeyed."""
        with self._lock:
            return self._state.promised

    def keep(self, ballot: Ballot, round_: RoundId) -> None:
        """A round counts: let go of all else. ProtocolError when that is refused."""
        with self._lock:
            self._obey(Keep(ballot, round_))

    def holdings(self) -> list[Holding]:
        """The rounds of which this node has all that it should. Looks into the arenas."""
        with self._lock:
            whole = [self._sets[round_] for round_ in self._state.whole]
        return [
            Holding(round=s.round, groups=s.groups, m=s.code.m)
            for s in whole
            if all(find_part(self.directory, part) for part in s.parts[self.node])
        ]

    def kept(self) -> StripeSet | None:
        """The round that counts, if this node has its parity."""
        with self._lock:
            return None if self._state.kept is None else self._sets[self._state.kept]

    def is_whole(self, round_: RoundId) -> bool:
        """Whether the parity of a round is here, and is to be."""
        with self._lock:
            return round_ in self._state.whole and not self._closed

    def stripes_of(self, round_: RoundId) -> StripeSet:
        """The set of a round this node holds. IntegrityError when it does not."""
        with self._lock:
            if round_ in self._state.whole:
                return self._sets[round_]
        raise IntegrityError(f"node {self.node} holds no parity of step {round_.step}")

    def path_of(self, round_: RoundId) -> Path:
        """The buffer that holds a round. IntegrityError when none does."""
        with self._lock:
            if round_ in self._state.whole:
                return self._where[round_].path
        raise IntegrityError(f"node {self.node} holds no parity of step {round_.step}")

    def repin(self) -> None:
        """Pin again what is to be pinned: an arena that grew this instant lost the pins."""
        with self._lock:
            self._pins.again()

    def make(self, stripes: StripeSet, ballot: Ballot, keep: RoundId | None) -> Cost:
        """Pin this node's parts of a round, and make the parity it keeps. Blocks.

        Args:
          stripes: the round.
          ballot: whose order it is.
          keep: the round that counts meanwhile.

        Raises:
          ProtocolError: another leader has been promised obedience.
          IntegrityError: a part is no longer there, or a shard corrupt or out of reach.
          CapacityError: shared memory is full.
          WireError: another node is out of reach.
          Superseded: a newer order has come.
        """
        start, round_ = time.monotonic(), stripes.round
        with self._lock:
            # In this order: what the state names must be known.
            before = self._sets.get(round_)
            self._sets[round_] = stripes
            try:
                self._obey(Make(ballot, round_, keep))
            except ProtocolError:
                if before is None:
                    del self._sets[round_]
                raise
        # Whoever works for an older order notices at its next window that it is not wanted.
        with self.working:
            try:
                with self._lock:
                    if self._state.fresh != round_ or self._closed:
                        raise Superseded(f"another round than step {round_.step} is wanted now")
                    kept = self._where.get(self._state.kept) if self._state.kept else None
                    buffer = next(b for b in self._buffers if b is not kept)
                    self._where[round_] = buffer
                    self._pins.hold(round_, stripes.parts[self.node])
                count = self._encode(stripes, buffer)
                with self._lock:
                    self._obey(Made(round_))
            except BaseException:
                with self._lock, suppress(ProtocolError):
                    self._obey(Failed(round_))
                raise
        return Cost(count, time.monotonic() - start)

    def make_again(self, stripes: StripeSet) -> Cost | None:
        """Make this node's parity of a round that it lost; as `make`. None: it is here."""
        with self._lock:
            if stripes.round in self._state.whole:
                return None
            promised, kept = self._state.promised, self._state.kept
        return self.make(stripes, promised, kept)

    def replace(self, stripes: StripeSet) -> None:
        """Compute this node's shards of a round it holds anew, in place; as `make`."""
        with self.working:
            with self._lock:
                if stripes.round not in self._state.whole or self._closed:
                    raise Superseded(f"the parity of step {stripes.round.step} is not needed now")
                buffer = self._where[stripes.round]
            # Until it is sealed again its page says that nothing is there, so that a failure
            # costs the shards, and nobody reads them half made.
            self._encode(stripes, buffer)

    def close(self) -> None:
        """End what is going on, soon, and unmap the buffers."""
        with self._lock:
            self._closed = True
        # Whoever is at work may wait for another node; its memory goes with its last view.
        if self.working.acquire(timeout=CLOSE_S):
            for buffer in self._buffers:
                buffer.close()
            self.working.release()

    def heads(self, stripes: StripeSet, peers: Peers) -> Heads:
        """The heads of all parts of a round, checked; as `make`."""
        found = dict[NodeId, list[bytes]]()
        for node, parts in stripes.parts.items():
            found[node] = []
            for part in parts:
                if node == self.node:
                    with Arena.open(self.directory / part.arena) as arena:
                        sealed = arena.find(part.step, part.generation)
                        arena.head(sealed)
                        found[node].append(arena.head_bytes(sealed))
                else:
                    found[node].append(peers.head_bytes(node, part))
        return found

    def _encode(self, stripes: StripeSet, buffer: ParityBuffer) -> int:
        """Make the shards this node keeps; returns their bytes. Under `working`."""
        peers, round_ = self.peers(), stripes.round
        pace = self.make_pace(lambda: self._is_wanted(round_))
        heads = self.heads(stripes, peers)
        opener = open_shard(peers, stripes, heads, pace.window_bytes, ranges=pace.ranges)
        count = 0
        for place, memory in buffer.begin(stripes, heads, self.node).items():
            stripe = stripes.plan.stripes[place.stripe]
            sources = shards_to_read(stripe, place.shard, range(len(stripe.data)))
            combine(place.stripe, stripe, sources, {place.shard: InPlace(memory)}, opener, pace)
            count += len(memory)
            memory.release()
        for part in stripes.parts[self.node]:
            if find_part(self.directory, part) is None:
                raise IntegrityError(f"{part.arena} of node {self.node} lost step {part.step}")
        buffer.seal()
        return count

    def _is_wanted(self, round_: RoundId) -> bool:
        with self._lock:
            return round_ in self._state.pinned and not self._closed

    # Under the lock.

    def _obey(self, event: Event) -> None:
        self._state, refused = obey(self._state, event)
        if refused:
            raise ProtocolError(f"node {self.node} refuses: {refused}")
        for round_ in self._sets.keys() - self._state.pinned:
            del self._sets[round_]
            self._where.pop(round_, None)
        self._pins.only(self._state.pinned)
