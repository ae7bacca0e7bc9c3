"""The live view: its reducer, the tail of event files, and both ways of showing it."""

import io
import json
import math
import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ftkit.core.trace import Trace
from ftkit.launch.checker import Expectation, check
from ftkit.launch.event_tail import EventTail
from ftkit.launch.live import summary, watch
from ftkit.launch.report_view import RunView, duration
from tests.launch.histories import Event, disturbed, event, undisturbed, votes

STORY = (
    "rank 1 killed by SIGKILL in backward of step 3 → seen after 24 ms → "
    "survivors committed step 3 after 180 ms → rank 1 back at step 5"
)


def in_time(events: list[Event]) -> list[Event]:
    return sorted(events, key=lambda e: float(e["mono"]))


def fed(events: list[Event]) -> RunView:
    view = RunView()
    for e in events:
        view.feed(e)
    return view


# ---- the reducer


def test_the_story_of_a_kill() -> None:
    view = fed(in_time(disturbed()))
    assert [s.sentence() for s in view.stories] == [STORY]
    assert (view.step, view.loss, view.generation) == (6, 3.5, 3)
    assert (view.ended, view.outcome) == (True, "completed")


def test_the_story_grows_as_it_happens_and_is_told_once_a_turn() -> None:
    view = RunView()
    told = [s.sentence() for e in in_time(disturbed()) if (s := view.feed(e)) is not None]
    parts = STORY.split(" → ")
    assert told == [" → ".join(parts[:n]) for n in (1, 2, 3, 4)]


def test_the_world_shrinks_and_grows() -> None:
    view, sizes = RunView(), list[int]()
    for e in in_time(disturbed()):
        view.feed(e)
        if not sizes or sizes[-1] != view.world_size:
            sizes.append(view.world_size)
    assert sizes == [0, 1, 2, 3, 2, 3, 2, 1, 0]


def test_without_a_drill_the_signs_tell_the_story() -> None:
    view = fed(in_time([e for e in disturbed() if e["kind"] != "drill"]))
    (story,) = view.stories
    assert story.sentence().startswith("rank 1 killed by SIGKILL at step 3 → seen after 16 ms")


def test_a_verdict_said_again_changes_nothing() -> None:
    again = [e | {"mono": 10.5} for e in disturbed() if e["kind"] == "verdict"]
    assert fed(in_time(disturbed() + again)).stories[0].sentence() == STORY


def test_a_coordinator_has_a_story_too() -> None:
    drill = event(10.25, "drill", fault="kill-coordinator", phase="forward", step=3)
    (story,) = fed(in_time([*undisturbed(), drill])).stories
    assert story.sentence() == (
        "coordinator killed by SIGKILL in forward of step 3 → ranks committed step 3 after 55 ms"
    )
    assert story.closed


def test_a_survivor_that_dies_too_is_not_waited_for() -> None:
    second = [
        event(10.40, "drill", fault="kill", phase="backward", seat=2, member=2, step=3),
        event(10.41, "exit", seat=2, member=2, code=None, signal=9),
    ]
    events = [e for e in disturbed() if not (e.get("member") == 2 and e["mono"] > 10.4)]
    first, other = fed(in_time(events + second)).stories
    assert first.repaired_at == pytest.approx(10.492)
    assert other.seat == 2
    assert not other.closed


def test_a_line_without_its_fields_is_passed_over() -> None:
    view = RunView()
    for bad in (
        {},
        {"kind": "commit"},
        {"kind": "commit", "mono": "x"},
        {"mono": 1, "kind": "vote"},
        event(1, "commit", seat=0, member=0, step=math.inf, generation=1),
    ):
        assert view.feed(bad) is None
    assert view == RunView()


@pytest.mark.parametrize(
    ("loss", "told"), [(math.nan, "nan"), (-math.inf, "-inf"), (2.5, 2.5), (None, None)]
)
def test_a_loss_that_json_cannot_say_is_a_word(loss: float | None, told: object) -> None:
    view = fed([event(1, "commit", seat=0, member=0, step=1, generation=1, loss=loss)])
    assert json.loads(json.dumps(view.to_json(), allow_nan=False))["loss"] == told


