"""The idle windows of a step, and what a governor lets through in them."""

import itertools
import math

import pytest

from ftkit.core.governor import LOST_S, SAVED_S, SOON_S, Governor, Grant, Pause, TrafficLimits
from ftkit.core.idle_windows import IdleWindows, merged

#: A step: ten buckets of 10 ms, 2 ms apart, and then 100 ms without any.
BUCKETS, BUCKET_S, GAP_S, LONG_S = 10, 0.010, 0.002, 0.100
STEP_S = BUCKETS * BUCKET_S + (BUCKETS - 1) * GAP_S + LONG_S
RATE = 125e6


def transfers(steps: int) -> list[tuple[float, float]]:
    found, at = [], 0.0
    for _ in range(steps):
        for _ in range(BUCKETS):
            found.append((at, at + BUCKET_S))
            at += BUCKET_S + GAP_S
        at += LONG_S - GAP_S
    return found


def learnt(steps: int = 3) -> IdleWindows:
    windows = IdleWindows()
    for begin, end in transfers(steps):
        windows.begin(begin)
        windows.end(end)
    return windows


def test_nothing_known_means_free_and_a_transfer_means_busy() -> None:
    windows = IdleWindows()
    assert windows.left(0.0) == float("inf")
    windows.begin(1.0)
    assert (windows.left(1.5), windows.busy) == (0.0, True)
    windows.end(2.0)
    assert windows.left(2.1) == float("inf")  # one transfer is no pattern


def test_who_waits_for_a_bucket_looks_again_when_one_may_have_ended() -> None:
    """Not every millisecond: each look takes the processor from training."""
    windows, at = learnt(), transfers(3)[-1][1] + LONG_S
    governor = Governor(TrafficLimits(max_slowdown=0.0), windows, at, look_s=0.001)
    windows.begin(at)
    now, looks = at, 0
    while now < at + BUCKET_S - 1e-9:
        decision = governor.decide(now, 1 << 20)
        assert isinstance(decision, Pause)
        now, looks = now + decision.seconds, looks + 1
    assert looks <= 2
    assert now == pytest.approx(at + BUCKET_S, abs=0.001)


def test_a_vote_is_not_taken_for_a_bucket() -> None:
    windows, at = learnt(), 10.0
    windows.begin(at - 1.0)
    windows.end(at - 0.9995)  # a vote
    windows.begin(at)
    assert windows.busy_for(at) == pytest.approx(0.0005)
    assert windows.busy_for(at + 0.001) == pytest.approx(BUCKET_S - 0.001)
    assert windows.busy_for(at + 1.0) == 0.0  # longer than any


def test_what_is_learnt_anew_knows_how_long_transfers_take_too() -> None:
    windows = IdleWindows()
    windows.relearn([(0.0, 0.02), (0.01, 0.03), (0.1, None)], keep_after=0.0)
    assert windows.busy_for(0.11) == pytest.approx(0.02)
    windows.look(busy=True, since=0.105)  # seen later: it is the same
    assert windows.busy_for(0.11) == pytest.approx(0.02)
    windows.look(busy=False, since=0.13)
    assert windows.busy_for(0.14) == 0.0
    windows.look(busy=True, since=0.2)
    assert windows.busy_for(0.21) == pytest.approx(0.02)


def test_overlapping_transfers_are_one_and_a_stray_end_is_none() -> None:
    windows = IdleWindows()
    windows.end(0.0)
    windows.begin(1.0)
    windows.begin(1.2)
    windows.end(1.4)
    assert windows.busy
    windows.end(1.6)
    windows.begin(2.0)
    assert windows.lengths == pytest.approx([1.0, 0.4])


def test_a_short_gap_is_not_taken_for_the_long_window() -> None:
    windows = learnt()
    at = transfers(3)[-1][1]
    # Right after a bucket it may be a gap; once it has lasted longer than those it is not.
    assert windows.left(at) == pytest.approx(GAP_S)
    assert windows.left(at + 0.001) == pytest.approx(GAP_S - 0.001)
    assert windows.left(at + 0.003) == pytest.approx(LONG_S - 0.003)
    assert windows.left(at + LONG_S + 0.001) == 0.0
    assert windows.left(at + 3 * LONG_S) == float("inf")


