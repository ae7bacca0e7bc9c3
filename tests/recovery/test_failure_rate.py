"""How often a member fails: a belief, and what the job has seen."""

import pytest

from ftkit.recovery.failure_rate import PRIOR_MTBF_S, FailureRate, posterior_share


def test_nothing_seen_is_the_prior() -> None:
    assert FailureRate().mtbf_s() == pytest.approx(PRIOR_MTBF_S)
    assert FailureRate().mtbf_s(1000) == pytest.approx(PRIOR_MTBF_S / 1000)


def test_much_seen_is_what_was_seen() -> None:
    rate = FailureRate().seen(failures=1000, exposure_s=1000 * PRIOR_MTBF_S / 50)
    assert rate.mtbf_s() == pytest.approx(PRIOR_MTBF_S / 50, rel=0.01)


def test_a_quiet_day_lowers_the_rate_and_a_failure_raises_it() -> None:
    before = FailureRate()
    quiet = before.seen(exposure_s=86_400 * 1000)
    assert quiet.per_s < before.per_s
    assert quiet.seen(failures=1).per_s > 5 * quiet.per_s


def test_pieces_add_up() -> None:
    one = FailureRate().seen(failures=2, exposure_s=10).seen(failures=1, exposure_s=20)
    assert one == FailureRate().seen(failures=3, exposure_s=30)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="prior"):
        FailureRate(prior_mtbf_s=0)
    with pytest.raises(ValueError, match="cannot be"):
        FailureRate(failures=-1)


@pytest.mark.parametrize("mtbf_s", [float("inf"), float("nan")])
def test_a_prior_that_is_no_time_is_refused(mtbf_s: float) -> None:
    with pytest.raises(ValueError, match="finite mean time"):
        FailureRate(prior_mtbf_s=mtbf_s)


def test_a_kind_that_was_not_seen_yet_is_not_written_off() -> None:
    assert posterior_share(0.01, 0, 0) == pytest.approx(0.01)
    assert posterior_share(0.01, 0, 100) == pytest.approx(1 / 300)
    assert posterior_share(0.01, 300, 1000) == pytest.approx(0.286, abs=1e-3)


def test_a_wrong_prior_is_left_behind_after_one_event_s_worth_of_failures() -> None:
    # One in twenty where one in ten was believed: of forty failures two.
    assert posterior_share(0.1, 2, 40) == pytest.approx(0.0556, abs=1e-3)
