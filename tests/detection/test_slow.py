"""Who is slow: named, alone and soon. And who is not: never named."""

import math
import random
from typing import Any

import pytest

from ftkit.core.verdict import EVICT, Fault
from ftkit.detection.cusum import calibrate, steps_needed
from ftkit.detection.observations import WorldChanged
from ftkit.detection.step_detector import PaceConfig
from tests.detection.pace import FIRST, Pace, slow
from tests.detection.scene import world

PIPELINE: Any = {"size": 16, "stages": 4}


def delay(pace: Pace, seat: int, *, by: float) -> int | None:
    """Steps from when `seat` became slow until it was named; nobody else may be."""
    for n, standing in enumerate(pace.play(60, slow(seat, by=by)), 1):
        named = {int(v.seat) for v in standing if v.fault is Fault.SLOW}
        if named:
            assert named == {seat}
            return n
    return None


@pytest.mark.parametrize("by", [1.10, 1.2, 1.5, 2.0, 20.0])
@pytest.mark.parametrize("shape", [{"size": 8}, PIPELINE, {"size": 3}])
def test_on_a_quiet_job_ten_percent_is_found_in_five_steps(by, shape) -> None:
    pace = Pace(**shape)
    assert pace.ever(30) == set()
    found = delay(pace, 2, by=by)
    assert found is not None
    assert 3 <= found <= 5, "fewer than three steps are no evidence"


def test_the_verdict_says_by_how_much_and_against_whom() -> None:
    pace = Pace(**PIPELINE)
    (verdict,) = pace.last(12, slow(5, by=1.3))
    assert (verdict.fault, verdict.seat, verdict.member) == (Fault.SLOW, 5, FIRST + 5)
    assert verdict.evidence["factor"] == pytest.approx(1.3, rel=0.03)
    assert verdict.evidence["phase"] == "forward"
    assert (verdict.evidence["role"], verdict.evidence["place"]) == ("pp=1", "dp=1 pp=1")
    assert (verdict.evidence["against"], verdict.evidence["others"]) == ("peers", 3)
    assert verdict.evidence["alarms_per_day"] == 0.5
    assert "30 % longer" in verdict.reason or "29 % longer" in verdict.reason
    assert not verdict.evicts
    assert verdict.fault not in EVICT


def test_slow_from_its_first_step_is_found_as_well() -> None:
    assert Pace().ever(10, slow(3)) == {(Fault.SLOW, 3)}


def test_one_odd_step_or_two_is_no_evidence_whatever_they_are() -> None:
    pace = Pace()
    pace.last(20)
    odd = lambda seat, step: 1000.0 if seat == 1 and step % 12 in (0, 1) else 1.0
    assert pace.ever(120, odd) == set()


def test_a_ramp_is_found_on_the_way_up() -> None:
    pace = Pace()
    pace.last(20)
    for standing in pace.play(100, lambda seat, step: 1 + 0.005 * step * (seat == 4)):
        if standing:
            break
    (verdict,) = standing
    assert (verdict.fault, verdict.seat) == (Fault.SLOW, 4)
    assert verdict.evidence["factor"] == pytest.approx(1.1, abs=0.05)


def test_bursts_of_four_steps_are_found() -> None:
    pace = Pace()
    pace.last(20)
    bursts = lambda seat, step: 1.5 if seat == 6 and step % 10 < 4 else 1.0
    assert pace.ever(40, bursts) == {(Fault.SLOW, 6)}


def test_what_is_over_is_soon_taken_back() -> None:
    pace = Pace()
    assert pace.last(30, slow(1)) != []
    assert pace.last(10) == []


def test_two_slow_ones_are_both_named() -> None:
    assert Pace(8).ever(20, slow(1, 4)) == {(Fault.SLOW, 1), (Fault.SLOW, 4)}


def test_a_slow_one_inside_a_slow_group_is_named_alone() -> None:
    pace = Pace(**PIPELINE)
    heavy = lambda seat, step: 1.5 if seat % 4 == 1 else 1.0  # a stage with more to do
    assert {f for f, _ in pace.ever(30, heavy)} <= {Fault.IMBALANCE}
    both = lambda seat, step: heavy(seat, step) * (1.4 if seat == 5 else 1.0)
    assert {who for who in pace.ever(20, both) if who[0] is Fault.SLOW} == {(Fault.SLOW, 5)}


