"""What the page shows, from the literal histories: ranks, tiers, what is said and what happened."""

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.core.ids import Generation, MemberId, Step
from ftkit.detection.row import Phase, Row
from ftkit.launch.ui.tiers import TierView
from ftkit.launch.ui.view import LOSSES_MAX, RankState, UiView
from tests.launch.histories import Event, disturbed, event

NOW_NS = 20_000_000_000


def fed(events: list[Event]) -> UiView:
    view = UiView()
    for e in sorted(events, key=lambda e: float(e["mono"])):
        view.feed(e)
    return view


def until(mono: float) -> UiView:
    return fed([e for e in disturbed() if e["mono"] <= mono])


def row(member: int, **fields: Any) -> Row:
    standard: dict[str, Any] = {
        "member": MemberId(member), "pid": 1, "generation": Generation(1), "step": Step(3),
        "phase": Phase.FORWARD, "group": 0, "entered": 0, "left": 0, "op": "all_reduce",
        "t_progress_ns": NOW_NS - 2_000_000_000, "t_enter_ns": 0, "t_heartbeat_ns": NOW_NS,
        "allowance_ns": 0, "warm": True,
    }  # fmt: skip
    return Row(**(standard | fields))


def states(view: UiView) -> list[RankState]:
    return [rank.state for rank in view.ranks({}, NOW_NS)]


def test_the_states_of_a_rank_that_is_killed_and_comes_back() -> None:
    train, start, gone = RankState.TRAINING, RankState.STARTING, RankState.GONE
    assert states(until(9.0)) == [start, start, start]
    assert states(until(10.2)) == [train, train, train]
    assert states(until(10.34)) == [train, gone, train]
    assert states(until(10.36)) == [train, start, train]
    assert states(fed(disturbed())) == [RankState.DONE] * 3


def test_a_status_row_tells_what_a_rank_does_now() -> None:
    rows = {0: row(0), 1: row(1, t_enter_ns=5, t_progress_ns=NOW_NS + 7)}
    first, second, third = until(10.2).ranks(rows, NOW_NS)
    assert (first.phase, first.step, first.op, first.still_s) == ("forward", 3, None, 2.0)
    assert (second.op, second.still_s) == ("all_reduce", 0.0)
    assert (third.phase, third.still_s) == (None, None)


def test_the_row_of_a_dead_member_is_not_taken_for_its_successors() -> None:
    rank = until(10.36).ranks({1: row(1)}, NOW_NS)[1]
    assert (rank.member, rank.phase) == (3, None)


def test_a_script_without_a_session_runs_though_it_joins_no_world() -> None:
    assert until(9.0).ranks({0: row(0, plain=True)}, NOW_NS)[0].state is RankState.TRAINING


def test_what_is_said_holds_until_it_is_taken_back_or_its_member_is_gone() -> None:
    slow = event(10.21, "suspicion", fault="slow", member=2, seat=2, reason="1.8 x", since_s=10.2)
    over = event(10.25, "verdict-over", fault="slow", member=2, seat=2)
    events = [*disturbed(), slow, slow | {"mono": 10.22}]
    view = fed([e for e in events if e["mono"] <= 10.23])
    assert [e["fault"] for e in view.said()] == ["slow"]
    rank = view.ranks({}, NOW_NS)[2]
    assert (rank.said, rank.accused) == ("slow", True)
    stall = event(10.21, "verdict", fault="data-stall", member=2, seat=2, reason="", since_s=10.2)
    label = fed([e for e in [*disturbed(), stall] if e["mono"] <= 10.23]).ranks({}, NOW_NS)[2]
    assert (label.said, label.accused) == ("data-stall", False)
    assert [h.kind for h in view.happened] == ["suspicion"]  # said twice, told once
    assert fed([e for e in [*events, over] if e["mono"] <= 10.26]).said() == []
    # A verdict that comes after the exit holds until somebody else trains in the seat.
    assert [e["fault"] for e in until(10.64).said()] == ["exited"]
    assert until(10.75).said() == []
    assert fed(disturbed()).said() == []


def test_what_happened_is_told_in_order_and_in_words() -> None:
    told = [f"{h.kind}: {h.words}" for h in until(10.36).happened]
    assert told[0].startswith("drill: rank 1, kill, backward, step 3")
    assert told[1] == "exit: rank 1, signal 9"
    assert "verdict: rank 1, exited, killed by SIGKILL" in told[2]
    assert "decision: shrink, two survivors hold step 2" in told


def test_what_is_remembered_is_bounded() -> None:
    view = UiView()
    for step in range(20_000):
        view.feed(event(step, "commit", seat=0, member=0, step=step, generation=1, loss=1.0))
        view.feed(event(step, "halt", generation=step, reason="once more"))
        view.feed(event(step, "steps", seats=[]))
    assert len(view.losses) <= LOSSES_MAX
    assert min(view.losses) == 0
    assert max(view.losses) > 19_900
    assert len(view.happened) <= 60
    assert len(view.recent) <= 8000
    assert len(view.pace) <= 24


@settings(deadline=None, max_examples=40)
@given(st.randoms(use_true_random=False))
def test_any_order_and_any_damage_is_taken(shuffle: random.Random) -> None:
    view = UiView()
    events = [*disturbed(), {}, {"kind": "verdict"}, {"kind": "spawn", "mono": 1, "t": "x"}]
    shuffle.shuffle(events)
    for e in events:
        e = dict(e)
        if e and shuffle.random() < 0.2:
            e.pop(shuffle.choice(list(e)))
        view.feed(e)
    view.to_json(view.ranks({}, NOW_NS))


def snapshot(step: int, seat: int, t: float) -> Event:
    return event(t, "snapshot", step=step, seat=seat, bytes=100, begin_s=0.001, gate_s=0.002 * seat)


def test_a_snapshot_is_as_large_as_its_shares_and_as_slow_as_the_slowest() -> None:
    view = TierView()
    for e in (snapshot(4, 0, 1), snapshot(4, 2, 2), snapshot(3, 1, 1.5)):
        view.feed(e)
    memory = view.tiers["memory"]
    assert (memory.step, memory.size, memory.took_s) == (4, 200, 0.005)
    assert memory.detail == "sealed by 2 ranks"


def test_a_tier_that_failed_says_why_until_it_works_again() -> None:
    view = TierView()
    view.feed(event(1, "parity-failed", reason="node 2 is away"))
    assert (view.tiers["parity"].step, view.tiers["parity"].wrong) == (None, "node 2 is away")
    view.feed(event(2, "parity", step=8, bytes=64, seconds=0.5, engine="isal"))
    assert (view.tiers["parity"].step, view.tiers["parity"].wrong) == (8, "")
