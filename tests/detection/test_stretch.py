"""Lateness of those who look: it counts while it lasts, and is forgotten."""

import pytest

from ftkit.core.ids import NodeId
from ftkit.detection.stretch import Stretch

TICK_S = REPORT_S = 0.5


def test_lateness_does_not_add_up_over_what_has_passed() -> None:
    # Two agents, each 60 ms late in every report, four reports a second.
    stretch, now = Stretch(TICK_S, REPORT_S), 1000.0
    for _ in range(120 * 8):
        now += 0.125
        for node in (0, 1):
            if (now * 8) % 2 == node:
                stretch.note(NodeId(node), 0.06)
        stretch.tick(now)
    # 20 reports of each in five seconds; a bucket on the edge counts whole.
    assert 1.2 <= stretch.since(now - 5) <= 1.2 + 2 * 0.12
    assert stretch.since(now) == 0.0


def test_what_one_observer_tells_adds_up_and_of_several_the_latest_counts() -> None:
    stretch = Stretch(TICK_S, REPORT_S)
    stretch.tick(10.0)
    for at, node, by_s in ((10.1, 0, 0.1), (10.2, 0, 0.2), (10.2, 1, 0.25)):
        stretch.note(NodeId(node), by_s)
        stretch.tick(at)
    assert stretch.since(9.0) == pytest.approx(0.3)


def test_never_more_than_has_passed() -> None:
    stretch = Stretch(TICK_S, REPORT_S)
    stretch.tick(10.0)
    stretch.note(NodeId(3), 60.0)
    stretch.tick(10.5)
    assert stretch.since(10.2) == pytest.approx(0.3)


def test_a_late_tick_and_what_is_told_of_it_are_one_pause() -> None:
    stretch = Stretch(TICK_S, REPORT_S)
    stretch.tick(10.0)
    stretch.note(None, 4.0)
    stretch.tick(15.0)
    assert stretch.since(10.0) == pytest.approx(4.5)


def test_a_pause_of_all_hosts_is_one_pause_though_each_tells_of_it_in_its_turn() -> None:
    # 320 agents report every eight seconds, each at another moment; all stood still for 1 s.
    stretch, now = Stretch(TICK_S, 8.0), 1000.0
    stretch.tick(now)
    for node in range(320):
        now += 8.0 / 320
        stretch.note(NodeId(node), 1.0)
        stretch.tick(now)
    assert stretch.since(1000.0) == pytest.approx(1.0)
