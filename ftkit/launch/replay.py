"""Replay: puts a recorded job before the detectors that judge a live one."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ftkit.core.ids import Generation, MemberId, NodeId
from ftkit.core.verdict import EVICT, Fault, Verdict
from ftkit.core.world import Member, World
from ftkit.detection.observations import WorldChanged
from ftkit.detection.panel import Panel
from ftkit.detection.signals import StepSeen
from ftkit.detection.step_detector import PaceConfig, StepDetector

#: Faults that say "it is this one". All others are reports in which nobody is accused.
ACCUSING = EVICT | {Fault.SLOW, Fault.SDC}


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A verdict, and when in the trace it was first said."""

    verdict: Verdict
    """As it stood last."""
    step: int
    """The last step that had been played."""
    steps: int
    """How many of the trace that were."""
    lasts: bool
    """Whether it still stood at the end."""


@dataclass(slots=True, kw_only=True)
class Replayed:
    """What the detectors said of a trace."""

    ranks: int
    steps: int
    said: list[Said] = field(default_factory=list)

    @property
    def accused(self) -> list[Said]:
        """Who was said to be at fault, in order of seats."""
        return sorted(
            (s for s in self.said if s.verdict.fault in ACCUSING), key=lambda s: s.verdict.seat
        )


def replay(steps: Sequence[StepSeen], config: PaceConfig) -> Replayed:
    """Judge `steps`, which are in order, as if they came in one by one. Pure."""
    detector = StepDetector(config)
    panel = Panel([detector])
    known: dict[tuple[MemberId, Fault], Said] = {}
    generation: Generation | None = None
    played: set[tuple[int, int]] = set()
    now = 0.0
    for i, seen in enumerate(steps):
        if seen.generation != generation:
            generation = seen.generation
            panel.ingest(WorldChanged(world=_world(steps, generation), at=seen.at))
        panel.ingest(seen)
        played.add((seen.generation, seen.step))
        now = max(now, seen.at)
        if i + 1 == len(steps):
            detector.flush()
        if i + 1 == len(steps) or steps[i + 1].step != seen.step:
            standing = panel.tick(now)
            for verdict in standing:
                key = (verdict.member, verdict.fault)
                before = known.get(key)
                known[key] = Said(
                    verdict=verdict,
                    step=before.step if before else int(seen.step),
                    steps=before.steps if before else len(played),
                    lasts=True,
                )
            stand = {(v.member, v.fault) for v in standing}
            for key, said in known.items():
                if key not in stand and said.lasts:
                    known[key] = Said(
                        verdict=said.verdict, step=said.step, steps=said.steps, lasts=False
                    )
    return Replayed(
        ranks=len({s.member for s in steps}), steps=len(played), said=list(known.values())
    )


def _world(steps: Sequence[StepSeen], generation: Generation) -> World:
    members = {s.member: s.seat for s in steps if s.generation == generation}
    return World.of(
        generation,
        [
            Member(member=member, seat=seat, node=NodeId(0), host="", port=0)
            for member, seat in members.items()
        ],
    )
