"""The rules say the same of every view whether or not they pass over what cannot matter."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.detection import rules
from ftkit.detection.config import DetectionConfig
from ftkit.detection.row import Phase
from ftkit.detection.rules import View
from ftkit.detection.track import Track
from tests.detection.scene import facts, row

LIMIT_S, NOW = 10.0, 1000.0
CONFIG = DetectionConfig(max_stall_s=LIMIT_S, setup_factor=1.5)
#: Around all limits that there are, and at them.
AGES = [0.0, 0.3, 0.8, 0.81, 4.0, 9.9, 10.0, 10.1, 12.0, 15.0, 16.0, 49.0, 70.0, 90.0]


def track(chance: Random, seat: int) -> Track:
    pick, waits = chance.choice, chance.random() < 0.6
    return Track(
        member=MemberId(100 + seat),
        seat=Seat(seat),
        node=NodeId(seat // 2),
        row=row(
            100 + seat,
            phase=pick([*Phase, *[Phase.FORWARD] * 6]),
            step=pick([10, 10, 11]),
            entered=pick([51, 51, 50, 52]),
            pending_since=NOW - pick(AGES) if waits else None,
            moved=NOW - pick(AGES),
            group=pick([0, 0, 0, 1]),
            op=pick(["all_reduce", "all_reduce", "barrier", "recv 1 100"]),
            heartbeat=pick([None, NOW, NOW - 12.0]),
            allowance=pick([0.0, 0.0, NOW - 2.0, NOW + 5.0]),
            warm=pick([True, True, False]),
        ),
        facts=pick([None, facts(), facts(), facts("T")]),
        at=NOW - pick([0.0, 0.0, 0.4, 3.0]),
    )


def view(chance: Random) -> View:
    pick = chance.choice
    seen = [track(chance, seat) for seat in range(pick([1, 2, 3, 4, 5]))]
    if pick([True, False]):  # the whole job stands in one place
        place = seen[0].row
        seen = [replace(o, row=replace(place, member=o.member, op=o.row.op)) for o in seen]
    late_s, usual_s = pick([0.0, 0.0, 0.7]), pick([None, 0.0, 1.0])
    return View(
        config=CONFIG,
        size=len(seen) + pick([0, 0, 0, 1]),
        gone=pick([False, False, True]),
        seen=seen,
        limit_s=pick([LIMIT_S, 14.0]),
        stretch_s=lambda since: late_s,
        usual_s=lambda phase: usual_s,
    )


def test_what_is_passed_over_changes_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [view(Random(seed)) for seed in range(2000)]
    found = [(rules.judge(one), rules.suspicions(one)) for one in cases]
    # As if some member had always stood still for long enough to be looked at.
    monkeypatch.setattr(View, "least_limit_s", float("-inf"))
    monkeypatch.setattr(View, "all_move", False)
    for one, said in zip(cases, found, strict=True):
        assert said == (rules.judge(one), rules.suspicions(one))
    played = Counter(v.fault for both in found for verdicts in both for v in verdicts.values())
    assert {"hang-blocked", "stopped", "desync", "hang-comm", "stall"} <= played.keys()
    assert sum(not any(both) for both in found) > len(cases) / 10, (
        "and often there is nothing to say"
    )