def test_the_same_is_learnt_from_records_of_several_ranks_in_any_order() -> None:
    shifted = [(b + 0.001, e + 0.001) for b, e in transfers(3)]
    windows = IdleWindows()
    windows.relearn([*reversed(transfers(3)), *shifted], keep_after=0.0)
    at = shifted[-1][1]
    assert windows.left(at + 0.003) == pytest.approx(LONG_S - 0.001 - 0.003)
    windows.relearn([*transfers(3), (at, None)], keep_after=0.0)
    assert windows.busy
    windows.relearn(transfers(3), keep_after=1e9)
    assert windows.lengths == []
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4), (5.5, None), (9, 9.5)]) == [
        (0, 4),
        (5, None),
    ]


def test_the_idle_share_counts_windows_that_are_long_enough() -> None:
    windows = learnt(4)
    whole = windows.idle_share()
    assert whole > windows.idle_share(0.05) == pytest.approx(LONG_S / STEP_S, rel=0.2)
    assert windows.idle_share(1.0) == 0.0


def granted(governor: Governor, now: float, wanted: int) -> Grant:
    """All of `wanted` at once."""
    decision = governor.decide(now, wanted, whole=True)
    assert isinstance(decision, Grant)
    return decision


class Play:
    """Steps of training on a clock of its own, and somebody who sends as he is told."""

    def __init__(self, limits: TrafficLimits, steps: int, idle: bool = True) -> None:
        self.windows = IdleWindows()
        self.governor = Governor(limits, self.windows, 0.0, look_s=0.001)
        self.sent = 0
        self.collided_s = 0.0
        """Seconds in which pieces and training's transfers were on the wire at once."""
        busy = transfers(steps) if idle else [(0.0, steps * STEP_S)]
        edges = sorted([(b, 1) for b, _ in busy] + [(e, 0) for _, e in busy])
        now = 0.0
        for at, begins in edges:
            while now < at:
                now = self.look(now, busy)
            (self.windows.begin if begins else self.windows.end)(at)

    def look(self, now: float, busy: list[tuple[float, float]]) -> float:
        match self.governor.decide(now, 1 << 30):
            case Pause(seconds, _):
                return now + seconds
            case Grant(count, _) as grant:
                self.sent += count
                seconds = count / RATE
                self.governor.arrived(grant, seconds=seconds)
                self.collided_s += sum(
                    max(0.0, min(now + seconds, e) - max(now, b)) for b, e in busy
                )
                return now + seconds
        raise AssertionError("a decision is one or the other")


LIMITS = TrafficLimits(rate_guess=RATE, max_slowdown=0.0, piece_bytes_max=1 << 20)


def test_pieces_fill_the_long_windows_and_collide_with_nothing() -> None:
    steps = 20
    play = Play(LIMITS, steps)
    # The first step is not known yet.
    assert play.collided_s < 0.015 * steps * STEP_S
    assert play.sent > 0.7 * steps * LONG_S * RATE
    assert play.governor.intruding == 0


def test_without_windows_only_the_allowed_slow_down_is_used() -> None:
    limits = TrafficLimits(rate_guess=RATE, max_slowdown=0.02)
    play = Play(limits, 100, idle=False)
    span = 100 * STEP_S
    assert 0.015 * span < play.collided_s <= 0.02 * span
    assert play.governor.intruding == play.sent > 0


def test_the_cap_of_the_link_holds_in_free_windows_too() -> None:
    governor = Governor(TrafficLimits(rate_max=10e6), IdleWindows(), 0.0)
    now, sent = 0.0, 0
    while now < 10.0:
        match governor.decide(now, 1 << 30):
            case Grant(count, _) as grant:
                sent += count
                governor.arrived(grant, seconds=count / RATE)
                now += count / RATE
            case Pause(seconds, _):
                now += seconds
    assert 0.9 * 10e6 * 10 < sent <= 10e6 * 11 + (4 << 20)


