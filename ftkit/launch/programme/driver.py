"""Driver: carries out what the machine says, and tells it what was seen. Judges nothing.

It reads and asks, and has agents strike; the job needs nothing of it, and goes on if it ends.
"""

import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ftkit.core import exit_codes
from ftkit.launch.coordinator import read_result
from ftkit.launch.drill_access import NAME, DrillAccess
from ftkit.launch.event_tail import EventTail
from ftkit.launch.programme import record
from ftkit.launch.programme.job_state import JobState
from ftkit.launch.programme.machine import (
    Command,
    End,
    Look,
    Note,
    Options,
    Seen,
    State,
    Strike,
    Wait,
    Watch,
    advance,
    begin,
)
from ftkit.launch.programme.measure import (
    Measured,
    WorldWatch,
    measure,
    on_one_clock,
    outcome_of,
    seen_enough,
)
from ftkit.launch.programme.record import DrillRecord, StrikeFigures, Survival
from ftkit.launch.programme.remote import Remote
from ftkit.launch.programme.schedule import number_at
from ftkit.launch.programme.targets import Target
from ftkit.launch.report_history import COMPLETED

#: Between two looks for the stop switch and the end of the job, while nothing is due.
IDLE_S = 1.0
#: Between two looks at a job that is to be struck.
LOOK_S = 0.5
#: The same once it has been forbidden for some minutes.
LOOK_MOST_S = 10.0
#: Between two readings of the events of a job that was struck.
WATCH_S = 0.25
#: Events from before a strike that are kept for each rank: votes, commits and snapshots of some steps.
KEPT = 100


