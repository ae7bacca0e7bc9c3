"""Drills of jobs that lose all memory, with their checkpoints whole, or one of them rotten.

What is begun from must be the newest checkpoint that is whole, and the damaged one must be named.
"""

import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from ftkit.core.trace import Trace
from ftkit.launch.checker import Outcome, with_more
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail

#: Every node at once, with all that is in memory.
ALL_NODES: Final = "all-nodes"

CATALOGUE: Final[Mapping[str, str]] = {
    ALL_NODES: "SIGKILL to every node's agent and ranks, shared memory gone: on from a checkpoint",
}

#: `bit-flip --at` this.
CHECKPOINT: Final = "checkpoint"
#: Checkpoints that are due in the job, and those that there must be before one rots.
CHECKPOINTS, BEFORE = 10, 2


class RotStriker:
    """Loses all nodes, perhaps with a bit flipped in the newest checkpoint. Polled while it runs."""

    def __init__(
        self, *, seed: int, nodes: int, steps: int, run_dir: Path, rots: bool = True
    ) -> None:
        """Prepare; what the job is told is in `settings`. Without `rots` no bit flips."""
        self._rots = rots
        self._seed, self._nodes, self._run_dir = seed, nodes, run_dir
        self._folder = run_dir / "checkpoints"
        self._tail = EventTail(run_dir)
        self._written: list[int] = []
        self._ranks: dict[int, int] = {}
        """The member in each seat."""
        self._done = False
        self.settings: dict[str, Any] = {
            "checkpoint_dir": str(self._folder),
            "checkpoint_every": max(1, steps // CHECKPOINTS),
            "checkpoint_keep": "",
        }
        """Fields of the JobConfig."""

    def poll(self, engine: Engine) -> None:
        """Strike once there is another one to fall back on."""
        if self._done:
            return
        for event in self._tail.poll():
            if event["kind"] == "checkpoint":
                self._written.append(event["step"])
            elif event["kind"] == "spawn":
                self._ranks[event["seat"]] = event["member"]
        if len(self._written) < BEFORE:
            return
        self._done = True
        step = max(self._written)
        told: dict[str, Any] = {"fault": ALL_NODES, "phase": "any", "step": step}
        if self._rots:
            path = flip(self._folder / f"step-{step}", random.Random(self._seed))
            name = str(path.relative_to(self._folder))
            told = {"fault": "bit-flip", "phase": CHECKPOINT, "step": step, "path": name}
        with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
            for seat, member in self._ranks.items():
                trace.event("drill", seat=seat, member=member, **told)
        for node in range(self._nodes):
            engine.kill_node(node)


def judge_all_nodes(outcome: Outcome, events: Iterable[Mapping[str, Any]]) -> Outcome:
    """The outcome with what must come of a job that has lost every node; pure.

    * A1 it goes on from the newest checkpoint that had been written.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    struck = next((e for e in ordered if e["kind"] == "drill"), None)
    if struck is None:
        return with_more(outcome, problems=[], missing=["fewer than two checkpoints were written"])
    at = float(struck["mono"])
    written = [
        int(e["step"]) for e in ordered if e["kind"] == "checkpoint" and float(e["mono"]) < at
    ]
    formed = [
        int(e["step"])
        for e in ordered
        if e["kind"] == "decision" and e["action"] == "form" and float(e["mono"]) > at
    ]
    problems = []
    if not formed or formed[0] < max(written, default=0):
        problems.append(f"the job went on from {formed[:1]}, and step {max(written)} was on disk")
    return with_more(outcome, problems=problems, missing=[], used=formed[0] if formed else None)


def flip(folder: Path, rng: random.Random) -> Path:
    """Flip one bit of one of the tensors' files in a checkpoint; returns which file."""
    files = sorted(p for p in (folder / "tensors").rglob("c*") if p.is_file())
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return path


def judge(outcome: Outcome, events: Iterable[Mapping[str, Any]]) -> Outcome:
    """The outcome with what must be said of a checkpoint that rots; pure.

    * K1 the damaged checkpoint is passed over, with its step and the reason;
    * K2 the job goes on from the newest whole one before it;
    * K3 that one, and no other, is passed over.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    struck = next((e for e in ordered if e["kind"] == "drill"), None)
    if struck is None:
        return with_more(outcome, problems=[], missing=["fewer than two checkpoints were written"])
    rotten, at = int(struck["step"]), float(struck["mono"])
    good = [
        int(e["step"])
        for e in ordered
        if e["kind"] == "checkpoint" and e["step"] != rotten and float(e["mono"]) < at
    ]
    skipped = [e for e in ordered if e["kind"] == "checkpoint-skipped" and "damaged" in e["reason"]]
    formed = [
        int(e["step"])
        for e in ordered
        if e["kind"] == "decision" and e["action"] == "form" and float(e["mono"]) > at
    ]
    problems = []
    if {e["step"] for e in skipped} != {rotten}:
        problems.append(
            f"the checkpoint of step {rotten} rotted, and those of {[e['step'] for e in skipped]} "
            "were said to be damaged"
        )
    if not formed or formed[0] != max(good, default=0):
        problems.append(f"the job went on from {formed[:1]}, not from step {max(good, default=0)}")
    return with_more(
        outcome,
        problems=problems,
        missing=[],
        rotten=rotten,
        used=formed[0] if formed else None,
        said=[e["reason"] for e in skipped],
    )