def test_who_waits_for_a_slow_one_is_a_victim() -> None:
    pace = Pace(**PIPELINE)
    waits = lambda seat, step: {"waited_s": 0.1 if seat == 0 else 5.0}
    assert pace.ever(20, slow(0, by=2.0), change=waits) == {(Fault.SLOW, 0)}


def test_work_is_compared_by_slot() -> None:
    # Three of six hold one slot more: twice the time, and nobody is slower.
    pace = Pace(6, slots=lambda seat: 1 + seat % 2)
    assert pace.ever(40) & {(Fault.SLOW, s) for s in range(6)} == set()
    assert pace.ever(20, slow(2)) >= {(Fault.SLOW, 2)}


def test_a_wide_field_has_a_last_one_who_is_no_outlier() -> None:
    # Members that differ for good, as on mixed machines: sigma 8 %.
    wide = [math.exp(0.08 * z) for z in (-1.4, -0.9, -0.5, -0.2, 0.0, 0.2, 0.5, 0.9, 1.4, 1.8)]
    assert Pace(10).ever(100, lambda seat, step: wide[seat]) == set()


def test_few_residuals_say_little_of_what_may_come() -> None:
    day = 2 * 2 * 86400 / 0.005 / 0.5  # rank-steps of two ranks with steps of 5 ms
    assert [steps_needed(n, day) for n in (6, 20, 64, 128, 4096)] == [9, 6, 4, 3, 3]
    assert steps_needed(10_000, 1.0) == 3
    quiet = calibrate([[0.0] * 10] * 2, effect=0.1, steps_between=day)
    assert quiet.steps == 6
    assert quiet.h == pytest.approx(6 * 0.5 * math.log(1.1))
    assert quiet.increment(9.9) == pytest.approx(quiet.h / 6)


class TestWithoutAMajority:
    def test_a_group_of_two_kinds_is_reported_and_nobody_named(self) -> None:
        kinds = lambda seat, step: 3.5 if seat % 2 else 1.0
        pace = Pace(10)
        assert pace.ever(100, kinds) == {(Fault.IMBALANCE, 0)}
        (verdict,) = pace.last(1, kinds)
        assert verdict.evidence["kind"] == "kinds"
        assert verdict.evidence["factor"] == pytest.approx(3.5, rel=0.05)

    def test_of_two_ranks_the_one_that_changed_is_named(self) -> None:
        pace = Pace(2)
        assert pace.ever(40) == set()
        assert pace.ever(20, slow(1)) == {(Fault.SLOW, 1)}

    def test_of_two_ranks_a_few_steps_of_some_milliseconds_are_a_moment(self) -> None:
        burst = slow(1, by=2.0)
        for quiet in (19, 24, 40, 200):
            pace = Pace(2, step_s=0.005)
            assert pace.ever(quiet) == set()
            assert pace.ever(12, burst) == set(), f"after {quiet} quiet steps"
            assert pace.ever(100) == set()
        # One that lasts is none.
        assert pace.ever(130, burst) == {(Fault.SLOW, 1)}

    @pytest.mark.parametrize("seed", range(3))
    def test_of_two_ranks_none_is_slow_for_what_else_runs_on_the_host(self, seed) -> None:
        rng = random.Random(seed)
        busy: dict[int, tuple[int, float]] = {}

        def factor(seat: int, step: int) -> float:
            left, by = busy.get(seat, (0, 1.0))
            if not left:
                left, by = (0, 1.0)
                if rng.random() < 0.005:
                    left, by = rng.randint(1, 12), rng.uniform(1.2, 4.0)
            busy[seat] = (max(0, left - 1), by)
            return by

        assert Pace(2, noise=0.02, seed=seed, step_s=0.005).ever(4000, factor) == set()

    def test_of_two_ranks_none_is_slow_because_the_other_became_faster(self) -> None:
        pace = Pace(2)
        pace.last(40)
        assert pace.ever(60, slow(1, by=0.6)) == set()

    def test_of_two_ranks_that_both_became_slower_none_is_named(self) -> None:
        pace = Pace(2)
        pace.last(40)
        assert pace.ever(60, slow(0, 1)) == set()

    def test_stages_of_one_rank_each_are_held_against_their_past(self) -> None:
        pace = Pace(4, stages=4)
        stages = lambda seat, step: 1.0 + 0.3 * seat
        assert {f for f, _ in pace.ever(40, stages)} <= {Fault.IMBALANCE}
        later = lambda seat, step: stages(seat, step) * (1.4 if seat == 2 else 1.0)
        assert (Fault.SLOW, 2) in pace.ever(20, later)

    def test_a_noisy_past_is_not_what_it_was_at_its_best(self) -> None:
        # In 16 steps it is known to a quarter of the noise; and who is a suspect for every high
        # step must not be held against its low ones.
        pace = Pace(4, stages=4, noise=0.2)
        assert pace.ever(600) == set()
        pasts = [past.level or 0.0 for past in pace.detector._own._pasts.values()]
        assert sum(pasts) / len(pasts) == pytest.approx(0.0, abs=0.02)

    def test_in_pairs_the_slower_one_of_the_pair_that_differs_is_named(self) -> None:
        assert Pace(8, stages=4).ever(20, slow(1, by=2.0)) == {(Fault.SLOW, 1)}

    def test_in_pairs_a_replica_with_more_to_do_is_not(self) -> None:
        replica = lambda seat, step: 1.3 if seat >= 4 else 1.0
        assert (Pace(8, stages=4)).ever(60, replica) == set()

    def test_alone_there_is_nobody_to_compare_with(self) -> None:
        assert Pace(1).ever(60, slow(0, since=30)) == set()


