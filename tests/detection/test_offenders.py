"""Who fails far more often than the fleet, and what leaving it out would have avoided."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Generation, MemberId, NodeId
from ftkit.core.verdict import Fault
from ftkit.detection.known_offenders import KnownOffenders
from ftkit.detection.observations import WorldChanged
from ftkit.detection.offender_replay import replay
from ftkit.detection.offenders import DAY_S, OffenderConfig, Offenders, upper_gamma
from ftkit.detection.signals import NodeScored, from_json, to_json
from tests.detection.scene import world

NODES = [f"n{i}" for i in range(500)]


def fleet(faults: list[tuple[float, str]], nodes: list[str] = NODES) -> Offenders:
    known = Offenders()
    for node in nodes:
        known.seen(node, 0.0)
    for at, node in sorted(faults):
        known.fault(node, at)
    return known


def chance(rate_per_day: float, days: int, seed: int = 0) -> list[tuple[float, str]]:
    """Faults that strike any node alike."""
    rng = random.Random(seed)
    count = round(len(NODES) * days * rate_per_day)
    return [(rng.uniform(0, days * DAY_S), rng.choice(NODES)) for _ in range(count)]


def test_the_tail_of_gamma_is_that_of_known_cases() -> None:
    assert upper_gamma(0.5, 1.0) == pytest.approx(math.erfc(1.0), rel=1e-12)
    assert upper_gamma(1.0, 3.0) == pytest.approx(math.exp(-3.0), rel=1e-12)
    assert upper_gamma(3.0, 2.0) == pytest.approx(5 * math.exp(-2.0), rel=1e-12)
    assert upper_gamma(2.0, 0.0) == 1.0


@given(st.floats(0.05, 50), st.floats(0.01, 100), st.floats(0.01, 10))
def test_it_is_a_tail(a: float, x: float, more: float) -> None:
    assert 0.0 <= upper_gamma(a, x + more) <= upper_gamma(a, x) <= 1.0
    assert upper_gamma(a + more, x) >= upper_gamma(a, x) - 1e-12


def test_who_fails_again_and_again_is_named_and_nobody_by_chance() -> None:
    lemon = [(90 * DAY_S + i * 3 * DAY_S, "n7") for i in range(6)]
    known = fleet(chance(0.002, 100) + lemon)
    worst, *rest = known.scores(106 * DAY_S)
    assert (worst.node, worst.offender) == ("n7", True)
    assert worst.rate_per_day > 10 * worst.fleet_per_day
    assert not any(score.offender for score in rest)
    for seed in range(5):
        faults = chance(0.002, 300, seed)
        assert replay(faults, NODES, OffenderConfig()).left_out_share <= 0.004


def test_it_is_forgotten_in_time() -> None:
    known = fleet(chance(0.002, 400) + [(10 * DAY_S + i * DAY_S, "n7") for i in range(4)])
    assert not known.score("n7", 400 * DAY_S).offender
    assert known.score("n7", 400 * DAY_S).faults >= 4


def test_two_faults_are_a_chance_and_a_small_fleet_names_its_lemon() -> None:
    assert not fleet([(DAY_S, "n1"), (2 * DAY_S, "n1")]).score("n1", 2 * DAY_S).offender
    small = [f"n{i}" for i in range(20)]
    known = fleet([(DAY_S * (20 + i), "n3") for i in range(6)], small)
    assert [s.node for s in known.scores(26 * DAY_S) if s.offender] == ["n3"]


def test_what_is_known_does_not_depend_on_when_it_is_asked() -> None:
    faults = chance(0.01, 50)
    plain, asked = fleet(faults), Offenders()
    for node in NODES:
        asked.seen(node, 0.0)
    for at, node in sorted(faults):
        asked.fault(node, at)
        asked.score(node, at)
    one, other = plain.score("n3", 60 * DAY_S), asked.score("n3", 60 * DAY_S)
    assert one.certainty == pytest.approx(other.certainty, rel=1e-9)
    assert one.fleet_per_day == pytest.approx(other.fleet_per_day, rel=1e-9)


def test_a_replay_counts_what_came_after_a_node_was_left_out() -> None:
    lemon = [(50 * DAY_S + i * DAY_S, "n7") for i in range(10)]
    done = replay(chance(0.001, 60) + lemon, NODES, OffenderConfig())
    assert done.left_out == ("n7",)
    assert 5 <= done.avoided <= 7
    assert done.avoided_share == done.avoided / done.faults
    assert replay([], NODES, OffenderConfig()).avoided_share == 0.0


@pytest.mark.parametrize("wrong", [{"half_life_s": 0.0}, {"factor": 0.5}, {"certainty": 1.0}])
def test_a_rule_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="no rule"):
        OffenderConfig(**wrong)  # type: ignore[arg-type]


def scored(node: int, *, offender: bool) -> NodeScored:
    return NodeScored(
        node=NodeId(node),
        name=f"host-{node}",
        at=5.0,
        faults=6,
        recent=4.5,
        rate_per_day=0.2,
        fleet_per_day=0.001,
        factor=10.0,
        certainty=0.99,
        offender=offender,
    )


def test_a_known_offender_in_the_job_is_advised_against() -> None:
    known = KnownOffenders()
    known.ingest(scored(1, offender=True))
    assert known.tick(6.0) == []
    known.ingest(scored(0, offender=False))
    known.ingest(scored(9, offender=True))
    known.ingest(WorldChanged(world=world(4), at=6.0))
    (verdict,) = known.tick(6.0)
    assert (verdict.fault, verdict.seat, verdict.member) == (Fault.OFFENDER, 2, MemberId(102))
    assert "host-1" in verdict.reason
    assert not verdict.evicts
    known.ingest(scored(1, offender=False))
    assert known.tick(7.0) == []
    assert world(4).generation == Generation(1)


def test_a_score_crosses_the_wire() -> None:
    one = scored(1, offender=True)
    assert from_json(to_json(one)) == one
