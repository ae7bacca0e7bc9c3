"""The offset of a clock is that of the shortest way, and stands still."""

import random

from ftkit.detection.clock_offset import WINDOW_S, ClockOffset


def test_it_stands_still_whatever_way_messages_take() -> None:
    rng, offset = random.Random(1), ClockOffset()
    told = [offset.note(sent=t / 10, at=t / 10 + 500.0 + rng.expovariate(50)) for t in range(3000)]
    settled = told[600:]
    assert min(settled) >= 500.0
    assert max(settled) - min(settled) < 0.005
    assert len(set(settled)) < 12, "a time that is shifted anew each time looks like progress"


def test_it_follows_a_clock_that_drifts() -> None:
    offset = ClockOffset()
    for tenth in range(36_000):
        at = tenth / 10
        told = offset.note(sent=at * (1 - 1e-4), at=at + 0.001)
    assert abs(told - (at * 1e-4 + 0.001)) <= 2 * WINDOW_S * 1e-4 + 1e-6