def through(governor: Governor, until_s: float, *, touches: float = 2.0) -> int:
    """Bytes that somebody gets through who asks for as much as there is."""
    now, sent = 0.0, 0
    while now < until_s:
        match governor.decide(now, 1 << 30, touches=touches):
            case Grant(count, _) as grant:
                sent += count
                governor.arrived(grant, seconds=count / RATE)
                now += count / RATE
            case Pause(seconds, _):
                now += seconds
    return sent


@pytest.mark.parametrize("touches", [1.0, 2.0, 4.0])
def test_the_cap_of_memory_bandwidth_counts_how_often_a_byte_is_touched(touches: float) -> None:
    limits = TrafficLimits(memory_rate_max=40e6)
    sent = through(Governor(limits, IdleWindows(), 0.0), 10.0, touches=touches)
    rate = 40e6 / touches
    assert 0.9 * rate * 10 < sent <= rate * 11 + (4 << 20)
    forecast = Governor(limits, IdleWindows(), 0.0).forecast(int(rate), touches=touches)
    assert forecast.seconds == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("link", "memory", "rate", "reason"),
    [(10e6, 80e6, 10e6, "link"), (40e6, 20e6, 10e6, "memory bandwidth")],
)
def test_of_two_caps_the_tighter_one_holds(
    link: float, memory: float, rate: float, reason: str
) -> None:
    limits = TrafficLimits(rate_max=link, memory_rate_max=memory)
    sent = through(Governor(limits, IdleWindows(), 0.0), 10.0)
    assert 0.9 * rate * 10 < sent <= rate * 11 + (4 << 20)
    governor = Governor(limits, IdleWindows(), 0.0)
    while isinstance(decision := governor.decide(0.0, 1 << 20, whole=True), Grant):
        governor.arrived(decision, seconds=0.01)
    assert decision.reason == f"the cap of {'the ' if reason == 'link' else ''}{reason}"


def test_what_has_not_arrived_holds_back_the_next() -> None:
    governor = Governor(TrafficLimits(unacknowledged_max=2), IdleWindows(), 0.0)
    first = granted(governor, 0.0, 1 << 20)
    granted(governor, 0.0, 1 << 20)
    refused = governor.decide(0.0, 1 << 20)
    assert isinstance(refused, Pause)
    assert "acknowledged" in refused.reason
    governor.arrived(first, seconds=0.01)
    assert isinstance(governor.decide(0.0, 1), Grant)


def test_a_piece_that_was_given_up_does_not_hold_back_others_for_ever() -> None:
    governor = Governor(TrafficLimits(unacknowledged_max=1), IdleWindows(), 0.0)
    assert isinstance(governor.decide(0.0, 1), Grant)
    assert isinstance(governor.decide(LOST_S, 1), Pause)
    assert isinstance(governor.decide(LOST_S + 0.1, 1), Grant)


def test_a_piece_that_is_late_or_failed_counts_for_itself_alone() -> None:
    governor = Governor(TrafficLimits(unacknowledged_max=1), IdleWindows(), 0.0)
    slow = granted(governor, 0.0, 1)
    other = granted(governor, LOST_S + 0.1, 1)
    governor.arrived(slow, seconds=LOST_S + 0.2)
    assert isinstance(governor.decide(LOST_S + 0.2, 1), Pause), "the other is on its way"
    governor.given_up(other)
    rate = governor.rate
    assert isinstance(governor.decide(LOST_S + 0.2, 1), Grant), "at once"
    assert governor.rate == rate


def test_an_idle_hour_saves_up_no_blast() -> None:
    limits = TrafficLimits(rate_guess=RATE, max_slowdown=0.01, unacknowledged_max=1000)
    windows = IdleWindows()
    governor = Governor(limits, windows, 0.0)
    governor.decide(0.0, 1)
    windows.begin(3600.0)
    now, took = 3600.0, 0.0
    while now < 3602.0:
        if isinstance(grant := governor.decide(now, 1 << 18, whole=True), Grant):
            governor.arrived(grant, seconds=grant.bytes / RATE)
            took += grant.bytes / RATE
        else:
            now += 0.001
    assert 0.02 < took < 0.01 * (2 + SAVED_S) + 0.003


