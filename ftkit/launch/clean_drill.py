"""The drill in which nothing is wrong and much goes on: nobody may be accused of anything.

While the job trains, one rank evaluates and the others wait for it, checkpoints are written, another
process keeps a core busy, and a node is taken away with notice and comes back.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from ftkit.core.trace import Trace
from ftkit.launch.checker import Outcome, with_more
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail

CLEAN: Final = "clean"

#: Steps between two evaluations, and between two checkpoints: they do not coincide.
EVAL_EVERY, CHECKPOINT_EVERY = 25, 40
#: From this step on a core is busy.
BUSY_FROM = 30
#: The bundled job evaluates; while a seat is empty its steps take longer, so that it lasts.
WORKLOAD_OPTIONS: Final = ("--eval-every", str(EVAL_EVERY), "--short-handed-s", "0.15")


class CleanStriker:
    """Brings about what is no fault. Polled while the job runs."""

    def __init__(self, *, node: int, nproc: int, steps: int, run_dir: Path) -> None:
        """Take away `node`, which has `nproc` ranks, after a third of the job's `steps`."""
        self._node, self._run_dir = node, run_dir
        self._seats = range(node * nproc, (node + 1) * nproc)
        self._tail = EventTail(run_dir)
        self._step, self._resized_from = 0, max(BUSY_FROM, steps // 3)
        self.busy: subprocess.Popen[bytes] | None = None
        """What keeps a core busy, once it does."""
        self._resized = False
        self.settings: dict[str, Any] = {
            "checkpoint_dir": str(run_dir / "checkpoints"),
            "checkpoint_every": CHECKPOINT_EVERY,
        }
        """What the job is told."""

    def poll(self, engine: Engine) -> None:
        """Do what is due at the step that the job has reached."""
        commits = [e["step"] for e in self._tail.poll() if e["kind"] == "commit"]
        self._step = max([self._step, *commits])
        if self.busy is None and self._step >= BUSY_FROM:
            self.busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        if not self._resized and self._step >= self._resized_from:
            self._resized = True
            with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
                for seat in self._seats:
                    trace.event("drill", fault=CLEAN, phase="any", seat=seat, step=self._step)
            engine.drain_node(self._node)

    def close(self) -> None:
        """End the busy process."""
        if self.busy is not None:
            self.busy.kill()
            self.busy.wait()


def judge_clean(
    outcome: Outcome, events: Iterable[Mapping[str, Any]], *, accusing: frozenset[str]
) -> Outcome:
    """The outcome with what must hold where nothing is wrong; pure.

    * C1 nobody is accused;
    * C2 nobody is put out: there is no halt;
    * C3 all of it happened: an evaluation, a checkpoint, a node that left and was back.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    said = {(str(e["fault"]), int(e["seat"])) for e in ordered if e["kind"] == "verdict"}
    problems = [
        f"seat {e['seat']} was accused: {e['reason']}"
        for e in ordered
        if e["kind"] == "verdict" and e["fault"] in accusing
    ]
    problems += [f"a halt: {e.get('reason', '')}" for e in ordered if e["kind"] == "halt"]
    missing = [
        f"there was no {what}"
        for what in ("evaluation", "checkpoint")
        if not any(e["kind"] == what for e in ordered)
    ]
    taken = {e["seat"]: float(e["mono"]) for e in ordered if e["kind"] == "drill"}
    left = {e["seat"]: float(e["mono"]) for e in ordered if e["kind"] == "left"}
    back = {
        e["seat"]
        for e in ordered
        if e["kind"] == "commit" and float(e["mono"]) > left.get(e["seat"], float("inf"))
    }
    if not taken:
        missing.append("no node was taken away")
    missing += [f"seat {seat} did not leave" for seat in sorted(taken.keys() - left.keys())]
    missing += [f"seat {s} was not back" for s in sorted(taken.keys() & left.keys() - back)]
    return with_more(outcome, problems=problems, missing=missing, said=sorted(said))
