"""Whatever a healthy job looks like nobody is slow; and the way reports come in changes nothing."""

import random
from dataclasses import replace

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.verdict import Fault
from ftkit.core.world import Member, World
from ftkit.detection.observations import WorldChanged
from ftkit.detection.signals import StepSeen
from ftkit.detection.step_detector import PaceConfig, StepDetector


def healthy(rng: random.Random, *, steps: int = 60) -> list[StepSeen]:
    """A job of random shape: roles differ for good, steps change in length for all together."""
    replicas, stages = rng.choice([1, 2, 3, 4, 6]), rng.choice([1, 2, 4])
    noise, common = rng.choice([0.002, 0.02, 0.1]), rng.choice([0.0, 0.1, 0.6])
    usual = [rng.uniform(0.5, 2.0) for _ in range(stages)]
    step_s, slots = 10 ** rng.uniform(-2, 2), rng.choice([1, 3])
    seen, now = [], 0.0
    for step in range(steps):
        length = step_s * rng.lognormvariate(0.0, common) * (4.0 if step % 20 == 19 else 1.0)
        now += length
        for seat in range(replicas * stages):
            work = length * usual[seat % stages] * rng.lognormvariate(0.0, noise)
            seen.append(
                StepSeen(
                    member=MemberId(seat),
                    seat=Seat(seat),
                    generation=Generation(1),
                    step=Step(step),
                    at=now,
                    seconds={"forward": 0.4 * work * slots, "backward": 0.6 * work * slots},
                    slots=slots,
                    role=f"pp={seat % stages}",
                )
            )
    return seen


def everybody(size: int) -> World:
    members = [
        Member(member=MemberId(i), seat=Seat(i), node=NodeId(0), host="", port=0)
        for i in range(size)
    ]
    return World.of(Generation(1), members)


@pytest.mark.parametrize("seed", range(24))
def test_a_healthy_job_of_any_shape_accuses_nobody(seed) -> None:
    detector = StepDetector(PaceConfig())
    for seen in healthy(random.Random(seed)):
        detector.ingest(seen)
        assert {v.fault for v in detector.tick(seen.at)} <= {Fault.IMBALANCE}


@pytest.mark.parametrize("seed", range(6))
def test_in_which_order_members_are_heard_changes_nothing(seed) -> None:
    rng = random.Random(seed)
    told = healthy(rng, steps=40)
    slow = rng.choice(told).member
    told = [
        replace(s, seconds={p: 2 * t for p, t in s.seconds.items()})
        if s.member == slow and s.step >= 20
        else s
        for s in told
    ]

    def said(order: list[StepSeen]) -> list[object]:
        detector = StepDetector(PaceConfig())
        detector.ingest(WorldChanged(world=everybody(len({s.member for s in told})), at=0.0))
        for seen in order:
            detector.ingest(seen)
        detector.flush()
        standing = sorted(detector.tick(told[-1].at), key=lambda v: (v.seat, v.fault))
        return [(v.fault, v.seat, dict(v.evidence)) for v in standing]

    # Some agents tell of a step only when others are in the one after the next.
    lag = {seen.member: rng.uniform(0.0, 1.9) for seen in told}
    late = sorted(told, key=lambda s: s.step + lag[s.member])
    assert late != told or len(lag) == 1
    assert said(late) == said(told)
