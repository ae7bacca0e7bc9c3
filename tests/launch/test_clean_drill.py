"""The drill in which nothing is wrong: what it does, and how what was said is judged."""

from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.trace import Trace, read_run
from ftkit.launch.checker import Answer
from ftkit.launch.clean_drill import CLEAN, CleanStriker, judge_clean
from ftkit.launch.drill_plan import choose
from ftkit.launch.pace_drills import ACCUSING
from tests.launch.test_pace_drills import BEFORE, event, said

HAPPENED = [
    event(10.0, "commit", step=20, seat=1),
    event(11.0, "evaluation", step=25, loss=2.0),
    event(12.0, "drill", fault=CLEAN, seat=1, step=60),
    event(13.0, "left", seat=1, member=1, step=61),
    event(14.0, "checkpoint", step=40),
    event(20.0, "commit", step=90, seat=1),
]


def without(kind: str) -> list[dict[str, Any]]:
    return [e for e in HAPPENED if e["kind"] != kind]


def test_it_passes_when_all_of_it_happened_and_nobody_was_accused() -> None:
    told = [*HAPPENED, said(15.0, "starved", 0), said(16.0, "imbalance", 2)]
    outcome = judge_clean(BEFORE, told, accusing=ACCUSING)
    assert outcome.outcome is Answer.PASS
    assert outcome.evidence["said"] == [("imbalance", 2), ("starved", 0)]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (said(15.0, "slow", 0), "seat 0 was accused"),
        (said(15.0, "hang-blocked", 0), "seat 0 was accused"),
        (event(15.0, "halt", reason="eviction"), "a halt: eviction"),
    ],
)
def test_an_accusation_or_a_halt_fails_it(more: dict[str, Any], text: str) -> None:
    outcome = judge_clean(BEFORE, [*HAPPENED, more], accusing=ACCUSING)
    assert outcome.outcome is Answer.FAIL
    assert text in str(outcome.evidence["problems"])


@pytest.mark.parametrize(
    ("events", "text"),
    [
        (without("evaluation"), "no evaluation"),
        (without("checkpoint"), "no checkpoint"),
        (without("drill"), "no node was taken away"),
        (without("left"), "seat 1 did not leave"),
        (HAPPENED[:-1], "seat 1 was not back"),
    ],
)
def test_what_did_not_happen_leaves_it_open(events: list[dict[str, Any]], text: str) -> None:
    outcome = judge_clean(BEFORE, events, accusing=ACCUSING)
    assert outcome.outcome is Answer.UNKNOWN
    assert text in str(outcome.evidence["missing"])


class Drained:
    """An engine that notes which nodes it was told to take away."""

    def __init__(self) -> None:
        self.nodes: list[int] = []

    def drain_node(self, node: int) -> None:
        self.nodes.append(node)


def test_a_core_is_busy_and_a_node_leaves_once_each(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    striker = CleanStriker(node=1, nproc=2, steps=120, run_dir=tmp_path)
    engine: Any = Drained()
    try:
        with Trace(tmp_path / "events" / "rank.jsonl") as trace:
            for step in (29, 30, 39, 40, 41):
                trace.event("commit", step=step)
                striker.poll(engine)
                assert (striker.busy is not None) == (step >= 30)
                assert engine.nodes == ([1] if step >= 40 else [])
        busy = striker.busy
        assert busy is not None
        assert busy.poll() is None
    finally:
        striker.close()
    assert busy.poll() is not None
    assert [e["seat"] for e in read_run(tmp_path) if e["kind"] == "drill"] == [2, 3]
    assert striker.settings["checkpoint_every"] > 0


def test_it_needs_others_to_compare_with() -> None:
    drill = choose(CLEAN, None, seed=1, nproc=3, steps=200)
    assert drill.phase is None
    assert drill.pace is None
    with pytest.raises(UsageError, match="--nproc 3"):
        choose(CLEAN, None, seed=1, nproc=2, steps=200)
