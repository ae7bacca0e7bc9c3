"""What is tried next: the same a little, then something else, then nothing."""

import pytest

from ftkit.recovery.ladder import Attempt, LadderConfig, Next, Rung, climb

KILLED = "exited at step 7"


def after(*failures: str, rung: Rung = Rung.IN_PROCESS, chance: float = 0.0) -> Next:
    return climb([Attempt(rung=rung, failure=f) for f in failures], chance=chance)


def test_the_first_attempt_is_made_at_once() -> None:
    assert climb([], chance=0.9) == Next(
        rung=Rung.IN_PROCESS, wait_s=0.0, reason="the first attempt"
    )


def test_after_two_equal_failures_something_changes() -> None:
    assert after(KILLED).rung is Rung.IN_PROCESS
    changed = after(KILLED, KILLED)
    assert changed.rung is Rung.NODE
    assert changed.reason == (
        f"in-process ended the same 2 times ({KILLED}); something has to change"
    )


def test_different_failures_are_tried_longer_and_not_for_ever() -> None:
    assert after("a", "b", "a").rung is Rung.IN_PROCESS
    assert after("a", "b", "a", "b").rung is Rung.NODE


def test_waits_double_up_to_a_limit_and_chance_shortens_them() -> None:
    failures = [str(i) for i in range(9)]
    waits = [climb([Attempt(rung=Rung.RESTART, failure=f) for f in failures[:k]], chance=0.0,
                   config=LadderConfig(tries_max=99)).wait_s for k in range(1, 9)]  # fmt: skip
    assert waits == [30, 60, 120, 240, 480, 660, 660, 660]
    assert after("x", chance=0.5).wait_s == pytest.approx(22.5)


def test_barred_rungs_are_stepped_over() -> None:
    failed = [Attempt(rung=Rung.RESTART, failure=KILLED)] * 2
    barred = frozenset({Rung.EXCLUDE})
    assert climb(failed, chance=0, barred=barred).rung is Rung.OLDER
    barred = frozenset({Rung.EXCLUDE, Rung.OLDER})
    stop = climb(failed, chance=0, barred=barred)
    assert (stop.rung, stop.wait_s) == (Rung.STOP, 0.0)


def test_the_ladder_ends_for_a_failure_that_never_changes() -> None:
    failed: list[Attempt] = []
    rungs = []
    while (step := climb(failed, chance=0.3)).rung is not Rung.STOP:
        rungs.append(step.rung)
        failed.append(Attempt(rung=step.rung, failure=KILLED))
        assert len(failed) < 50
    assert rungs == [r for r in Rung if r is not Rung.STOP for _ in range(2)]


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least once"):
        LadderConfig(same_max=0)
    with pytest.raises(ValueError, match="waits rise"):
        LadderConfig(wait_s=700)
