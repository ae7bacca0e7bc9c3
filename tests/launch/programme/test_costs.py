"""What drills cost, and what the next one is taken to cost."""

from ftkit.launch.programme.costs import expected_s, prior, spent_s
from ftkit.launch.programme.record import Survival
from tests.launch.programme.jobs import drill

PRIOR = 60.0


def test_what_was_never_seen_costs_the_prior_and_few_drills_do_not_change_that() -> None:
    assert expected_s([], "kill", prior_s=PRIOR) == PRIOR == prior(30)
    few = [drill(n, lost_s=1.0) for n in range(18)]
    assert expected_s(few, "kill", prior_s=PRIOR) == PRIOR
    assert expected_s([*few, drill(18, lost_s=1.5)], "kill", prior_s=PRIOR) == 1.5


def test_a_dear_one_is_remembered_at_once() -> None:
    assert expected_s([drill(0, lost_s=200.0)], "kill", prior_s=PRIOR) == 200


def test_other_faults_and_intervals_without_a_drill_say_nothing() -> None:
    others = [drill(n, "stop", lost_s=1.0) for n in range(40)]
    skipped = [drill(n, outcome=Survival.SKIPPED, lost_s=None) for n in range(40)]
    assert expected_s([*others, *skipped], "kill", prior_s=PRIOR) == PRIOR


def test_what_was_not_seen_to_its_end_costs_the_prior_at_least() -> None:
    cheap = [drill(n, lost_s=1.0) for n in range(40)]
    bad = [drill(50 + n, outcome=Survival.FAILED, lost_s=2.0) for n in range(3)]
    assert expected_s(cheap, "kill", prior_s=PRIOR) == 1.0
    assert expected_s([*cheap, *bad], "kill", prior_s=PRIOR) == PRIOR


def test_spent_is_of_this_job_and_of_the_window() -> None:
    records = [
        drill(10, lost_s=5.0),
        drill(20, lost_s=7.0),
        drill(30, job="another", lost_s=100.0),
        drill(40, outcome=Survival.SKIPPED, lost_s=None),
        drill(50, outcome=Survival.UNKNOWN, lost_s=None),
    ]
    assert spent_s(records, "j", since=0, prior_s=PRIOR) == 5 + 7 + PRIOR
    assert spent_s(records, "j", since=15, prior_s=PRIOR) == 7 + PRIOR
    assert spent_s(records, "j", since=51, prior_s=PRIOR) == 0
