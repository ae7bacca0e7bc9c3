"""Parity's bytes pulled in the idle windows of a step, on a link that is a model."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest

from ftkit.checkpoint.gate import OpenGate
from ftkit.checkpoint.lines import ByteLine
from ftkit.checkpoint.parity.combine import Pace, Superseded
from ftkit.checkpoint.parity.feed import FLYING_MAX, Feed
from ftkit.core.errors import WireError
from ftkit.core.governor import TOUCHES, Governor, Grant, Pause, TrafficLimits
from ftkit.core.idle_windows import IdleWindows

MB = 1 << 20
ROUND_TRIP_S = 0.001
"""Of a request; a peer's threads must wake up, too."""
SPENT_S = 0.001
"""On a MiB, to check and to add it."""
STEP_S, LONG_S, BUCKETS, BUCKET_BYTES = 0.24, 0.1, 6, 4 * MB


class Link:
    """Training's buckets and our pieces on one wire, in one direction; seconds are a model's."""

    def __init__(self, rate: float) -> None:
        self.now, self.rate = 0.0, rate
        self.windows = IdleWindows()
        limits = TrafficLimits(max_slowdown=0.0, rate_guess=rate / 2)
        self.governor = Governor(limits, self.windows, 0.0, look_s=0.001)
        self.free_at = 0.0
        self.behind_s, self.waited = 0.0, 0
        self._edges = deque(self._buckets(0.0))
        self._ends: list[float] = []

    def _buckets(self, start: float) -> list[float]:
        gap = (STEP_S - LONG_S) / BUCKETS
        return [start + LONG_S + i * gap for i in range(BUCKETS)]

    def reach(self, now: float) -> None:
        """Time passes; what training does meanwhile is done."""
        self.now = max(self.now, now)
        while True:
            begins = self._edges[0] if self._edges else float("inf")
            ends = min(self._ends, default=float("inf"))
            if min(begins, ends) > self.now:
                return
            if ends <= begins:
                self._ends.remove(ends)
                self.windows.end(ends)
                if not self._edges and not self._ends:
                    self._edges.extend(self._buckets(ends))
                continue
            self._edges.popleft()
            self.windows.begin(begins)
            # One bucket after the other; what of ours is on the wire goes first.
            start = max(begins, *self._ends) if self._ends else begins
            self.behind_s += max(0.0, self.free_at - start)
            self._ends.append(max(start, self.free_at) + BUCKET_BYTES / self.rate)
            self.free_at = self._ends[-1]

    def send(self, nbytes: int) -> float:
        """When a piece that is asked for now is there."""
        self.reach(self.now)
        # A bucket that begins meanwhile has the wire to itself all the same: counted as behind.
        self.free_at = max(self.free_at, self.now + ROUND_TRIP_S) + nbytes / self.rate
        return self.free_at


class Line:
    """A byte server's answers, over the link."""

    def __init__(self, link: Link, data: bytes, *, breaks_after: int | None = None) -> None:
        self.link, self.data, self.breaks_after = link, data, breaks_after
        self.asked = deque[tuple[int, int, float]]()

    def ask_for(self, request: Mapping[str, object], at: int, count: int) -> None:
        self.asked.append((at, count, self.link.send(count)))

    def take_in(self, into: memoryview) -> None:
        at, count, there = self.asked.popleft()
        assert count == len(into)
        if self.breaks_after is not None and at >= self.breaks_after:
            raise WireError("it broke")
        self.link.reach(there)
        into[:] = self.data[at : at + count]


class Gated(OpenGate):
    """The governor of the link, by the link's clock."""

    def __init__(self, link: Link) -> None:
        self.link, self.pieces = link, list[int]()
        self.flying_max, self.flying = 0, 0

    def ask(self, nbytes: int, *, whole: bool = True, touches: float = TOUCHES) -> Grant | Pause:
        decision = self.link.governor.decide(self.link.now, nbytes, whole=whole, touches=touches)
        if isinstance(decision, Grant):
            self.pieces.append(decision.bytes)
            self.flying += 1
            self.flying_max = max(self.flying_max, self.flying)
        return decision

    def arrived(self, grant: Grant, seconds: float) -> None:
        self.flying -= 1
        self.link.governor.arrived(grant, seconds=seconds)

    def given_up(self, grant: Grant) -> None:
        self.flying -= 1
        self.link.governor.given_up(grant)


def feed(link: Link, gate: Gated, check: Callable[[], None] = lambda: None) -> Feed:
    return Feed(
        gate,
        touches=4.0,
        check=check,
        clock=lambda: link.now,
        rest=lambda s: link.reach(link.now + s),
    )


def line(*args: Any, **kwargs: Any) -> ByteLine:
    return cast("ByteLine", Line(*args, **kwargs))


@pytest.mark.parametrize("mbit", [1000, 2000])
def test_pieces_use_most_of_the_idle_windows_and_training_does_not_wait(mbit: int) -> None:
    link = Link(mbit * 125e3)
    gate, data = Gated(link), bytes(64 * MB)
    link.reach(1.0)  # some steps are known
    begun, behind = link.now, link.behind_s
    for block in feed(link, gate).ranges(line(link, data), {}, 0, len(data), MB):
        link.reach(link.now + SPENT_S * len(block) / MB)
    took = link.now - begun
    idle = link.windows.idle_share()
    assert len(data) / (took * idle * link.rate) > 0.7
    assert (link.behind_s - behind) / took < 0.015


def test_the_next_piece_is_asked_for_before_the_last_is_there() -> None:
    link = Link(125e6)
    gate, data = Gated(link), bytes(range(256)) * (5 * MB // 512)
    got = b"".join(
        bytes(block) for block in feed(link, gate).ranges(line(link, data), {}, 7, len(data), MB)
    )
    assert got == data[7:]
    assert 1 < gate.flying_max <= FLYING_MAX < link.governor.limits.unacknowledged_max
    assert gate.flying == 0


def test_ranges_of_several_lines_share_the_gate_and_none_waits_for_ever() -> None:
    """What was asked ahead on one line is taken in when another must wait for the gate."""
    link = Link(125e6)
    gate, data = Gated(link), [bytes([i]) * (3 * MB + i) for i in range(3)]
    asked = feed(link, gate)
    runs = [asked.ranges(line(link, d), {}, 0, len(d), MB) for d in data]
    got = [b""] * 3
    for _ in range(4):
        for i, run in enumerate(runs):
            got[i] += bytes(next(run, b""))
    assert got == data
    assert gate.flying == 0


def test_a_line_that_breaks_is_told_by_its_own_reader_and_nothing_stays_asked_for() -> None:
    link = Link(125e6)
    gate = Gated(link)
    asked = feed(link, gate)
    good = asked.ranges(line(link, bytes(2 * MB)), {}, 0, 2 * MB, MB)
    bad = asked.ranges(line(link, bytes(2 * MB), breaks_after=MB), {}, 0, 2 * MB, MB)
    assert len(next(good)) == len(next(bad)) == MB  # the next range of it is on its way
    assert len(next(good)) == MB
    with pytest.raises(WireError, match="it broke"):
        next(bad)
    asked.give_up()
    asked.give_up()
    assert gate.flying == 0


def test_what_is_not_wanted_any_more_ends_while_it_waits() -> None:
    link = Link(125e6)
    link.windows.begin(0.0)
    pace = Pace(lambda: False, gate=Gated(link), clock=lambda: link.now, rest=link.reach)
    with pytest.raises(Superseded):
        next(pace.ranges(line(link, bytes(MB)), {}, 0, MB, MB))