class Driver:
    """One programme. `run` is its life, on the thread that calls it."""

    def __init__(
        self,
        run_dir: Path,
        access: DrillAccess,
        options: Options,
        *,
        history: Path,
        stop_files: tuple[Path, ...],
        limit_s: float,
        patience_s: float,
        say: Callable[[str], None],
        noted: Callable[[DrillRecord], None],
    ) -> None:
        """Prepare; reach nobody.

        Args:
          run_dir: the job's.
          access: as the job left it there.
          options: the programme.
          history: where drills are kept; made when the first is done.
          stop_files: any of them stops the programme.
          limit_s: the longest that is waited for the world to be whole.
          patience_s: of a single drill: how long the guards may take to allow it.
          say: told what happens, in sentences.
          noted: told of each record, once it is in the history.
        """
        self._run_dir, self._access, self._options = run_dir, access, options
        self._history_path, self._stop_files = history, stop_files
        self._limit_s, self._patience_s = limit_s, patience_s
        self._say, self._noted = say, noted
        self._history: tuple[DrillRecord, ...] = ()
        self._remote = Remote(run_dir, access)
        self._job: JobState | None = None
        """As it stood when it was looked at last."""
        self._looking = False
        """Whether the job is looked at, or was struck: then `_tail` and `_events` are of now."""
        self._heard_at = time.monotonic()
        """When an agent answered last."""
        self._tail = EventTail(run_dir, from_now=True)
        self._events: list[dict[str, Any]] = []
        """From a few steps before the strike on; until then the newest."""
        self._watch: WorldWatch | None = None
        self._struck_at: float | None = None
        """On this process's monotonic clock; None: nothing is being watched."""
        self._told = ""

    def run(self) -> State:
        """Carry the programme out. Blocks.

        Returns:
          The last state: its `code` is the exit code, its `reason` the last word.

        Raises:
          StoreError: the history cannot be read or written.
          KeyboardInterrupt: somebody wants to go; a strike that is being watched is noted first.
        """
        if strange := self._read_history():
            self._say(f"{strange} lines of {self._history_path} are no drills: passed over")
        state = begin(
            self._options, time.time(), patience_s=self._patience_s, done=self._done_interval()
        )
        seen = self._seen()
        try:
            while True:
                state, command = advance(state, seen, self._options)
                seen = self._carry_out(state, command)
                if isinstance(command, End):
                    return state
        except KeyboardInterrupt:
            if self._struck_at is not None and state.target is not None:
                self._remote.release(state.target)
                reason = "the programme was interrupted before the world was whole"
                target, interval = state.target, state.interval
                self._note(Note(target.fault, Survival.UNKNOWN, reason, interval, target))
            raise
        finally:
            self._remote.close()

    def _carry_out(self, state: State, command: Command) -> Seen:
        """Do it, and see what there is to be seen then."""
        match command:
            case Wait(until):
                self._tell(f"the next drill is due at {_clock(until)}")
                time.sleep(min(IDLE_S, max(0.0, until - time.time())))
            case Look():
                if state.refused:
                    self._tell(f"not yet: {state.refused}")
                    refused_s = time.time() - state.interval.due
                    time.sleep(min(LOOK_MOST_S, max(LOOK_S, refused_s / 20)))
                return self._look()
            case Strike(target):
                self._tell(f"{target.words}, at step {self._committed}")
                return replace(self._seen(), answer=self._strike(target))
            case Watch():
                assert state.target is not None, "it was struck"
                time.sleep(WATCH_S)
                return replace(self._seen(), outcome=self._watched(state.target))
            case Note():
                self._note(command)
            case End():
                pass
        return self._seen()

    def _seen(self) -> Seen:
        stopped = [str(path) for path in self._stop_files if path.exists()]
        return Seen(
            now=time.time(),
            stopped=f"{stopped[0]} is there" if stopped else "",
            job_over=self._job_over(),
            history=self._history,
        )

    def _job_over(self) -> str:
        stop = read_result(self._run_dir)
        if stop is not None:
            return f"the job is over: {stop.reason}"
        if not (self._run_dir / NAME).exists():
            return "the job is over"
        unheard_s = time.monotonic() - self._heard_at
        if self._looking and self._struck_at is None and unheard_s > self._limit_s:
            return f"no agent of the job has answered for {unheard_s:.0f} s"
        return ""

    def _look(self) -> Seen:
        """How the job stands, and whether steps are seen."""
        if not self._looking:
            self._looking, self._heard_at = True, time.monotonic()
            self._read_history()  # other programmes spend of the same budget
            self._tail = EventTail(self._run_dir, from_now=True)
        self._job = job = self._remote.look()
        if job.nodes:
            self._heard_at = time.monotonic()
        self._events = (self._events + self._tail.poll())[-KEPT * max(1, job.seats) :]
        world = [m.member for m in job.world]
        paced = bool(world) and seen_enough(self._events, world)
        return replace(self._seen(), job=job, paced=paced)

    @property
    def _committed(self) -> int:
        return 0 if self._job is None else self._job.committed

    def _strike(self, target: Target) -> str:
        """Have it struck. Returns why it was not; empty when it was."""
        self._watch = WorldWatch(target, self._access.seats)
        self._watch.feed(self._events)
        # Before it is asked for: who is interrupted meanwhile has to take it for struck.
        self._struck_at = time.monotonic()
        refused = self._remote.strike(target)
        if refused:
            self._struck_at, self._watch = None, None
        return refused

    def _watched(self, target: Target) -> tuple[Survival, str] | None:
        """What came of the strike, once it is known."""
        assert self._watch is not None and self._struck_at is not None, "it was struck"  # noqa: PT018
        new = self._tail.poll()
        self._events += new
        self._watch.feed(new)
        waited_s = time.monotonic() - self._struck_at
        over = self._job_over()
        if not (self._watch.whole or self._watch.ended or over or waited_s > self._limit_s):
            return None
        # What others had written by then: each reads its file a little earlier or later.
        self._events += self._tail.poll()
        found = self._measured(target)
        if over and not found.ended:
            stop = read_result(self._run_dir)
            ended = COMPLETED if stop is not None and stop.code == 0 else over
            by_hand = stop is not None and stop.code == exit_codes.INTERRUPTED
            found = replace(found, ended=ended, by_hand=by_hand)
        outcome = outcome_of(found, waited_s=waited_s, limit_s=self._limit_s)
        if outcome is not None and outcome[0] is not Survival.SURVIVED:
            self._remote.release(target)
        return outcome

    def _measured(self, target: Target) -> Measured:
        events = on_one_clock(self._events, one_host=self._remote.one_host)
        return measure(events, target, self._access.seats)

    def _note(self, note: Note) -> None:
        """Write a record of a strike, or of an interval without one."""
        job, target = self._job, note.target
        now = time.time()
        told = DrillRecord(
            at=now,
            job=self._access.job,
            fault=note.fault,
            outcome=note.outcome,
            reason=note.reason,
            world=self._access.seats,
            nodes=self._access.nodes,
            engine=self._access.engine,
            step=self._committed,
            seed=self._options.seed,
            interval=None if self._options.every_s is None else note.interval.number,
            versions={} if job is None else job.versions,
        )
        if target is not None:
            found = self._measured(target)
            assert self._struck_at is not None, "it was struck"
            told = replace(
                told,
                at=found.at or now - (time.monotonic() - self._struck_at),
                node="" if job is None else job.nodes[target.node].name,
                seats=tuple(target.seats),
                **_figures(replace(found, step=found.step or told.step)),
                others_lost=len(found.others),
            )
        try:
            record.append(self._history_path, told)
        finally:
            # Where the disk is full it is told all the same.
            self._noted(told)
        self._history = (*self._history, told)
        self._struck_at, self._watch = None, None
        self._looking, self._events = False, []

    def _read_history(self) -> int:
        """Read what all programmes have done; returns how many lines are no drills. StoreError."""
        records, strange = record.read(self._history_path)
        self._history = tuple(records)
        return strange

    def _done_interval(self) -> int | None:
        """The newest interval in which this job was struck, by whatever programme."""
        if self._options.every_s is None:
            return None
        mine = [r.at for r in self._history if r.job == self._access.job and r.struck]
        return number_at(max(mine), every_s=self._options.every_s) if mine else None

    def _tell(self, words: str) -> None:
        """Say what is new: a reason that only differs in its figures is not."""
        kind = record.without_figures(words)
        if kind != self._told:
            self._told = kind
            self._say(words)


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _figures(found: StrikeFigures) -> dict[str, Any]:
    """The fields of a strike's figures, seconds to the microsecond."""
    values = {field.name: getattr(found, field.name) for field in fields(StrikeFigures)}
    return {n: round(max(0.0, v), 6) if isinstance(v, float) else v for n, v in values.items()}
