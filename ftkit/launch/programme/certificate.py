"""Certificate: what a cluster has survived, when, and how fast, from its histories. Pure.

Nothing is claimed beyond what was seen: shares come with their interval, drills whose outcome is not
known count as not survived, and times are those of drills that were survived.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ftkit.core.samples import quantile, wilson
from ftkit.launch.programme.record import DrillRecord, Survival, without_figures

#: Of fewer times the slowest is their 95th percentile.
P95_MIN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What drills were done to."""

    world: int
    nodes: int
    engine: str
    versions: tuple[tuple[str, str], ...]
    drills: int

    def to_json(self) -> dict[str, object]:
        return {
            "world": self.world, "nodes": self.nodes, "engine": self.engine,
            "versions": dict(self.versions), "drills": self.drills,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Of seconds."""

    count: int
    p50: float
    p95: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Quantiles | None":
        """Of those that are known; None: of none."""
        known = [v for v in values if v is not None]
        if not known:
            return None
        return cls(
            count=len(known),
            p50=quantile(known, 0.5),
            p95=quantile(known, 0.95),
            most=max(known),
        )

    def to_json(self) -> dict[str, object]:
        return {"count": self.count, "p50": self.p50, "p95": self.p95, "max": self.most}


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultSummary:
    """All drills of one fault."""

    fault: str
    struck: int
    survived: int
    failed: int
    unknown: int
    interval: tuple[float, float]
    """The 95 % interval of the share that is survived (Wilson 1927)."""
    detect_s: Quantiles | None
    next_step_s: Quantiles | None
    whole_s: Quantiles | None
    lost_s: float
    """Training time, all of them together, as far as it is known."""
    steps_replayed: int
    slots_lost: int
    first: float
    last: float
    """Unix time."""
    jobs: int
    settings: tuple[Setting, ...]
    failures: tuple[tuple[float, str], ...]
    """When, and why, of all that are not survived."""

    def to_json(self) -> dict[str, object]:
        def told(q: Quantiles | None) -> object:
            return None if q is None else q.to_json()

        return {
            "fault": self.fault, "struck": self.struck, "survived": self.survived,
            "failed": self.failed, "unknown": self.unknown, "interval": list(self.interval),
            "detect_s": told(self.detect_s), "next_step_s": told(self.next_step_s),
            "whole_s": told(self.whole_s), "lost_s": self.lost_s,
            "steps_replayed": self.steps_replayed, "slots_lost": self.slots_lost,
            "first": self.first, "last": self.last, "jobs": self.jobs,
            "settings": [s.to_json() for s in self.settings],
            "failures": [{"at": at, "reason": why} for at, why in self.failures],
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """All of it."""

    faults: tuple[FaultSummary, ...]
    skipped: int
    """Intervals in which the guards forbade a drill."""
    skips: tuple[tuple[str, int], ...]
    """Why, the most frequent first."""
    nodes: tuple[str, ...]
    """Machines that were struck, by name."""

    def to_json(self) -> dict[str, object]:
        return {
            "drills": [fault.to_json() for fault in self.faults],
            "skipped": self.skipped,
            "skips": [{"reason": reason, "count": count} for reason, count in self.skips],
            "nodes": list(self.nodes),
        }


def certify(records: Iterable[DrillRecord]) -> Certificate:
    """The certificate of these drills. One that stands in two histories counts once."""
    every = {(r.job, r.at, r.fault, r.outcome): r for r in records}
    ordered = sorted(every.values(), key=lambda r: r.at)
    struck = [r for r in ordered if r.struck]
    skipped = Counter(without_figures(r.reason)[:120] for r in ordered if not r.struck)
    return Certificate(
        faults=tuple(
            _summary(fault, [r for r in struck if r.fault == fault])
            for fault in sorted({r.fault for r in struck})
        ),
        skipped=skipped.total(),
        skips=tuple(skipped.most_common()),
        nodes=tuple(sorted({r.node for r in struck if r.node})),
    )


def _summary(fault: str, drills: Sequence[DrillRecord]) -> FaultSummary:
    good = [r for r in drills if r.survived]
    counts = Counter(r.outcome for r in drills)
    settings = Counter(
        (r.world, r.nodes, r.engine, tuple(sorted(r.versions.items()))) for r in drills
    )
    return FaultSummary(
        fault=fault,
        struck=len(drills),
        survived=len(good),
        failed=counts[Survival.FAILED],
        unknown=counts[Survival.UNKNOWN],
        interval=wilson(len(good), len(drills)),
        detect_s=Quantiles.of(r.detect_s for r in good),
        next_step_s=Quantiles.of(r.next_step_s for r in good),
        whole_s=Quantiles.of(r.whole_s for r in good),
        lost_s=sum(r.lost_s or 0.0 for r in drills),
        steps_replayed=sum(r.steps_replayed or 0 for r in drills),
        slots_lost=sum(r.slots_lost or 0 for r in drills),
        first=drills[0].at,
        last=drills[-1].at,
        jobs=len({r.job for r in drills}),
        settings=tuple(
            Setting(world=world, nodes=nodes, engine=engine, versions=versions, drills=count)
            for (world, nodes, engine, versions), count in sorted(settings.items())
        ),
        failures=tuple((r.at, f"{r.outcome}: {r.reason}") for r in drills if not r.survived),
    )