class TestNoise:
    @pytest.mark.parametrize("seed", range(4))
    def test_noise_alone_accuses_nobody(self, seed) -> None:
        faults = {f for f, _ in Pace(16, noise=0.11, seed=seed).ever(300)}
        assert faults <= {Fault.IMBALANCE}

    def test_twenty_percent_at_eleven_percent_noise(self) -> None:
        delays = []
        for seed in range(5):
            pace = Pace(32, noise=0.11, seed=seed)
            pace.last(60)
            delays.append(delay(pace, 3, by=1.2) or 99)
        assert sorted(delays)[2] <= 35

    def test_a_smaller_budget_takes_more_evidence(self) -> None:
        delays = []
        for alarms in (1e-9, 10.0):
            pace = Pace(32, noise=0.11, config=PaceConfig(alarms_per_day=alarms))
            pace.last(60)
            delays.append(delay(pace, 3, by=1.5) or 99)
        assert delays[0] > delays[1]

    def test_a_few_long_steps_are_no_longer_watch(self) -> None:
        # A day of such steps is over in nine of them: as many alarms a day would be one a minute
        # of a job that is told in milliseconds.
        said = [Pace(16, noise=0.11, seed=s, step_s=1e4).ever(60) for s in range(12)]
        assert {fault for found in said for fault, _ in found} <= {Fault.IMBALANCE}


class TestGaps:
    def test_members_and_steps_may_be_missing(self) -> None:
        pace = Pace(8)
        gaps = lambda seat, step: (seat + step) % 5 == 0 or seat == 7
        assert pace.ever(40, slow(2), missing=gaps) == {(Fault.SLOW, 2)}

    @pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0, 1e308, 5e-324])
    def test_durations_that_are_none_are_passed_over(self, bad) -> None:
        pace = Pace(8)
        spoilt = lambda seat, step: {"seconds": {"forward": bad}} if seat == 1 and step % 2 else {}
        assert pace.ever(60, slow(2), change=spoilt) == {(Fault.SLOW, 2)}

    def test_a_new_generation_warms_up_before_it_is_judged(self) -> None:
        pace = Pace(8)
        pace.last(20)
        pace.generation, pace.step = 2, 10  # rolled back
        pace.detector.ingest(WorldChanged(world=world(8, generation=2), at=pace.now))
        cold = lambda seat, step: 50.0 if seat == 3 and step < 2 else 1.0
        assert pace.ever(20, cold) == set()
        assert pace.ever(10, slow(5)) == {(Fault.SLOW, 5)}

    def test_who_has_left_is_forgotten(self) -> None:
        pace = Pace(8)
        assert pace.last(20, slow(7)) != []
        pace.detector.ingest(WorldChanged(world=world(7, generation=2), at=pace.now))
        assert pace.detector.tick(pace.now) == []

    def test_rows_that_come_late_or_twice_change_nothing(self) -> None:
        pace = Pace(4)
        pace.last(10)
        before = pace.detector.steps
        pace.detector.ingest(pace.seen(0, 1000.0))
        pace.step -= 3
        pace.detector.ingest(pace.seen(0, 1000.0))
        pace.detector.flush()
        assert pace.detector.steps == before


