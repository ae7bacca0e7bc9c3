"""Drills of the disk: an agent that dies as it writes a checkpoint, a disk that is full, or slow.

What the ranks did is judged as in any drill; here is what the disk holds: every checkpoint that
was ever committed must be whole, to the last byte, right after the fault and at the end.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftkit.core.errors import IntegrityError
from ftkit.core.verdict import Fault
from ftkit.launch.checker import Outcome, with_more
from ftkit.launch.faulty_store import StoreFault, StoreFaultKind

#: Checkpoints that are due in the course of a drill's job.
CHECKPOINTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class OnDisk:
    """What a root of checkpoints holds at one moment."""

    good: tuple[int, ...]
    damaged: Mapping[int, str]

    @classmethod
    def read(cls, folder: Path) -> "OnDisk":
        """Read every byte of every committed checkpoint. Blocks."""
        # Imported here: whoever only chooses a drill needs no pyarrow.
        from ftkit.checkpoint.persist.checkpoint import load, steps
        from ftkit.checkpoint.persist.local_store import LocalStore

        store, good, damaged = LocalStore(folder), list[int](), dict[int, str]()
        for step in steps(store):
            try:
                load(store, step).verify()
                good.append(step)
            except FileNotFoundError:
                continue  # not committed: not a checkpoint
            except IntegrityError as error:
                damaged[step] = str(error)
        return cls(good=tuple(good), damaged=damaged)


@dataclass(slots=True)
class Witness:
    """Looks at the disk right after the fault, before anybody tidies up."""

    run_dir: Path
    seen: OnDisk | None = field(default=None)

    @property
    def folder(self) -> Path:
        """Where the drill's job keeps its checkpoints. None is ever removed."""
        return self.run_dir / "checkpoints"

    def poll(self) -> None:
        """Look once the fault has struck. Called while the job runs."""
        if self.seen is None and any((self.run_dir / "events").glob("drill-store-*.jsonl")):
            self.seen = OnDisk.read(self.folder)

    def settings(self, fault: StoreFault, steps: int) -> dict[str, Any]:
        """What the job is told: where to write, how often, and what goes wrong."""
        return {
            "checkpoint_dir": str(self.folder),
            "checkpoint_every": max(1, steps // CHECKPOINTS),
            "checkpoint_keep": "",
            "env": fault.to_environ(),
        }

    def judge(self, outcome: Outcome, events: Iterable[Mapping[str, Any]], *, seat: int) -> Outcome:
        """Add what the disk says to what the checker said of the ranks; the fault was `seat`'s."""
        return judge(outcome, list(events), self.seen, OnDisk.read(self.folder), seat=seat)


def judge(
    outcome: Outcome,
    events: Sequence[Mapping[str, Any]],
    at_fault: OnDisk | None,
    at_end: OnDisk,
    *,
    seat: int = 0,
) -> Outcome:
    """The outcome with the rules of the disk added; pure.

    * D1 no committed checkpoint is damaged, right after the fault or at the end;
    * D2 what was committed before the fault is still there after it;
    * D3 a checkpoint that could not be written was reported, with the reason;
    * D4 of a slow disk it is said whose it is and where, of no other, and no checkpoint is given up.
    """
    struck = [e for e in events if e["kind"] == "drill"]
    failed = [e for e in events if e["kind"] == "checkpoint-failed"]
    problems, missing = list[str](), list[str]()
    for when, held in (("after the fault", at_fault), ("at the end", at_end)):
        if held is None:
            missing.append(f"the disk was not looked at {when}")
            continue
        problems += [f"step {s} is damaged {when}: {why}" for s, why in held.damaged.items()]
        done = {
            int(e["step"])
            for e in events
            if e["kind"] == "checkpoint" and (struck and e["mono"] < struck[0]["mono"])
        }
        if gone := sorted(done - set(held.good)):
            problems.append(f"steps {gone} were committed before the fault and are gone {when}")
    more: dict[str, Any] = {}
    if outcome.fault == StoreFaultKind.SLOW:
        slow = [e for e in events if e["kind"] == "verdict" and e["fault"] == Fault.SLOW_IO]
        problems += [f"it is said of seat {e['seat']}, too" for e in slow if e["seat"] != seat]
        if struck and not (mine := [e for e in slow if e["seat"] == seat]):
            problems.append(f"nobody says that the disk of seat {seat}'s node is slow")
        elif struck:
            more = {"named_s": mine[0]["mono"] - struck[0]["mono"], "said": mine[0]["reason"]}
            if not mine[0]["evidence"]["path"]:
                problems.append("it is not said which storage")
    elif struck and not failed:
        problems.append("the checkpoint that was hit was not reported")
    if outcome.fault == StoreFaultKind.FULL and not any("is full" in e["reason"] for e in failed):
        problems.append("no report says that the disk was full")
    return with_more(
        outcome,
        problems=problems,
        missing=missing,
        checkpoints=list(at_end.good),
        checkpoints_after_fault=None if at_fault is None else list(at_fault.good),
        failures=[e["reason"] for e in failed],
        **more,
    )
