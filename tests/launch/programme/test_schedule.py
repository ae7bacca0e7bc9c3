"""One moment an interval, which the seed picks and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import UsageError
from ftkit.launch.programme.schedule import fault_of, interval, next_interval, number_at, seconds_of

HOUR = 3600.0
NOW = 1_800_000_000.0


@given(st.integers(0, 10**6), st.integers(0, 99), st.sampled_from([1.0, 60.0, 6 * HOUR]))
def test_the_moment_lies_in_its_interval_and_is_the_same_each_time(number, seed, every_s) -> None:
    one = interval(number, every_s=every_s, seed=seed)
    assert number * every_s <= one.due < one.ends == (number + 1) * every_s
    assert one == interval(number, every_s=every_s, seed=seed)


def test_moments_are_spread_over_the_interval() -> None:
    parts = [interval(n, every_s=1.0, seed=4).due - n for n in range(400)]
    counts = [sum(1 for p in parts if q / 4 <= p < (q + 1) / 4) for q in range(4)]
    assert min(counts) > 60
    assert len(set(parts)) == 400


@given(st.floats(0, 1e9), st.integers(0, 20), st.none() | st.integers(0, 10**6))
def test_the_next_moment_is_to_come_and_in_no_interval_that_is_done(now, seed, done) -> None:
    one = next_interval(now, every_s=HOUR, seed=seed, done=done)
    assert one.due >= now
    assert done is None or one.number > done
    latest = max(number_at(now, every_s=HOUR) + 1, -1 if done is None else done + 1)
    assert one.number <= latest


def test_a_programme_that_is_started_again_keeps_to_the_moment() -> None:
    first = next_interval(NOW, every_s=HOUR, seed=1)
    between = (NOW + first.due) / 2
    assert next_interval(between, every_s=HOUR, seed=1) == first
    assert next_interval(first.due + 1, every_s=HOUR, seed=1).number == first.number + 1


def test_every_fault_has_its_turn() -> None:
    faults = ("kill", "stop", "preempt")
    assert {fault_of(n, faults, seed=0) for n in range(50)} == set(faults)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("6h", 21600), ("1d", 86400), ("1h30m", 5400)],
)
def test_times_are_read_as_people_write_them(text, seconds) -> None:
    assert seconds_of(text, option="--every") == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "-5m", "6 hours", "h6", "nan", "inf", "1h,"])
def test_what_is_no_time_is_refused(text) -> None:
    with pytest.raises(UsageError, match=r"--every .* no time above zero"):
        seconds_of(text, option="--every")
