"""Recovery: after a loss of all ranks, what this node lost is computed from the other nodes."""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.erasure import best_engine
from ftkit.checkpoint.parity.combine import Pace
from ftkit.checkpoint.parity.holder import Holder
from ftkit.checkpoint.parity.leader import ask_all
from ftkit.checkpoint.parity.mend import Mended, fetch_head, mend, missing_parts
from ftkit.checkpoint.parity.operations import NodeState
from ftkit.checkpoint.parity.parts import local_parts
from ftkit.checkpoint.parity.protocol import awaited
from ftkit.checkpoint.parity.rounds import Holding, RoundId, StripeSet
from ftkit.checkpoint.parity.streams import Peers
from ftkit.checkpoint.slabs import Sealed
from ftkit.core.errors import CapacityError, FtkitError, IntegrityError, WireError
from ftkit.core.ids import Generation, JobId
from ftkit.core.trace import Trace
from ftkit.launch.arenas import Arenas
from ftkit.recovery.plan import Plan

#: Tries to rebuild while nodes are out of reach, a look apart, before a round is given up.
MEND_TRIES = 50


class Recovery:
    """What a node knows to be damaged, and how it makes up for it. Any thread may ask."""

    def __init__(
        self, holder: Holder, arenas: Arenas, job: JobId, trace: Trace, ended: threading.Event
    ) -> None:
        """Know of no damage yet.

        Args:
          holder: of this node's parity.
          arenas: this node's.
          job: whose.
          trace: where rebuilds and damage are told.
          ended: set when work is to stop.
        """
        self._holder, self._node, self._arenas = holder, holder.node, arenas
        self._job, self._trace, self._ended = job, trace, ended
        self._tries = 0
        self._owed: StripeSet | None = None
        self._lock = threading.Lock()
        # ---- under the lock ----
        self._checked = Generation(-1)
        self._damaged: set[tuple[str, Sealed]] = set()
        self._given_up: set[RoundId] = set()

    @property
    def checked(self) -> Generation:
        """After the end of which generation all parts were read through."""
        with self._lock:
            return self._checked

    @property
    def damaged(self) -> frozenset[tuple[str, Sealed]]:
        """Parts whose bytes are known to have rotted, by the path of the arena."""
        with self._lock:
            return frozenset(self._damaged)

    @property
    def given_up(self) -> frozenset[RoundId]:
        """Rounds that could not be rebuilt."""
        with self._lock:
            return frozenset(self._given_up)

    def state(self) -> NodeState:
        """What this node says of itself."""
        parts = local_parts(self._arenas.directory, self._job, self._node)
        holds = tuple(self._holder.holdings())
        damaged = self.damaged
        return NodeState(
            promised=self._holder.promised,
            parts=tuple((c, p) for c, p, s in parts if (c.path, s) not in damaged),
            holds=holds,
            given_up=self.given_up,
        )

    def look(self, plan: Plan, peers: Peers, is_current: Callable[[Plan], bool]) -> None:
        """Check what is here, and rebuild what is worth it. Blocks; one thread's.

        Args:
          plan: in which no rank trains.
          peers: the nodes that live.
          is_current: whether the plan still holds; when it does not, ranks may write.

        Raises:
          FtkitError: it could not be done now.
          OSError: likewise.
        """
        if self.checked != plan.halted:
            self.check()
            with self._lock:
                self._checked, self._tries = plan.halted, 0
        others = [n for n in peers.addresses if n != self._node]
        states = ask_all(peers, others) | {self._node: self.state()}
        wanted = awaited(
            [copy for s in states.values() for copy, _ in s.parts],
            {n: s.holds for n, s in states.items()},
            {r for s in states.values() for r in s.given_up},
        )
        if wanted is None:
            self._make_again()
            return
        if not any(self._node in group for group in wanted.groups):
            return
        try:
            self._rebuild(wanted, peers, lambda: is_current(plan))
        except WireError as error:
            self._tries += 1
            if self._tries >= MEND_TRIES:
                self._give_up(wanted, str(error))
        except (IntegrityError, CapacityError) as error:
            self._give_up(wanted, str(error))

    def check(self) -> None:
        """Read every part in this node's arenas. Nobody writes them now."""
        for copy, _, sealed in local_parts(self._arenas.directory, self._job, self._node):
            try:
                with Arena.open(Path(copy.path)) as arena:
                    arena.verify(sealed)
            except (IntegrityError, OSError) as error:
                with self._lock:
                    self._damaged.add((copy.path, sealed))
                self._trace.event(
                    "scrub", step=sealed.step, node=self._node, arena=Path(copy.path).name,
                    reason=str(error), mended=False,
                )  # fmt: skip

    def _rebuild(self, wanted: Holding, peers: Peers, is_current: Callable[[], bool]) -> None:
        head = fetch_head(peers, wanted, self._node)
        missing = missing_parts(self._arenas.directory, head, self._node)
        if missing:
            with self._arenas.writing:
                if not is_current():
                    return  # ranks are about to open these arenas
                done = mend(
                    self._arenas.directory,
                    head,
                    self._node,
                    missing,
                    peers,
                    # Nobody trains: as fast as can be.
                    Pace(lambda: not self._ended.is_set(), share=1.0),
                    slabs=self._arenas.slabs,
                )
            self._forget_damage(head.stripes)
            self._tell_rebuilt(head.stripes, done)
            self._owed = head.stripes

    def _make_again(self) -> None:
        """Once all lost parts are back: the parity this node kept of the others' parts."""
        owed, self._owed = self._owed, None
        if owed is not None:
            # One try: the next round makes up for it.
            with suppress(FtkitError):
                self._holder.make_again(owed)

    def _forget_damage(self, stripes: StripeSet) -> None:
        refs = {(p.arena, p.step, p.generation) for p in stripes.parts[self._node]}
        with self._lock:
            self._damaged = {
                (path, s)
                for path, s in self._damaged
                if (Path(path).name, s.step, s.generation) not in refs
            }

    def _tell_rebuilt(self, stripes: StripeSet, done: Mended) -> None:
        self._trace.event(
            "rebuild",
            step=stripes.round.step,
            generation=stripes.round.generation,
            seats=sorted({p.seat for p in done.parts}),
            bytes=done.bytes,
            read=done.read,
            seconds=round(done.seconds, 6),
            engine=best_engine().value,
            damaged=list(done.damaged),
        )

    def _give_up(self, wanted: Holding, reason: str) -> None:
        with self._lock:
            self._given_up.add(wanted.round)
        self._trace.event("rebuild-failed", step=wanted.round.step, reason=reason)
