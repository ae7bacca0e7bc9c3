"""The parts of the page: well formed, escaped, bounded, and sent only when they changed."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from ftkit.launch.ui.live_page import LivePage
from ftkit.launch.ui.page import TILES_MAX, parts, size
from ftkit.launch.ui.view import UiView
from tests.launch.histories import Event, disturbed, event
from tests.launch.test_report_pace import ledger

INDEX = Path(__file__).parents[3] / "ftkit/launch/ui/static/index.html"


def shown(events: list[Event], bundles: list[tuple[int, str]] | None = None) -> dict[str, str]:
    view = UiView()
    for e in sorted(events, key=lambda e: float(e["mono"])):
        view.feed(e)
    return parts(view, view.ranks({}, 0), bundles or [])


def steps() -> list[Event]:
    return [event(10.3, "steps", **e) for e in map(dict, ledger({0: 1.0, 1: 1.5})) if e.pop("kind")]


@pytest.mark.parametrize("events", [[], disturbed()])
def test_every_part_is_well_formed_and_has_its_element(events: list[Event]) -> None:
    index = INDEX.read_text()
    for name, html in shown(events).items():
        ElementTree.fromstring(f"<x>{html.replace('colspan=5', '')}</x>")
        assert f'id="{name}"' in index


def test_the_page_tells_of_the_kill_and_of_the_repair() -> None:
    page = shown([*disturbed(), *steps()], [(1, "Incident 1: exited.")])
    assert "survivors committed step 3 after 180 ms" in page["incidents"]
    assert "What was kept of incident 1" in page["incidents"]
    assert "rank 1 lost for 38 ms" in page["timeline"]
    assert "rank 0 waited 1.5 s for rank 1" in page["waits"]
    assert "killed by SIGKILL" in page["happened"]
    assert "completed: 6 steps" in page["now"]


def test_words_of_a_job_are_never_taken_for_markup() -> None:
    evil = "<img src=x onerror=alert(1)>"
    events = [
        event(1, "spawn", seat=0, member=0),
        event(2, "verdict", fault=evil, member=0, seat=0, reason=evil, since_s=1),
        event(3, "decision", action=evil, reason=evil),
        event(4, "checkpoint-failed", step=1, reason=evil),
        event(5, "end", outcome=evil, reason=evil),
    ]
    for cut in (4, 5):
        assert "<img" not in json.dumps(shown(events[:cut], [(1, evil)]))


def test_of_a_large_job_those_in_trouble_are_shown() -> None:
    events = [event(1, "spawn", seat=s, member=s) for s in range(TILES_MAX + 100)]
    events += [event(2, "admit", seat=s, member=s) for s in range(TILES_MAX + 99)]
    html = shown(events)["ranks"]
    assert html.count('class="tile ') == TILES_MAX
    assert f"<b>{TILES_MAX + 99}</b>" in html  # it does not train
    assert "100 more ranks train" in html


def test_a_part_is_sent_again_only_when_it_has_changed(tmp_path: Path) -> None:
    file = tmp_path / "events" / "all.jsonl"
    file.parent.mkdir()

    def write(events: list[Event]) -> None:
        with file.open("a") as out:
            out.writelines(json.dumps(e) + "\n" for e in events)

    page = LivePage(tmp_path, look_s=0.0)
    write([e for e in disturbed() if e["mono"] < 10.3])
    first = page.answer(0)
    assert set(first["parts"]) == set(shown([]))  # type: ignore[call-overload]
    again = page.answer(int(first["revision"]))  # type: ignore[call-overload]
    assert again["parts"] == {}
    write([event(10.31, "halt", generation=1, reason="member 1 exited")])
    after = page.answer(int(again["revision"]))  # type: ignore[call-overload]
    assert "happened" in after["parts"]  # type: ignore[operator]
    assert "loss" not in after["parts"]  # type: ignore[operator]


def test_a_viewer_that_was_started_anew_sends_all_parts(tmp_path: Path) -> None:
    seen = int(LivePage(tmp_path).answer(0)["revision"])  # type: ignore[call-overload]
    newer = LivePage(tmp_path)
    assert newer.answer(seen)["parts"].keys() == shown([]).keys()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (4.2e8, "420 MB")]
)
def test_bytes_are_for_people(count: float, words: str) -> None:
    assert size(count) == words
