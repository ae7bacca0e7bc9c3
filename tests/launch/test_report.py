"""The report's pictures and page, from the literal histories."""

import itertools
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ftkit.launch.checker import Expectation, check
from ftkit.launch.cli import main
from ftkit.launch.report import render, write_report
from ftkit.launch.report_svg import loss_plot, nice_ticks, timeline_plot
from ftkit.launch.report_timeline import Doing, read_timeline
from tests.launch.histories import Event, disturbed, event, undisturbed

KILL = Expectation(
    fault="kill", phase="backward", seed=7, world_size=3, steps=6, slots=8, slot_size=4
)
OUTCOME = check(disturbed(), undisturbed(), KILL)


def page(events: list[Event], reference: list[Event] | None) -> str:
    return render(events, reference, check(events, reference, KILL))


# ---- the timeline


def test_the_killed_seat_is_lost_then_joining_then_training() -> None:
    spans = [s for s in read_timeline(disturbed()).spans if s.seat == 1]
    assert [s.doing for s in spans] == [
        Doing.TRAINING, Doing.LOST, Doing.JOINING, Doing.TRAINING,
    ]  # fmt: skip
    assert [s.start for s in spans][1:] == pytest.approx([10.312, 10.35, 10.7])


def test_a_survivor_repairs_from_the_halt_to_its_next_commit() -> None:
    (repair,) = [
        s for s in read_timeline(disturbed()).spans if s.seat == 2 and s.doing is Doing.REPAIRING
    ]
    assert (repair.start, repair.end) == (10.340, 10.492)


def test_without_a_halt_a_rank_repairs_from_its_own_rollback() -> None:
    # Its link broke, and it stopped before it was told to.
    events = [e for e in disturbed() if e["kind"] != "halt"]
    starts = {s.seat: s.start for s in read_timeline(events).spans if s.doing is Doing.REPAIRING}
    assert starts == {0: 10.341, 2: 10.342}


def test_the_repair_alone_is_shown_larger() -> None:
    # The seat comes back 10 s later than in the literal history.
    late = [e | {"mono": e["mono"] + 10} if e["mono"] > 10.64 else e for e in disturbed()]
    whole = read_timeline(late)
    assert any(m.seat == 1 and m.step == 5 for m in whole.commits)
    assert whole.end - whole.start > 10
    steps = [
        event(10.65 + i / 10, "commit", seat=s, member=s, step=5 + i, generation=2, loss=1.0)
        for i in range(90)
        for s in (0, 2)
    ]
    near = read_timeline([*late, *steps], whole=False)
    assert near.start < 10.312
    assert 10.492 < near.end < 12


def test_the_spans_of_a_seat_neither_overlap_nor_leave_the_window() -> None:
    timeline = read_timeline(disturbed())
    for seat in timeline.seats:
        spans = [s for s in timeline.spans if s.seat == seat]
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
        assert spans[0].start >= timeline.start
        assert spans[-1].end <= timeline.end


def test_a_stopped_rank_is_lost_from_the_moment_it_was_stopped() -> None:
    # Its process exits much later, when it is fenced: that is not when it was lost.
    events = [e | {"mono": 10.45} if e["kind"] == "exit" and e["member"] == 1 else e
              for e in disturbed()]  # fmt: skip
    (lost,) = [s for s in read_timeline(events).spans if s.doing is Doing.LOST]
    assert lost.start == pytest.approx(10.312)


def test_a_long_run_is_cut_to_its_incident() -> None:
    quiet = [
        event(20 + i / 10, "commit", seat=0, member=0, step=7 + i, generation=3, loss=1.0)
        for i in range(500)
    ]
    timeline = read_timeline(disturbed() + quiet)
    assert timeline.end < 22
    assert any(f.text == "kill at backward" for f in timeline.faults)


# ---- the pictures


def test_both_curves_are_drawn_with_every_step() -> None:
    svg = ElementTree.fromstring(loss_plot({1: 5.0, 2: 4.0}, {1: 5.0, 2: 4.0, 3: 3.0}, []))
    lines = {e.get("class"): e.get("points", "") for e in svg.iter("polyline")}
    assert len(lines["disturbed"].split()) == 2
    assert len(lines["undisturbed"].split()) == 3
    assert lines["undisturbed"].startswith(lines["disturbed"])


@pytest.mark.parametrize(
    "losses", [{1: 3.0}, {1: 0.0, 2: 0.0}, {1: float("nan"), 2: 1.0}, {1: -1e9, 900: 1e9}]
)
def test_odd_losses_still_make_a_picture(losses: dict[int, float]) -> None:
    assert "nan" not in loss_plot(losses, {}, [(1, "kill")])
    ElementTree.fromstring(loss_plot(losses, {}, [(1, "a < b & c")]))


def test_no_loss_makes_a_sentence() -> None:
    assert "No step told a loss" in loss_plot({}, {}, [])


