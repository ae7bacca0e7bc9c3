"""Where a run's time went: every second given to one cause, and none twice."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.launch.goodput import Cause, goodput, step_paces
from tests.launch.histories import Event, commits, disturbed, event

FULL = {0: 0, 1: 1, 2: 2}
TWO = {0: 0, 2: 2}


def world(mono: float, step: int, who: dict[int, int]) -> Event:
    return event(mono, "resume", generation=1, step=step, members=sorted(who))


def run(*events: Event | list[Event]) -> list[Event]:
    flat = [e for part in events for e in (part if isinstance(part, list) else [part])]
    return [event(0.0, "spawn", seat=0, member=0, pid=1), *flat]


def paced(first: int, last: int, *, start: float, each: float, who: dict[int, int]) -> list[Event]:
    """Steps `first` to `last`, one every `each` seconds, the first committed at start + each."""
    return [
        c
        for k, step in enumerate(range(first, last + 1), start=1)
        for c in commits(start + k * each, step, 1, who)
    ]


def undisturbed() -> list[Event]:
    # 2 s of starting, a first step of 1.5 s, nine of 0.5 s, 1 s of ending.
    return run(
        world(2.0, 0, FULL),
        paced(1, 1, start=2.0, each=1.5, who=FULL),
        paced(2, 10, start=3.5, each=0.5, who=FULL),
        event(9.0, "end", outcome="completed", reason="10 steps"),
    )


def killed() -> list[Event]:
    """Rank 1 is killed 0.2 s into step 5; two go on at 0.75 s a step, and it is back for step 9."""
    return run(
        world(2.0, 0, FULL),
        paced(1, 1, start=2.0, each=1.5, who=FULL),
        paced(2, 4, start=3.5, each=0.5, who=FULL),
        event(5.2, "drill", fault="kill", phase="forward", seat=1, member=1, step=5),
        event(5.25, "exit", seat=1, member=1, code=None, signal=9),
        event(5.3, "report", seat=0, member=0, step=4, lost=[1]),
        event(5.31, "halt", generation=1, reason="member 1 is gone"),
        world(5.4, 4, TWO),
        commits(6.25, 5, 2, TWO),  # 0.75 s of step, 0.1 s of entering
        paced(6, 8, start=6.25, each=0.75, who=TWO),
        event(8.6, "decision", action="grown", reason="seat 1", members=[0, 1, 2]),
        commits(9.1, 9, 3, FULL),  # 0.1 s more than a step
        paced(10, 10, start=9.1, each=0.5, who=FULL),
        event(9.6, "end", outcome="completed", reason="10 steps"),
    )


def test_an_undisturbed_run_is_training_from_start_to_end() -> None:
    spent = goodput(undisturbed())
    assert spent.wall_s == pytest.approx(9.0)
    assert spent.committed_s == pytest.approx(5.0)
    assert spent.lost_s[Cause.IDLE] == pytest.approx(2.0 + 1.0 + 1.0)
    assert sum(spent.lost_s.values()) == pytest.approx(4.0), "and nothing else is lost"
    assert spent.steps == 10
    assert spent.share == pytest.approx(5 / 9)
    assert spent.training_share == pytest.approx(1.0)


def test_a_kill_costs_what_it_cost() -> None:
    spent = goodput(killed())
    lost = {cause: round(s, 6) for cause, s in spent.lost_s.items() if s}
    assert lost == {
        Cause.IDLE: 3.0,
        Cause.RECOMPUTE: 0.2,
        Cause.DETECT: 0.1,
        Cause.REGROUP: 0.3,  # to resume, to enter, and to grow: 0.1 each
        Cause.DEGRADED: 1.0,  # four steps of 0.75 s in place of 0.5 s
    }
    assert spent.committed_s == pytest.approx(5.0)


def test_steps_that_are_undone_were_for_nothing() -> None:
    events = run(
        world(1.0, 0, FULL),
        paced(1, 6, start=1.0, each=0.5, who=FULL),
        event(4.0, "halt", generation=1, reason="all are gone"),
        world(6.0, 3, FULL),
        paced(4, 8, start=6.0, each=0.5, who=FULL),
    )
    spent = goodput(events)
    assert (spent.steps, spent.undone) == (8, 3)
    assert spent.committed_s == pytest.approx(4.0)
    assert spent.lost_s[Cause.RECOMPUTE] == pytest.approx(1.5)
    assert spent.lost_s[Cause.REGROUP] == pytest.approx(2.0)


def test_loading_state_is_told_from_regrouping_and_snapshots_from_steps() -> None:
    events = run(
        world(1.0, 0, FULL),
        paced(1, 4, start=1.0, each=0.5, who=FULL),
        event(3.0, "halt", generation=1, reason="all are gone"),
        world(3.5, 4, FULL),
        event(4.3, "restore", seat=0, member=5, step=4, seconds=0.75, bytes=1, source="x"),
        commits(5.0, 5, 2, FULL),
        event(5.1, "snapshot", seat=0, step=5, bytes=1, begin_s=0.03, gate_s=0.01),
        event(5.1, "snapshot", seat=1, step=5, bytes=1, begin_s=0.01, gate_s=0.01),
        commits(5.54, 6, 2, FULL),
    )
    spent = goodput(events)
    assert spent.lost_s[Cause.TRANSFER] == pytest.approx(0.75)
    assert spent.lost_s[Cause.REGROUP] == pytest.approx(0.5 + 0.25)
    assert spent.lost_s[Cause.SNAPSHOT] == pytest.approx(0.04), "the slowest rank's, once"
    assert spent.committed_s == pytest.approx(3.0)


def test_a_newcomer_that_loads_beside_training_holds_nobody_up() -> None:
    events = [*killed(), event(7.3, "restore", seat=1, member=3, step=6, seconds=0.9, source="x")]
    assert goodput(events).lost_s[Cause.TRANSFER] == 0.0


def test_paces_are_of_steps_that_nothing_disturbed() -> None:
    assert step_paces(killed()) == {3: pytest.approx(0.5), 2: pytest.approx(0.75)}


def test_it_is_told_in_two_sentences() -> None:
    text = goodput(killed()).paragraph()
    assert text.startswith("Goodput was 52.1%: 5.00 s of 9.60 s went into 10 steps that stayed")
    assert text.endswith(
        "Lost were: idle 3.00 s, degraded 1.00 s, regroup 0.30 s, recompute 0.20 s, detect 0.10 s."
    )
    assert not goodput([]).paragraph()


SEED_EVENTS = [*killed(), *undisturbed(), *disturbed()]


@given(
    st.lists(st.sampled_from(SEED_EVENTS), max_size=60), st.lists(st.floats(0, 100), max_size=60)
)
def test_whatever_the_events_no_second_is_lost_or_given_twice(
    events: list[dict[str, Any]], times: list[float]
) -> None:
    mixed = [
        e if t is None else e | {"mono": t}
        for e, t in itertools.zip_longest(events, times[: len(events)])
    ]
    spent = goodput(mixed)
    assert all(s >= -1e-9 for s in spent.lost_s.values())
    assert spent.committed_s >= 0
    total = spent.committed_s + sum(spent.lost_s.values())
    assert total == pytest.approx(spent.wall_s, abs=1e-6)


@given(
    st.lists(st.sampled_from(SEED_EVENTS), max_size=20), st.sampled_from(["mono", "step", "seat"])
)
def test_an_event_that_says_too_little_is_passed_over(
    events: list[dict[str, Any]], missing: str
) -> None:
    spent = goodput([{k: v for k, v in e.items() if k != missing} for e in events])
    total = spent.committed_s + sum(spent.lost_s.values())
    assert total == pytest.approx(spent.wall_s, abs=1e-6)
