"""Roster: the ranks of one node, as its agent knows them: processes, facts, and lines to them."""

import logging
import signal
from collections.abc import Callable, Container, Iterable, Mapping, MutableSequence
from pathlib import Path
from typing import Any

from ftkit.core.clock import Clock
from ftkit.core.errors import WireError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.lifeline_watch import LifelineWatch
from ftkit.core.trace import Trace
from ftkit.core.wire import Line
from ftkit.detection import obituary
from ftkit.detection.exits import out_of_memory
from ftkit.launch.arenas import Arenas
from ftkit.launch.config import JobConfig
from ftkit.launch.examiner import Patient
from ftkit.launch.memory_watch import MemoryWatch
from ftkit.launch.metrics import Metrics
from ftkit.launch.ranks import RankProcess, Starter
from ftkit.recovery.facts import ALIVE, Allowed, MemberFacts, Stage
from ftkit.recovery.plan import Assignment

logger = logging.getLogger(__name__)


class Roster:
    """See the module. The agent's thread owns it; `send` may be called from any."""

    def __init__(
        self,
        config: JobConfig,
        node: NodeId,
        arenas: Arenas,
        metrics: Metrics,
        trace: Trace,
        clock: Clock,
        *,
        signals: MutableSequence[dict[str, object]],
        put: Callable[[str, Any], None],
        changed: Callable[[], None],
    ) -> None:
        """Begin with nobody.

        Args:
          config: the job.
          node: whose ranks these are.
          arenas: where they stand, and leave their last words.
          metrics: counts starts and exits.
          trace: told of them.
          clock: the agent's.
          signals: takes the last steps of those that ended.
          put: told ("exits", (member, code)) and ("exit", member), from other threads.
          changed: called at each change of `facts`.
        """
        self.facts: dict[MemberId, MemberFacts] = {}
        """Of all that ever ran here."""
        self.halted_at = float("-inf")
        """When a rank was halted last."""
        self.memory = MemoryWatch(clock.now())
        self._config = config
        self._node = node
        self._arenas = arenas
        self._metrics = metrics
        self._trace = trace
        self._clock = clock
        self._signals = signals
        self._put = put
        self._changed = changed
        self._processes: dict[MemberId, RankProcess] = {}
        self._lines: dict[MemberId, Line] = {}
        self._lifelines = LifelineWatch()
        self._killed: set[MemberId] = set()

    # Processes.

    def start(self, seat: Assignment, env: Mapping[str, str], starter: Starter) -> None:
        """Start the member of a seat; if that cannot be done, it is dead."""
        member = seat.member
        log = None
        if self._config.rank_logs:
            log = Path(self._config.run_dir) / "logs" / f"seat-{seat.seat}.log"
        base = MemberFacts(member=member, seat=seat.seat, node=self._node, stage=Stage.STARTING)
        try:
            rank = RankProcess(
                member,
                seat.seat,
                self._config.command,
                env,
                cwd=self._config.cwd or None,
                log=log,
                on_exit=lambda m: self._put("exit", m),
                start=starter,
            )
        except OSError as error:
            self._set(base, stage=Stage.DEAD, exit_code=127, error=str(error))
            return
        self._processes[member] = rank
        self._set(base, pid=rank.pid)
        self._trace.event("spawn", seat=seat.seat, member=member, pid=rank.pid)
        self._metrics.add("ftkit_rank_starts_total", rank=seat.seat)

    @property
    def started(self) -> bool:
        """Whether any rank ever ran here."""
        return bool(self._processes)

    @property
    def all_ended(self) -> bool:
        """Whether no rank runs, though one may still hold memory."""
        return all(rank.exit_code is not None for rank in self._processes.values())

    @property
    def all_gone(self) -> bool:
        """Whether no process of a rank is left."""
        return all(rank.gone for rank in self._processes.values())

    def vacant(self, seat: Seat) -> bool:
        """Whether whoever had the seat here is gone, with its devices and its memory."""
        return all(rank.gone for rank in self._processes.values() if rank.seat == seat)

    def exits(self, member: MemberId, code: int | None) -> bool:
        """A rank was killed, and is freeing its memory, which may take seconds. True if it is news.

        Whoever ends in good order has nobody waiting for that news.
        """
        rank = self._processes.get(member)
        if rank is None or rank.exit_code is not None or not code:
            return False
        rank.begins_to_exit(code)
        self._ended(member)
        return True

    def gone(self, member: MemberId) -> None:
        """The process of a rank is gone."""
        if self.facts[member].stage in (Stage.DEAD, Stage.FINISHED):
            self._trace.event("freed", seat=self._processes[member].seat, member=member)
        else:
            self._ended(member)

    def evict(self, members: Mapping[MemberId, str]) -> None:
        """Kill those that still run, for the reasons given."""
        for member, reason in members.items():
            rank = self._processes.get(member)
            if rank is not None and rank.exit_code is None:
                self._trace.event("kill", seat=rank.seat, member=member, reason=reason)
                self._killed.add(member)
                rank.signal(signal.SIGKILL)

    def drilled(self, members: Iterable[MemberId]) -> None:
        """A drill is about to strike them: what becomes of them is nobody's fault."""
        for member in members:
            self._set(self.facts[member], drilled=True)

    def send_signal(self, member: MemberId, number: signal.Signals) -> None:
        """(drills) Send a signal as somebody else would: nothing is noted."""
        self._processes[member].signal(number)

    def wake_drilled(self, member: MemberId) -> None:
        """SIGCONT to one that a drill has stopped, if it still runs: what follows is no drill's."""
        facts = self.facts.get(member)
        if facts is not None and facts.drilled and facts.stage in ALIVE:
            self.send_signal(member, signal.SIGCONT)
            self._set(facts, drilled=False)

    def ask_to_end(self) -> None:
        """SIGTERM to all."""
        for rank in self._processes.values():
            # A stopped process would not see the request.
            rank.signal(signal.SIGTERM)
            rank.signal(signal.SIGCONT)

    def kill(self, stages: Container[Stage] | None = None) -> None:
        """SIGKILL to all, or to those in one of these stages."""
        for member, rank in self._processes.items():
            if stages is not None and self.facts[member].stage not in stages:
                continue
            self._killed.add(member)
            rank.signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill all, and hang up. Twice is fine."""
        self.kill()
        for line in self._lines.values():
            line.close()
        self._lifelines.close()

    def _ended(self, member: MemberId) -> None:
        rank, facts = self._processes[member], self.facts[member]
        code = rank.exit_code
        exit_code = code if code is not None and code >= 0 else None
        killed_by = -code if code is not None and code < 0 else None
        self._trace.event(
            "exit", seat=rank.seat, member=member, code=exit_code, signal=killed_by
        )  # fmt: skip
        if code != 0:
            self._metrics.add("ftkit_rank_exits_total", rank=rank.seat)
        left = obituary.read(self._arenas.directory, member)
        last_words = "" if code == 0 else rank.last_words()
        if line := self._lines.pop(member, None):
            line.close()
        # Its last row and steps outlive it; the rows of the dead are not reported again.
        self._signals.extend(self._arenas.steps([facts]))
        rows = self._arenas.rows([facts])
        self._set(
            facts,
            stage=Stage.FINISHED if code == 0 else Stage.DEAD,
            at_step=Step(rows[0]["row"]["step"]) if rows else facts.at_step,
            exit_code=code,
            error=last_words or (str(left) if left else ""),
            ours=member in self._killed,
            out_of_memory=out_of_memory(
                code=exit_code,
                killed_by=killed_by,
                ours=member in self._killed,
                kills=self.memory.kills(self._clock.now()),
                said=str(left) if left else last_words,
            ),
        )

    # What they say, and what they are told.

    def connected(self, member: MemberId, line: Line) -> bool:
        """A process says that it is `member`; False when that is none of ours."""
        rank = self._processes.get(member)
        if rank is None or rank.exit_code is not None:
            logger.warning("member %s said hello and is not one of ours: refused", member)
            line.close()
            return False
        self._lines[member] = line
        # A script may be started by another program, whose end is the rank's.
        if line.hello.get("pid") == rank.pid:
            self._lifelines.watch(
                line.hello.get("lifeline"), lambda code: self._put("exits", (member, code))
            )
        return True

    def listens(self, facts: MemberFacts, message: Mapping[str, Any]) -> None:
        """(message "hello") Where others reach the rank. KeyError, TypeError, ValueError."""
        self._set(facts, host=str(message["host"]), port=int(message["port"]))

    def stands(self, facts: MemberFacts, message: Mapping[str, Any]) -> None:
        """(message "standing") How far it is. KeyError, TypeError, ValueError."""
        step = None if message["step"] is None else Step(int(message["step"]))
        if message["stage"] == Stage.HALTED:
            self.halted_at = self._clock.now()
        self._set(
            facts,
            stage=Stage(message["stage"]),
            generation=Generation(int(message["generation"])),
            linked=Generation(int(message["linked"])),
            step=step,
            entry_step=step if facts.entry_step is None else facts.entry_step,
            voted=bool(message["voted"]),
            cut=frozenset(MemberId(int(m)) for m in message["cut"]),
            stepping=bool(message["stepping"]),
            sharded=bool(message["sharded"]),
            allowed=Allowed(message["allowed"]),
        )

    def send(self, member: MemberId, message: dict[str, object]) -> None:
        """Send to a rank, if it is still there."""
        line = self._lines.get(member)
        if line is None:
            return
        try:
            line.send(message)
        except WireError as error:
            logger.debug("member %s hung up: %s", member, error)

    def send_all(self, message: dict[str, object]) -> None:
        """Send to all that are connected."""
        for member in list(self._lines):
            self.send(member, message)

    # Looking at them.

    @property
    def alive(self) -> list[MemberFacts]:
        return [facts for facts in self.facts.values() if facts.stage in ALIVE]

    def of(self, member: MemberId) -> MemberFacts | None:
        """The facts of one that has not ended."""
        facts = self.facts.get(member)
        return None if facts is None or facts.stage in (Stage.DEAD, Stage.FINISHED) else facts

    def patients(self, wanted: Iterable[int]) -> list[Patient]:
        """Whom to look at: of a seat, the newest process and those that are asked for."""
        closely = set(wanted)
        newest = {f.seat: f.member for f in self.facts.values()}
        return [
            Patient(
                seat=f.seat,
                member=f.member,
                pid=f.pid,
                alive=f.stage in ALIVE,
                closely=f.member in closely,
            )
            for f in self.facts.values()
            if f.member in closely or newest[f.seat] == f.member
        ]

    def _set(self, facts: MemberFacts, **changes: Any) -> None:
        changed = MemberFacts(**{**{n: getattr(facts, n) for n in facts.__slots__}, **changes})
        self.facts[facts.member] = changed
        self._changed()
