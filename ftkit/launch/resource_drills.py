"""Drills of what surrounds the ranks: clocks, nodes that come and go, offenders, memory.

None of them takes a rank away, and the job must end with the same bits; what is checked is that it
is said, of the right node, once, and of no other.
"""

import os
import random
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftkit.core.errors import UsageError
from ftkit.core.pace_plan import PaceFault, PacePlan, to_environ
from ftkit.core.trace import Trace
from ftkit.core.verdict import Fault
from ftkit.core.wall_clock import VARIABLE as CLOCK
from ftkit.detection.offenders import DAY_S
from ftkit.launch.arenas import OWNER
from ftkit.launch.checker import Outcome, with_more
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail
from ftkit.launch.history import History
from ftkit.launch.resources import LEFT

CLOCK_SKEW, FLAPPING, OFFENDER = "clock-skew", "flapping", "offender"
LEAK = PaceFault.LEAK.value

CATALOGUE: dict[str, str] = {
    CLOCK_SKEW: "one node's wall clock is off by some hundred milliseconds, or by seconds",
    FLAPPING: "one node's agent stands still for three seconds, three times",
    OFFENDER: "one node has failed again and again in earlier jobs",
    LEAK: "one rank takes some MB of memory a second, and its node has a few hundred left",
}

SAYS: dict[str, Fault] = {
    CLOCK_SKEW: Fault.CLOCK,
    FLAPPING: Fault.FLAPPING,
    OFFENDER: Fault.OFFENDER,
    LEAK: Fault.LEAK,
}

#: Said of a host that is busy with other things, whatever the drill does.
LABELS = frozenset({Fault.STARVED, Fault.IMBALANCE, Fault.DATA_STALL, Fault.GC_STALL})

#: A leak of so many bytes a second, on a node that has so many left.
LEAK_BPS, LEFT_BYTES = 24 << 20, 480 << 20
#: What a slot of the bundled job takes at least, so that there is time to see it grow.
LEAK_DEVICE_S = 0.04
#: How far the time to out of memory may be off.
OOM_OFF = 0.25

#: A node's agent stands still so long, so often, with so much in between.
AWAY_S, TIMES, BACK_S = 3.0, 3, 1.5


def check(fault: str, nproc: int, at: str | None) -> None:
    """UsageError unless such a drill can be done."""
    if at is not None:
        raise UsageError(f"{fault} strikes outside the ranks: it takes no --at")
    if nproc < 2:
        raise UsageError(f"{fault} needs --nproc 2 or more: it is one node among others")


class ResourceStriker:
    """Does it to one node, `seat`'s, once the job has committed a step. One rank a node."""

    def __init__(
        self, fault: str, *, seat: int, step: int, seed: int, nodes: int, run_dir: Path, shm: Path
    ) -> None:
        """Prepare; what the job is told is in `settings`.

        Args:
          fault: one of the catalogue.
          seat: whose node.
          step: after which step.
          seed: decides the rest.
          nodes: of the job.
          run_dir: of the job.
          shm: the node's folder of shared memory, which says who its agent is.
        """
        self._fault, self._seat, self._step = fault, seat, step
        self._run_dir, self._shm = run_dir, shm
        self._tail = EventTail(run_dir)
        self._began = False
        self._agent: int | None = None
        self._moves: list[tuple[float, signal.Signals]] = []
        self.settings: dict[str, Any] = {}
        """Fields of the JobConfig."""
        rng = random.Random(f"{fault} {seed}")
        if fault == CLOCK_SKEW:
            ahead_s = rng.choice([-5.0, -0.2, 0.2, 5.0])
            self.settings = {"env": {CLOCK: f"{seat}:{ahead_s}"}}
        elif fault == LEAK:
            # The first member of a seat has its number.
            plan = PacePlan(
                fault=PaceFault.LEAK, member=seat, step=step, bytes_per_s=float(LEAK_BPS)
            )
            self.settings = {"env": {**to_environ(plan), LEFT: str(LEFT_BYTES)}}
            self._began = True  # the rank does it, and says so
        elif fault == OFFENDER:
            path = run_dir.parent / f"{run_dir.name}-history.jsonl"
            _write_history(path, f"{socket.gethostname()}/{seat}", nodes)
            self.settings = {"history": str(path)}

    def poll(self, engine: Engine) -> None:
        """Strike, and go on striking, when it is time. Called while the job runs."""
        if not self._began:
            if not any(
                e["kind"] == "commit" and e["step"] >= self._step for e in self._tail.poll()
            ):
                return
            self._began = True
            with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
                trace.event("drill", fault=self._fault, phase="any", step=self._step)
            if self._fault == FLAPPING:
                self._agent = int((self._shm / OWNER).read_text().split()[0])
                now = time.monotonic()
                for i in range(TIMES):
                    away = now + i * (AWAY_S + BACK_S)
                    self._moves += [(away, signal.SIGSTOP), (away + AWAY_S, signal.SIGCONT)]
        while self._moves and time.monotonic() >= self._moves[0][0]:
            self._signal(self._moves.pop(0)[1])

    def close(self) -> None:
        """Leave nobody stopped."""
        if self._agent is not None and self._moves:
            self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._agent is not None, "it is known who is struck"
        try:
            os.kill(self._agent, number)
        except ProcessLookupError:
            self._moves.clear()  # the job has ended


def _write_history(path: Path, bad: str, nodes: int) -> None:
    """Jobs of the last two months, on thirty nodes of which one failed every other day."""
    history, now = History(str(path), "earlier"), time.time()
    host = socket.gethostname()
    names = [f"{host}/{i}" for i in range(max(nodes, 30))]
    history.append("job", at=now - 60 * DAY_S, chain="earlier", nodes=names)
    for i in range(8):
        history.append("fault", at=now - (20 - 2 * i) * DAY_S, node=bad, fault="node-lost")
    history.append("end", at=now - DAY_S, code=0, trained=True)


def judge(outcome: Outcome, events: Iterable[Mapping[str, Any]], seat: int) -> Outcome:
    """The outcome with what must be said of a node; pure.

    * E1 the verdict is said of the node of `seat`, once;
    * E2 no verdict of this kind is said of another, and no other verdict, but for labels;
    * E3 of a leak the time to out of memory is about right.
    """
    due = SAYS[outcome.fault]
    said = [e for e in events if e["kind"] == "verdict" and e["fault"] not in LABELS]
    right = [e for e in said if (e["fault"], e["seat"]) == (due, seat)]
    if due is Fault.LEAK:
        # To take memory takes time: who leaks may well be the slower for it.
        said = [e for e in said if (e["fault"], e["seat"]) != (Fault.SLOW, seat)]
    problems = [
        f"seat {e['seat']} is said to be {e['fault']}: {e['reason']}"
        for e in said
        if e not in right
    ]
    if len(right) != 1:
        problems.append(f"{due} was said {len(right)} times of seat {seat}, not once")
    if due is Fault.LEAK and right:
        true_s, told_s = LEFT_BYTES / LEAK_BPS, right[0]["evidence"]["oom_s"][1]
        if abs(told_s / true_s - 1) > OOM_OFF:
            problems.append(f"it was to be out of memory in {true_s:.0f} s, and {told_s} were told")
    return with_more(outcome, problems=problems, missing=[], said=[e["reason"] for e in right])
