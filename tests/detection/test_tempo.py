"""What is usual for a job: its 99.9th percentile of standing still, phase by phase."""

import pytest

from ftkit.detection.row import Phase
from ftkit.detection.tempo import STEPS_MAX, STEPS_MIN, Tempo


def test_there_is_no_tempo_before_some_steps() -> None:
    tempo = Tempo()
    tempo.note(Phase.FORWARD, 3.0)
    tempo.advance(STEPS_MIN - 1)
    assert tempo.usual_s(Phase.FORWARD) is None
    tempo.advance(1)
    assert tempo.usual_s(Phase.FORWARD) == pytest.approx(3.0, rel=0.1)


def test_each_phase_has_its_own() -> None:
    tempo = Tempo()
    tempo.advance(100)
    tempo.note(Phase.CAPTURE, 20.0)
    assert tempo.usual_s(Phase.FORWARD) == 0.0
    usual = tempo.usual_s(Phase.CAPTURE)
    assert usual is not None
    assert 20.0 <= usual <= 22.0


def test_one_in_a_thousand_is_not_usual_and_two_are() -> None:
    tempo = Tempo()
    tempo.advance(1000)
    tempo.note(Phase.FORWARD, 9.0)
    assert tempo.usual_s(Phase.FORWARD) == 0.0
    tempo.note(Phase.FORWARD, 9.0)
    assert tempo.usual_s(Phase.FORWARD) == pytest.approx(9.0, rel=0.1)


def test_long_gaps_count_even_when_they_are_most_of_them() -> None:
    tempo = Tempo()
    for _ in range(50):
        tempo.advance(1)
        tempo.note(Phase.FORWARD, 60.0)
    assert tempo.usual_s(Phase.FORWARD) == pytest.approx(60.0, rel=0.1)


def test_a_job_that_changed_is_learnt_anew() -> None:
    tempo = Tempo()
    for _ in range(30):
        tempo.note(Phase.FORWARD, 30.0)
    for _ in range(6 * STEPS_MAX // 100):
        tempo.advance(100)
    assert tempo.usual_s(Phase.FORWARD) == 0.0
