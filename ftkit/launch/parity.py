"""ParityTier: an agent's thread that leads rounds of parity, recovers after a loss, and scrubs.

Never on the agent's main thread, never in training's way: the thread has low priority and rests
as long as it works, and a round that fails costs nothing but itself.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ftkit.checkpoint.erasure import best_engine
from ftkit.checkpoint.gate import Gate
from ftkit.checkpoint.lines import Lines
from ftkit.checkpoint.parity.combine import Pace, ShardLost, Superseded, be_nice
from ftkit.checkpoint.parity.holder import Holder
from ftkit.checkpoint.parity.leader import lead_round
from ftkit.checkpoint.parity.mend import fetch_head, mend, missing_parts
from ftkit.checkpoint.parity.operations import operations
from ftkit.checkpoint.parity.rounds import NOBODY, Holding, RoundId, StripeSet
from ftkit.checkpoint.parity.scrub import scrub
from ftkit.checkpoint.parity.streams import Peers
from ftkit.checkpoint.serve import Operation
from ftkit.checkpoint.stripes import Code
from ftkit.core.errors import FtkitError
from ftkit.core.ids import Generation, JobId, NodeId
from ftkit.core.trace import Trace
from ftkit.launch.arenas import Arenas
from ftkit.launch.config import AUTO, JobConfig
from ftkit.launch.parity_recovery import Recovery
from ftkit.recovery.plan import Mode, Plan

logger = logging.getLogger(__name__)

#: Between two looks for something to do.
LOOK_S = 0.2

#: Parity that has been the newest for so long is scrubbed; younger one will be replaced.
SCRUB_AFTER_S = 5.0

#: Between two scrubs of the same parity.
SCRUB_EVERY_S = 60.0

#: The longest that an end waits for the thread.
CLOSE_S = 2.0


class ParityTier:
    """A node's part in parity. Owns one thread; `close` ends it."""

    def __init__(
        self,
        config: JobConfig,
        code: Code,
        node: NodeId,
        secret: bytes,
        arenas: Arenas,
        trace: Trace,
        *,
        gate: Gate | None = None,
    ) -> None:
        """Hold nothing yet; `start` begins.

        Args:
          config: the job.
          code: what its `parity` says.
          node: this one.
          secret: the job's.
          arenas: this node's.
          trace: where rounds, rebuilds and scrubs are told.
          gate: keeps rounds and scrubs out of training's way.
        """
        self._code, self._node = code, node
        self._arenas, self._trace = arenas, trace
        self._job = JobId(config.job)
        self._lines = Lines(secret)
        self._make_pace = partial(Pace, gate=gate)
        self._holder = Holder(
            arenas.directory, self._job, node, self._peers, make_pace=self._make_pace
        )
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ftkit-parity", daemon=True)
        self._ballot = NOBODY
        self._said = ""
        self._recovery = Recovery(self._holder, arenas, self._job, trace, self._ended)
        self._given_s = 0.0 if config.parity_every == AUTO else float(config.parity_every)
        self._led: tuple[float, Generation] | None = None
        """When the last round that was made began, and of which world it is."""
        self._round_s: float | None = None
        self._making = False
        self._scrubbed: tuple[RoundId | None, float] = None, 0.0
        self._lock = threading.Lock()
        # ---- under the lock ----
        self._plan = Plan()
        self._every_s: float | None = None
        self._stores: dict[NodeId, tuple[str, int]] = {}

    @property
    def operations(self) -> dict[str, Operation]:
        """For the byte server."""
        return operations(self._holder, self._recovery.state)

    def start(self) -> None:
        """Begin to look for something to do."""
        self._thread.start()

    def take(
        self, plan: Plan, stores: Mapping[str, Sequence[Any]], every_s: float | None = None
    ) -> None:
        """The newest plan, and where each node that lives serves its arenas. Does not block.

        `every_s`: between the begins of two rounds, where the job has decided that.
        """
        known = {NodeId(int(n)): (str(a[0]), int(a[1])) for n, a in stores.items()}
        with self._lock:
            self._plan, self._stores, self._every_s = plan, known, every_s
        self._lines.only(known.values())

    def report(self) -> dict[str, object]:
        """For the coordinator: what this node holds, and what it knows to be beyond repair."""
        return {
            "holds": [h.to_json() for h in self._holder.holdings()],
            "given_up": list(self._recovery.given_up),
            "checked": self._recovery.checked,
            "making": self._making,
            "round_s": self._round_s,
            "every_s": self._every_s,
        }

    def good(self, copies: list[dict[str, object]]) -> list[dict[str, object]]:
        """The copies, less those whose bytes are known to have rotted."""
        bad = {(path, sealed.step, sealed.generation) for path, sealed in self._recovery.damaged}
        return [c for c in copies if (c["path"], c["step"], c["generation"]) not in bad]

    def close(self) -> None:
        """End the thread, and unmap what was mapped. May be called twice."""
        self._ended.set()
        self._holder.close()
        self._lines.close()
        if self._thread.is_alive():
            # It may wait for another node, and has nothing here that anybody misses.
            self._thread.join(CLOSE_S)

    # The thread.

    def _run(self) -> None:
        be_nice()
        while not self._ended.wait(LOOK_S):
            try:
                self.look()
            except Superseded:
                continue
            except (FtkitError, OSError) as error:
                self._say(str(error))
            except Exception:
                # Parity is a help: what goes wrong with it must not take the node along.
                logger.exception("parity failed in a way that was not foreseen")
                self._say("an error that was not foreseen; the agent's log has it")

    def look(self) -> None:
        """Do what is to be done now: lead a round, mend, or scrub. Blocks; the thread's alone.

        Raises:
          FtkitError: it could not be done.
          OSError: likewise.
        """
        self._holder.repin()
        with self._lock:
            plan, nodes = self._plan, sorted(self._stores)
            every_s = self._given_s if self._every_s is None else self._every_s
        if plan.mode is Mode.FORMING and plan.world is not None:
            self._recovery.look(plan, self._peers(), self._is_forming)
        elif plan.mode is Mode.RUNNING and plan.world is not None:
            leads = nodes and nodes[0] == self._node and len(nodes) >= sum(self._code)
            if leads and self._is_due(plan.world.generation, every_s):
                self._lead()
            self._scrub_if_due()

    def _is_due(self, generation: Generation, every_s: float) -> bool:
        """Whether to lead a round: of a world that has none yet at once."""
        if self._led is None or self._led[1] != generation:
            return True
        return time.monotonic() - self._led[0] >= every_s

    def _lead(self) -> None:
        began, self._making = time.monotonic(), True
        try:
            done, self._ballot = lead_round(self._peers(), self._node, self._code, self._ballot)
        finally:
            self._making = False
        if done.broken:
            self._say(done.broken)
        elif done.made is not None:
            self._said = ""
            self._led, self._round_s = (began, done.made.generation), done.seconds
            self._trace.event(
                "parity",
                step=done.made.step,
                generation=done.made.generation,
                seconds=round(done.seconds, 6),
                bytes=done.bytes,
                engine=best_engine().value,
            )
            # What a round costs the others they have for themselves as long again.
            self._ended.wait(done.seconds)

    # In idle time.

    def _scrub_if_due(self) -> None:
        kept, now = self._holder.kept(), time.monotonic()
        if kept is None:
            return
        round_, due = self._scrubbed
        if round_ != kept.round:
            self._scrubbed = kept.round, now + SCRUB_AFTER_S
        elif now >= due:
            self._scrubbed = kept.round, now + SCRUB_EVERY_S
            self.scrub(kept)

    def scrub(self, kept: StripeSet) -> None:
        """Check this node's parts and shards of a round, and put right what is wrong. Blocks.

        Raises:
          FtkitError: it could not be done; nothing is worse than before.
        """
        peers, round_ = self._peers(), kept.round
        told = {"step": round_.step, "node": self._node}
        head = fetch_head(peers, _holding(kept), self._node)
        if missing := missing_parts(self._arenas.directory, head, self._node):
            arenas = [kept.parts[self._node][n].arena for n in missing]
            pace = self._make_pace(lambda: self._holder.is_whole(round_))
            try:
                mend(self._arenas.directory, head, self._node, missing, peers, pace, in_place=True)
            except FtkitError:
                self._trace.event("scrub", **told, arenas=arenas, mended=False)
                raise
            self._trace.event("scrub", **told, arenas=arenas, mended=True)
        try:
            wrong = scrub(self._holder, kept)
        except ShardLost as error:
            # Its own node's scrub makes up for that; ours has nothing to compare with.
            self._trace.event("scrub", **told, shard=list(error.place), reason=str(error))
            return
        if not wrong:
            return
        self._holder.replace(kept)
        for found in wrong:
            reason = "it rotted" if found.rotted else "it was computed wrongly"
            self._trace.event(
                "scrub", **told, shard=list(found.place), at=found.at, reason=reason, mended=True
            )

    # Shared.

    def _peers(self) -> Peers:
        with self._lock:
            return Peers(dict(self._stores), self._lines)

    def _is_forming(self, plan: Plan) -> bool:
        with self._lock:
            return self._plan.mode is Mode.FORMING and self._plan.halted == plan.halted

    def _say(self, reason: str) -> None:
        """Tell that something went wrong, once while it is the same."""
        if reason != self._said:
            self._said = reason
            self._trace.event("parity-failed", reason=reason)


def _holding(stripes: StripeSet) -> Holding:
    return Holding(round=stripes.round, groups=stripes.groups, m=stripes.code.m)
