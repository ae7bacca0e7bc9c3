"""Chains of starts after a failure: how many, how far apart, and whether they helped."""

import pytest

from ftkit.detection.retries import CHAIN_GAP_S, Attempt, retry_stats


def start(minute: float, how: str, chain: str = "a") -> Attempt:
    """`how`: "ok" ended well, "trained" failed after some steps, "dead" failed at once."""
    return Attempt(chain=chain, started=60 * minute, trained=how != "dead", failed=how != "ok")


def test_a_chain_is_a_failure_and_the_starts_that_follow_it() -> None:
    stats = retry_stats(
        [
            *(start(0, "trained"), start(11, "dead"), start(21, "dead"), start(33, "ok")),
            *(start(5, "ok", "b"), start(50, "ok", "b")),
            *(start(0, "trained", "c"), start(11, "dead", "c")),
        ]
    )
    assert (stats.chains, stats.attempts) == (2, 4)
    assert stats.chain_success == 0.5
    assert stats.attempt_success == 0.25
    assert stats.interval_s == pytest.approx((10.75 * 60, 11 * 60, 11.25 * 60))


def test_a_start_that_trained_before_it_failed_ends_its_chain() -> None:
    stats = retry_stats([start(0, "trained"), start(10, "trained"), start(20, "ok")])
    assert (stats.chains, stats.attempts, stats.chain_success) == (2, 2, 1.0)


def test_starts_that_are_days_apart_are_no_chain() -> None:
    later = CHAIN_GAP_S / 60 + 1
    stats = retry_stats([start(0, "dead"), start(later, "ok")])
    assert (stats.chains, stats.chain_success, stats.interval_s) == (0, None, None)


def test_of_no_job_nothing_is_said() -> None:
    assert retry_stats([]).to_json() == {
        "chains": 0,
        "attempts": 0,
        "chain_success": None,
        "attempt_success": None,
        "interval_s": None,
    }