def test_the_timeline_is_a_row_for_each_rank_with_its_commits() -> None:
    svg = ElementTree.fromstring(timeline_plot(read_timeline(disturbed())))
    words = [e.text for e in svg.iter("text")]
    assert {"rank 0", "rank 1", "rank 2"} <= set(words)
    titles = [e.text for e in svg.iter("title")]
    assert "rank 1 committed step 5" in titles
    assert "rank 1 lost for 38 ms" in titles


def test_an_empty_timeline_makes_a_sentence() -> None:
    assert "No rank committed a step" in timeline_plot(read_timeline([]))


@given(
    st.floats(-1e6, 1e6, allow_nan=False),
    st.floats(0, 1e6, allow_nan=False),
    st.integers(2, 12),
)
def test_ticks_cover_the_range_and_rise(low: float, length: float, about: int) -> None:
    ticks = nice_ticks(low, low + length, about)
    assert 2 <= len(ticks) <= 2 * about + 3
    assert all(a < b for a, b in itertools.pairwise(ticks))
    # Up to a millionth of the picture, which is less than a pixel.
    slack = 1e-6 * (ticks[-1] - ticks[0])
    assert ticks[0] - slack <= low
    assert low + length <= ticks[-1] + slack


# ---- the page


def test_the_page_needs_nothing_from_outside() -> None:
    html = page(disturbed(), undisturbed())
    for outside in ("<script", "src=", "href=", "http", "@import", "url("):
        assert outside not in html


def test_the_page_tells_the_answer_the_story_and_the_equality() -> None:
    html = page(disturbed(), undisturbed())
    assert '<span class="pass">pass</span>' in html
    assert "rank 1 killed by SIGKILL in backward of step 3 → seen after 24 ms" in html
    assert "yes, bit for bit" in html
    assert "equal to the undisturbed run&#x27;s in all 6 steps" in html
    assert html.count("<svg") == 3


def test_a_failed_drill_says_what_was_broken_and_a_different_loss_is_named() -> None:
    off = [e | {"params": "bb", "loss": 9.0} if e["kind"] in ("final", "commit") else e
           for e in disturbed()]  # fmt: skip
    html = page(off, undisturbed())
    assert '<span class="fail">fail</span>' in html
    assert "the final parameters are not the undisturbed run&#x27;s" in html
    assert "differs from the undisturbed run&#x27;s at 6 steps, first at step 1" in html


def test_what_the_job_wrote_cannot_become_markup() -> None:
    evil = event(10.9, "verdict", fault="stopped", member=0, seat=0, reason="<b>x</b>")
    assert "<b>x</b>" not in page([*disturbed(), evil], undisturbed())


def test_a_run_without_events_still_has_a_page() -> None:
    html = page([], None)
    assert '<span class="unknown">unknown</span>' in html
    assert "Nothing went wrong" in html


def test_the_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(path, disturbed(), undisturbed(), OUTCOME)
    before = path.read_text(encoding="utf-8")
    assert before == render(disturbed(), undisturbed(), OUTCOME)

    def disk_full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_report(path, [], None, OUTCOME)
    assert path.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [path]


# ---- a run that was no drill


def test_a_run_from_which_nothing_was_expected_neither_passes_nor_fails() -> None:
    events = [e for e in disturbed() if e["kind"] != "drill"]
    told = render(events, None, None)
    assert "Drill" not in told
    assert "no undisturbed run to compare with" not in told
    assert "<h1>ftkit run, " in told
    assert "ranks lost</td><td>1<" in told
    cut = [e for e in events if e["kind"] != "end"]
    assert "no end was written" in render(cut, None, None)


def test_ticks_closer_than_they_are_wide_are_left_out() -> None:
    def steps(many: int) -> list[Event]:
        return [
            event(10 + i / 10, "commit", seat=0, member=0, step=i, generation=1, loss=1.0)
            for i in range(1, many)
        ]

    assert 'class="commit"' in timeline_plot(read_timeline(steps(100)))
    assert 'class="commit"' not in timeline_plot(read_timeline(steps(1000)))


def test_a_page_that_cannot_be_written_and_a_reference_that_is_none_are_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "run" / "events").mkdir(parents=True)
    run = str(tmp_path / "run")
    done = CliRunner().invoke(main, ["report", run, "--out", str(tmp_path)])
    assert (done.exit_code, f"--out {tmp_path} cannot be written" in done.stderr) == (64, True)
    done = CliRunner().invoke(main, ["report", run, "--reference", str(tmp_path / "nowhere")])
    assert (done.exit_code, "nowhere is not a run's folder" in done.stderr) == (64, True)


def test_events_that_ftkit_did_not_write_so_are_the_runs_fault(tmp_path: Path) -> None:
    (tmp_path / "run" / "events").mkdir(parents=True)
    lines = [json.dumps(e) + "\n" for e in (*disturbed(), event(1, "checkpoint"))]
    (tmp_path / "run" / "events" / "seat-0.jsonl").write_text("".join(lines))
    run, out = str(tmp_path / "run"), str(tmp_path / "report.html")
    done = CliRunner().invoke(main, ["report", run, "--out", out])
    assert (done.exit_code, "ftkit did not write so" in done.stderr) == (64, True)
