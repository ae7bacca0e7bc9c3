"""Drills of the detectors themselves: what watches is stopped, or fed garbage. Does the job go on?

Nobody may lose its place, nobody may be accused, and the detectors must say of whom they know nothing
while they do not. That a killed coordinator is replaced is a drill of its own (`kill-coordinator`).
"""

import os
import random
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import psutil

from ftkit.core.errors import UsageError
from ftkit.core.trace import Trace
from ftkit.core.verdict import EVICT, Fault
from ftkit.detection.status import BOARD, identity_offset
from ftkit.launch import processes
from ftkit.launch.arenas import OWNER
from ftkit.launch.checker import Outcome, with_more
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail

DETECTOR_FAULTS: Final = "detector-faults"

#: What is struck: `--at`.
AGENT, ROW, COORDINATOR = "agent", "row", "coordinator"

CATALOGUE: Final[Mapping[str, str]] = {
    DETECTOR_FAULTS: "a detector is stopped for some seconds, or reads garbage (--at): it must say so",
}

#: For how long, where a member is blind after a quarter of `MAX_STALL_S`, and after 15 s nobody hears
#: a coordinator.
AWAY_S: Final = {AGENT: 4.0, ROW: 4.0, COORDINATOR: 17.0}
MAX_STALL_S: Final = 8.0
#: A step of the bundled job takes at least so long in each slot.
DEVICE_S: Final = 0.03

#: Accusations. Flapping is none here: an agent that stands still does come and go.
_ACCUSING: Final = frozenset({*EVICT, Fault.SLOW, Fault.SDC, Fault.NUMERIC, Fault.DESYNC})


def choose_place(at: str | None, *, seed: int, nproc: int) -> str:
    """What is struck. The seed picks among those that are quick.

    Raises:
      UsageError: there is no such place, or the job is too small.
    """
    if at is not None and at not in AWAY_S:
        raise UsageError(f"{DETECTOR_FAULTS} strikes at {', '.join(AWAY_S)}, not at {at!r}")
    if nproc < 2:
        raise UsageError(f"{DETECTOR_FAULTS} needs --nproc 2 or more: others go on meanwhile")
    return at or random.Random(f"detector {seed}").choice([AGENT, ROW])


class DetectorStriker:
    """Does it to the node of `seat` once the job has committed a step. One rank a node."""

    def __init__(self, place: str, *, seat: int, step: int, run_dir: Path, shm: Path) -> None:
        """Prepare; `shm` is the node's folder of shared memory."""
        self._place, self._step, self._run_dir, self._shm = place, step, run_dir, shm
        self._tail = EventTail(run_dir)
        self._until: float | None = None
        self._pid = 0
        self._done = False

    def poll(self, engine: Engine) -> None:
        """Strike, and put it right again, when it is time. Called while the job runs."""
        if self._done:
            return
        if self._until is None:
            if not any(
                e["kind"] == "commit" and e["step"] >= self._step for e in self._tail.poll()
            ):
                return
            with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
                trace.event("drill", fault=DETECTOR_FAULTS, phase=self._place, step=self._step)
            self._until = time.monotonic() + AWAY_S[self._place]
            self._strike(back=False)
        elif time.monotonic() >= self._until:
            self._done = True
            self._strike(back=True)

    def close(self) -> None:
        """Leave nobody stopped."""
        if self._until is not None and not self._done:
            self._strike(back=True)

    def _strike(self, *, back: bool) -> None:
        if self._place == ROW:
            try:
                _falsify(self._shm / BOARD)  # once more makes it what it was
            except FileNotFoundError:
                pass  # the job has ended
            return
        if not back:
            self._pid = _agent(self._shm) if self._place == AGENT else _coordinator()
        try:
            os.kill(self._pid, signal.SIGCONT if back else signal.SIGSTOP)
        except ProcessLookupError:
            pass  # the job has ended


def _agent(shm: Path) -> int:
    return int((shm / OWNER).read_text().split()[0])


def _coordinator() -> int:
    """The coordinator of the embedded engine in this process. UsageError when there is none."""
    for child in psutil.Process().children():
        words = child.cmdline()
        if processes.__name__ in words and "coordinator" in words:
            return child.pid
    raise UsageError(f"{DETECTOR_FAULTS} --at {COORDINATOR} needs --engine embedded")


def _falsify(board: Path) -> None:
    """Flip the bits that say whose the first row is: no reader takes it for a whole one then."""
    with board.open("r+b") as file:
        file.seek(identity_offset(0))
        word = file.read(8)
        file.seek(identity_offset(0))
        file.write(bytes(byte ^ 0xFF for byte in word))


def judge(
    outcome: Outcome, events: Iterable[Mapping[str, Any]], *, place: str, seat: int
) -> Outcome:
    """The outcome with what detectors must say of themselves; pure.

    * B1 it is said who is not seen (`blind`), and that it is over (`sighted`);
    * B2 training went on in between;
    * B3 nobody was accused, and there was no halt.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    struck = next((float(e["mono"]) for e in ordered if e["kind"] == "drill"), None)
    if struck is None:
        return with_more(outcome, problems=[], missing=["the drill did not strike"])
    what = "coordinator" if place == COORDINATOR else "members"
    after = [e for e in ordered if float(e["mono"]) >= struck]
    blind = next((e for e in after if e["kind"] == "blind" and e["what"] == what), None)
    problems = [
        f"seat {e['seat']} was accused: {e['reason']}"
        for e in ordered
        if e["kind"] == "verdict" and e["fault"] in _ACCUSING
    ]
    problems += [f"a halt: {e.get('reason', '')}" for e in ordered if e["kind"] == "halt"]
    if blind is None:
        problems.append(f"nobody said that nothing is known of the {what}")
        return with_more(outcome, problems=problems, missing=[])
    # The first member of a seat has its number.
    if what == "members" and blind["members"] != [seat]:
        problems.append(f"members {blind['members']} were said not to be seen, not {[seat]}")
    over = [e for e in after if e["kind"] == "sighted" and e["mono"] > blind["mono"]]
    if not over:
        problems.append("it was never said to be over")
    end = float(over[0]["mono"]) if over else float(ordered[-1]["mono"])
    going = [e for e in after if e["kind"] == "commit" and struck < float(e["mono"]) < end]
    if not going:
        problems.append("nobody trained while they were blind")
    return with_more(
        outcome,
        problems=problems,
        missing=[],
        blind_s=float(blind["mono"]) - struck,
        steps_meanwhile=len({e["step"] for e in going}),
    )