@given(st.randoms(use_true_random=False))
def test_any_order_of_events_is_taken(shuffle: random.Random) -> None:
    events = disturbed()
    shuffle.shuffle(events)
    view = fed(events)
    assert (view.step, view.ended, len(view.stories)) == (6, True, 1)
    assert "in backward of step 3" in view.stories[0].sentence()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0244, "24 ms"), (0.2996, "300 ms"), (0.41, "0.41 s"), (12.3, "12 s")],
)
def test_durations_are_for_people(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# ---- the tail


def test_a_tail_follows_files_that_appear_and_lines_that_grow(tmp_path: Path) -> None:
    tail = EventTail(tmp_path)
    assert tail.poll() == []  # the folder does not exist yet
    with Trace(tmp_path / "events" / "a.jsonl", seat=0) as trace:
        trace.event("first")
        assert [e["kind"] for e in tail.poll()] == ["first"]
        assert tail.poll() == []
        trace.event("second")
        (tmp_path / "events" / "b.jsonl").write_text('{"mono": 1.0, "kind": "half"')
        assert [e["kind"] for e in tail.poll()] == ["second"]
    with (tmp_path / "events" / "b.jsonl").open("a") as file:
        file.write("}\n")
    assert [e["kind"] for e in tail.poll()] == ["half"]
    assert tail.unreadable == 0


def test_a_broken_line_is_counted_and_the_next_one_read(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    bad = ["gar\0bage", "[1]", '{"kind": "timeless"}', '{"mono": 3}']
    lines = ['{"mono": 1, "kind": "a"}', *bad, '{"mono": 2, "kind": "b"}']
    (tmp_path / "events" / "x.jsonl").write_text("\n".join(lines) + "\n")
    tail = EventTail(tmp_path)
    assert [e["mono"] for e in tail.poll()] == [1, 2]
    assert tail.unreadable == len(bad)


# ---- showing it


def write(run_dir: Path, events: list[Event]) -> None:
    (run_dir / "events").mkdir(exist_ok=True)
    with (run_dir / "events" / "all.jsonl").open("a") as file:
        file.writelines(json.dumps(e) + "\n" for e in events)


def shown(run_dir: Path, *, terminal: bool, stopped: bool = False) -> tuple[RunView, str]:
    out, stop = io.StringIO(), threading.Event()
    if stopped:
        stop.set()
    console = Console(file=out, force_terminal=terminal, width=150, _environ={"TERM": "xterm"})
    view = watch(run_dir, stop=stop, steps=6, console=console, interval_s=0.01)
    return view, out.getvalue()


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    write(tmp_path, disturbed())
    view, text = shown(tmp_path, terminal=False)
    assert view.ended
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[-2] == STORY
    assert lines[-1].startswith("training: step 6 of 6  loss 3.5000")


def test_a_terminal_gets_a_bar_and_a_line_for_the_incident(tmp_path: Path) -> None:
    write(tmp_path, disturbed())
    _, text = shown(tmp_path, terminal=True)
    assert "6/6" in text
    assert STORY in text


def test_watching_goes_on_until_the_end_is_written(tmp_path: Path) -> None:
    write(tmp_path, votes(10.1, 1, 1, {0: 0, 1: 1, 2: 2}))
    views: list[RunView] = []
    thread = threading.Thread(target=lambda: views.append(shown(tmp_path, terminal=False)[0]))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()  # nothing said that the run is over
    write(tmp_path, disturbed())
    thread.join(10)
    assert views[0].outcome == "completed"


def test_a_stopped_watch_reads_what_was_written_and_returns(tmp_path: Path) -> None:
    write(tmp_path, [e for e in disturbed() if e["kind"] != "end"])
    view, _ = shown(tmp_path, terminal=False, stopped=True)
    assert (view.ended, view.step) == (False, 6)


def test_the_summary_has_every_figure() -> None:
    plan = Expectation(
        fault="kill", phase="backward", seed=7, world_size=3, steps=6, slots=8, slot_size=4
    )
    out = io.StringIO()
    Console(file=out, width=120).print(summary(check(disturbed(), undisturbed(), plan)))
    text = out.getvalue()
    for words in ("kill at backward: pass", "24 ms", "180 ms", "0 / 0", "yes, bit for bit"):
        assert words in text

    out = io.StringIO()
    spoilt = [e | {"slots": [0]} if e["kind"] == "vote" else e for e in disturbed()]
    Console(file=out, width=120).print(summary(check(spoilt, None, plan)))
    assert "no undisturbed run to compare with" in out.getvalue()
    assert "slots missing [1, 2, 3, 4, 5, 6, 7]" in out.getvalue()