class TestTheHost:
    def test_who_waits_for_a_core_is_starved_and_not_slow(self) -> None:
        pace = Pace(8)
        pace.last(20)
        starved = lambda seat, step: {"starved_s": 0.96} if seat == 2 else {}
        found = pace.ever(30, slow(2, by=1.5), change=starved)
        assert found == {(Fault.STARVED, 2)}
        (verdict,) = pace.last(1, slow(2, by=1.5), change=starved)
        assert "waits for a core" in verdict.reason

    def test_who_is_slow_and_a_little_starved_is_slow(self) -> None:
        pace = Pace(8)
        pace.last(20)
        starved = lambda seat, step: {"starved_s": 0.2} if seat == 2 else {}
        assert pace.ever(30, slow(2, by=2.0), change=starved) == {(Fault.SLOW, 2)}

    def test_who_is_a_little_slow_on_cores_that_it_shares_is_not_accused(self) -> None:
        # What runs on the other half of a core makes its work longer, and no clock tells.
        pace = Pace(8)
        pace.last(20)
        shared = lambda seat, step: {"starved_s": 0.2} if seat == 2 else {}
        assert pace.ever(40, slow(2, by=1.3), change=shared) == {(Fault.STARVED, 2)}
        (verdict,) = pace.last(1, slow(2, by=1.3), change=shared)
        assert "cores that it shares" in verdict.reason

    def test_who_is_slow_by_far_on_cores_that_all_share_is_slow(self) -> None:
        # Three ranks on two cores: all of them wait now and then, and that explains no 40 %.
        pace = Pace(3)
        pace.last(30)
        shared = lambda seat, step: {"starved_s": 0.2}
        assert pace.ever(40, slow(2, by=1.4), change=shared) == {(Fault.SLOW, 2)}

    @pytest.mark.parametrize(("by", "at_last"), [(1.4, Fault.SLOW), (1.25, Fault.STARVED)])
    def test_who_was_found_slow_is_so_until_sharing_explains_the_rest(
        self, by: float, at_last: Fault
    ) -> None:
        # What is left, without the time for which it has no core: 30 %, and 15 %.
        pace = Pace(8)
        pace.last(30, slow(2, by=1.6))
        shared = lambda seat, step: {"starved_s": 0.2} if seat == 2 else {}
        (verdict,) = pace.last(120, slow(2, by=by), change=shared)
        assert verdict.fault is at_last

    def test_who_is_slow_is_not_called_starved_and_slow_by_turns(self) -> None:
        pace = Pace(8)
        pace.last(30, slow(2, by=2.0))
        # For a while the host, too, keeps it waiting: in two steps of three it has no core for the rest.
        starved = lambda seat, step: {"starved_s": 1.96 if seat == 2 and step % 3 else 0.0}
        played = pace.play(40, slow(2, by=2.0), change=starved)
        called = [next((v.fault for v in standing), None) for standing in played]
        turns = [one for i, one in enumerate(called) if i == 0 or one is not called[i - 1]]
        assert turns == [Fault.SLOW]

    def test_a_busy_host_on_which_all_are_starved_accuses_nobody(self) -> None:
        pace = Pace(4, noise=0.05)
        starved = lambda seat, step: {"starved_s": 1.0}
        assert pace.ever(80, slow(0, 1, 2, 3, by=2.0), change=starved) == set()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"effect": 0.0}, "effect"),
        ({"alarms_per_day": 0}, "alarms"),
        ({"steps_excluded": -1}, "-1"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(change, text) -> None:
    with pytest.raises(ValueError, match=text):
        PaceConfig(**change)
