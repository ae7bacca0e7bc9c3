"""The interval of checkpoints that a job decides itself: by the model of `ftkit plan`, and steadily."""

from dataclasses import replace

import pytest

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Step
from ftkit.recovery.costs import Costs
from ftkit.recovery.failure_rate import FailureRate
from ftkit.recovery.intervals import tier_intervals
from ftkit.recovery.saving import HYSTERESIS, LONGEST_S, Saving, Schedule, decide

#: One failure in an hour of four ranks.
OFTEN = FailureRate(prior_mtbf_s=4 * 3600.0)
BLANK = Costs(world=4)
PACED = BLANK.with_measured(step_s={4: 0.5})
KNOWN = PACED.with_measured(checkpoint_block_s=2.0, checkpoint_write_s=10.0)


def begun(rate: FailureRate = OFTEN) -> Saving:
    first = decide(None, BLANK, rate, at=Step(0), margin=2)
    assert first is not None
    return first


def measured(costs: Costs = KNOWN, *, at: int = 500) -> Saving:
    found = decide(begun(), costs, OFTEN, at=Step(at), margin=4)
    assert found is not None
    return found


def test_it_is_the_interval_that_the_plan_prints() -> None:
    (planned,) = (i for i in tier_intervals(KNOWN, OFTEN) if i.name == "checkpoint")
    assert measured().schedule.every == planned.steps
    assert planned.reason in measured().reason


def test_the_first_says_what_it_assumes() -> None:
    first = begun()
    assert "assumed: a step of 1 s, 0.05 s held up by a save, 60 s of writing" in first.reason
    assert first.schedule.first == first.schedule.every


def test_once_the_pace_is_known_one_save_is_made_to_learn_what_it_costs() -> None:
    soon = decide(begun(), PACED, OFTEN, at=Step(40), margin=6)
    assert soon is not None
    assert soon.schedule.first == 46
    assert "one is made now" in soon.reason
    assert decide(soon, PACED, OFTEN, at=Step(50), margin=6) is None, "and not another"


def test_dear_saves_are_made_less_often_and_frequent_failures_more() -> None:
    dear = decide(
        measured(), KNOWN.with_measured(checkpoint_block_s=20.0), OFTEN, at=Step(600), margin=4
    )
    assert dear is not None
    assert dear.schedule.every > 2 * measured().schedule.every
    failing = decide(
        measured(), KNOWN, OFTEN.seen(failures=3, exposure_s=60.0), at=Step(600), margin=4
    )
    assert failing is not None
    assert failing.schedule.every < measured().schedule.every


def test_a_small_change_is_none() -> None:
    before = measured()
    # The interval goes with the root of the cost.
    for factor, moves in ((HYSTERESIS, False), (HYSTERESIS**3, True)):
        costs = KNOWN.with_measured(checkpoint_block_s=2.0 * factor)
        assert (decide(before, costs, OFTEN, at=Step(600), margin=4) is not None) is moves


def test_the_next_save_is_an_interval_after_the_last_and_never_sooner_than_all_can_hear() -> None:
    before = replace(begun(), schedule=Schedule(every=10_000, first=Step(10_000)), paced=True)
    (planned,) = (i for i in tier_intervals(KNOWN, OFTEN) if i.name == "checkpoint")
    soon = decide(before, KNOWN, OFTEN, at=Step(10_010), margin=4)
    assert soon is not None
    assert soon.schedule.first == 10_000 + planned.steps
    late = decide(before, KNOWN, OFTEN, at=Step(12_500), margin=4)
    assert late is not None
    assert late.schedule.first == 12_504


def test_however_rare_failures_are_an_hour_is_the_longest() -> None:
    never = FailureRate(prior_mtbf_s=1e15)
    found = decide(begun(), KNOWN, never, at=Step(500), margin=4)
    assert found is not None
    assert found.seconds == LONGEST_S
    assert "an hour apart at most" in found.reason
    # A write that takes longer still is not begun before it can be over.
    slow = KNOWN.with_measured(checkpoint_write_s=2 * LONGEST_S)
    assert measured(slow).seconds == 2 * LONGEST_S


def test_what_is_due_is_the_same_for_all_who_have_heard() -> None:
    schedule = Schedule(every=30, first=Step(100))
    assert [s for s in range(1, 170) if schedule.due(Step(s))] == [10, 40, 70, 100, 130, 160]
    assert schedule.last(Step(129)) == 100
    assert not any(Schedule(every=0).due(Step(s)) for s in range(50))
    assert [s for s in range(1, 61) if Schedule(every=20).due(Step(s))] == [20, 40, 60]


def test_a_schedule_travels_as_json() -> None:
    schedule = Schedule(every=30, first=Step(100))
    assert Schedule.from_json(schedule.to_json()) == schedule
    for strange in ({}, {"every": "x", "first": 1}, {"every": -1, "first": 0}, {"every": 1}):
        with pytest.raises(ProtocolError):
            Schedule.from_json(strange)