def test_a_file_that_needs_more_than_is_saved_is_saved_for() -> None:
    windows = IdleWindows()
    governor = Governor(TrafficLimits(rate_guess=RATE, max_slowdown=0.01), windows, 0.0)
    windows.begin(0.0)
    size = int(0.1 * RATE)  # 10 s worth of what is allowed
    decided = [governor.decide(now / 10, size, whole=True) for now in range(300)]
    assert 2 <= sum(isinstance(d, Grant) for d in decided) <= 3
    assert all(isinstance(d, Pause) for d in decided[:99])


def test_the_bytes_on_their_way_are_those_that_were_granted() -> None:
    """Two pieces of 1 MiB each fit 17 ms and no third, however small the least piece is."""
    windows = IdleWindows()
    for begin, end in ((0.0, 1.0), (1.02, 2.02), (2.04, 3.04)):
        windows.begin(begin)
        windows.end(end)
    limits = TrafficLimits(rate_guess=RATE, max_slowdown=0.0, unacknowledged_max=9)
    governor = Governor(limits, windows, 3.04)
    granted(governor, 3.04, 1 << 20)
    granted(governor, 3.04, 1 << 20)
    assert isinstance(governor.decide(3.04, 1 << 20, whole=True), Pause)


def test_the_rate_is_that_of_arrivals() -> None:
    governor = Governor(TrafficLimits(rate_guess=1e9), IdleWindows(), 0.0)
    for _ in range(30):
        grant = granted(governor, 0.0, 1 << 20)
        governor.arrived(grant, seconds=(1 << 20) / 50e6)
    assert governor.rate == pytest.approx(50e6, rel=0.01)


def test_a_save_that_does_not_fit_says_so() -> None:
    governor = Governor(LIMITS, learnt(6), 0.0)
    small = governor.forecast(10 << 20, within_s=1.0)
    assert small.fits
    assert "there are 1.0 s" in str(small)
    large = governor.forecast(1 << 30, within_s=1.0)
    assert not large.fits
    assert "stretch over more steps" in str(large)
    # Twice the bytes take twice the time, and the time is that of the idle part of a step.
    assert governor.forecast(2 << 30).seconds == pytest.approx(2 * large.seconds)
    assert large.seconds == pytest.approx((1 << 30) / RATE * STEP_S / LONG_S, rel=0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_slowdown": 1.0},
        {"piece_bytes_min": 8 << 20},
        {"rate_max": 0.0},
        {"rate_max": math.nan},
        {"rate_max": math.inf},
        {"rate_guess": math.nan},
        {"memory_rate_max": math.inf},
        {"memory_rate_max": -1.0},
        {"unacknowledged_max": 0},
    ],
)
def test_limits_that_cannot_be_kept_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"must|cannot"):
        TrafficLimits(**wrong)  # type: ignore[arg-type]


def test_a_governor_makes_progress_whatever_it_meets() -> None:
    """With a slow-down allowed, every pattern of transfers ends up with bytes sent."""
    for gap, length in itertools.product((0.0, 1e-4, 0.01), (1e-3, 0.1)):
        windows, now = IdleWindows(), 0.0
        governor = Governor(TrafficLimits(max_slowdown=0.05, rate_guess=1e9), windows, 0.0)
        for _ in range(1200):  # longer than what might soon have a window waits
            windows.begin(now)
            now += length
            if isinstance(grant := governor.decide(now, 1 << 20), Grant):
                governor.arrived(grant, seconds=1e-3)
            windows.end(now)
            now += gap
        assert governor.granted


def test_what_soon_has_a_window_of_its_own_does_not_intrude() -> None:
    windows = learnt()
    at = transfers(3)[-1][1] + LONG_S
    windows.begin(at)
    limits = TrafficLimits(max_slowdown=0.05, rate_guess=RATE)
    governor = Governor(limits, windows, at - SAVED_S)
    assert isinstance(governor.decide(at, 1 << 20, whole=True), Pause), "8 ms fit the next 100"
    assert isinstance(governor.decide(at + SOON_S / 2, 1 << 20, whole=True), Pause)
    late = governor.decide(at + SOON_S, 1 << 20, whole=True)
    assert isinstance(late, Grant), "none came"
    assert late.intrudes
