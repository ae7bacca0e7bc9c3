"""Where the time of a run's snapshots and checkpoints went, from its events (pure)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

Event = Mapping[str, Any]

#: What the writing of a checkpoint is made of, in order, and how to call it.
PARTS = {"codec_s": "codec", "write_s": "write", "fsync_s": "fsync", "commit_s": "commit"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageStory:
    """Sums over a run. Seconds and bytes."""

    snapshots: int
    snapshot_bytes: int
    blocked_s: float
    """What the training threads waited for captures, all ranks together."""
    blocked_median_s: float
    """The same of one snapshot of one rank."""
    checkpoints: tuple[int, ...]
    """The steps on disk, in order of time."""
    stored_bytes: int
    writing_s: float
    """From the order to the commit, of all checkpoints."""
    parts_s: Mapping[str, float]
    """Of the writing threads, by part."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Steps that were given up, and why."""
    skipped: tuple[int, ...] = ()
    """Steps that were due while an older one was still being written."""
    intervals: tuple[tuple[int, str], ...] = ()
    """Steps between two and the reason, as the job decided them one after another."""
    parity_intervals: tuple[tuple[float, str], ...] = ()
    """Seconds between the begins of two rounds of parity and the reason, likewise."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def paragraph(self) -> str:
        """The story for a person; empty when there is nothing to tell."""
        told = list[str]()
        if self.snapshots:
            each = self.snapshot_bytes / self.snapshots
            told.append(
                f"{self.snapshots} snapshots of {readable_size(each)} each went to memory; one held its "
                f"rank up for {self.blocked_median_s * 1e3:.2f} ms (median)."
            )
        if self.checkpoints:
            rate = self.stored_bytes / self.writing_s if self.writing_s else 0.0
            shares = ", ".join(f"{name} {self.parts_s[name]:.2f} s" for name in PARTS.values())
            told.append(
                f"{len(self.checkpoints)} checkpoints went to disk, the newest of step "
                f"{self.checkpoints[-1]}: {readable_size(self.stored_bytes)} in {self.writing_s:.2f} s, "
                f"{readable_size(rate)}/s ({shares})."
            )
        if self.intervals:
            told.append(_chosen("save", "steps", self.intervals))
        if self.parity_intervals:
            told.append(_chosen("make parity", "s", self.parity_intervals))
        for step, reason in self.failures.items():
            told.append(f"That of step {step} was given up: {reason.rstrip('.')}.")
        if self.skipped:
            told.append(
                f"{len(self.skipped)} were skipped, as an older one was still being written: "
                "the disk is slower than --checkpoint-every asks."
            )
        return " ".join(told)


def storage_story(events: Iterable[Event]) -> StorageStory:
    """Sum up a run. Events in order of time; kinds it does not know are passed over."""
    events = list(events)
    snapshots = [e for e in events if e["kind"] == "snapshot"]
    written = [e for e in events if e["kind"] == "checkpoint"]
    blocked = [float(e["begin_s"]) + float(e["gate_s"]) for e in snapshots]
    failed = {int(e["step"]): str(e["reason"]) for e in events if e["kind"] == "checkpoint-failed"}
    # A rank says so of its own; the coordinator's are damaged ones that were passed over.
    skipped = {int(e["step"]) for e in events if e["kind"] == "checkpoint-skipped" and "seat" in e}
    return StorageStory(
        snapshots=len(snapshots),
        snapshot_bytes=sum(int(e["bytes"]) for e in snapshots),
        blocked_s=sum(blocked),
        blocked_median_s=median(blocked) if blocked else 0.0,
        checkpoints=tuple(int(e["step"]) for e in written),
        stored_bytes=sum(int(e["stored_bytes"]) for e in written),
        writing_s=sum(float(e["seconds"]) for e in written),
        parts_s={name: sum(float(e[key]) for e in written) for key, name in PARTS.items()},
        failures=failed,
        skipped=tuple(sorted(skipped)),
        intervals=tuple(
            (int(e["every"]), str(e["reason"]))
            for e in events
            if e["kind"] == "checkpoint-interval"
        ),
        parity_intervals=tuple(
            (float(e["seconds"]), str(e["reason"]))
            for e in events
            if e["kind"] == "parity-interval"
        ),
    )


def _chosen(what: str, unit: str, intervals: Sequence[tuple[float, str]]) -> str:
    every, reason = intervals[-1]
    before = " → ".join(str(each) for each, _ in intervals[:-1])
    after = f", after {before} {unit}" if before else ""
    return f"The job chose to {what} every {every} {unit} ({reason}){after}."


def readable_size(count: float) -> str:
    """A number of bytes for people, in three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
