"""Where the time went, in a paragraph and in JSON."""

import json
from xml.etree import ElementTree

import pytest

from ftkit.launch.report_storage import storage_plot, storage_section
from ftkit.launch.storage_story import storage_story


def snapshot(step: int, seat: int, blocked_ms: float) -> dict[str, object]:
    return {"kind": "snapshot", "step": step, "seat": seat, "bytes": 4_000_000,
            "begin_s": blocked_ms / 2e3, "gate_s": blocked_ms / 2e3}  # fmt: skip


def checkpoint(step: int) -> dict[str, object]:
    return {"kind": "checkpoint", "step": step, "stored_bytes": 6_000_000, "seconds": 0.5,
            "codec_s": 0.1, "write_s": 0.2, "fsync_s": 0.15, "commit_s": 0.05}  # fmt: skip


def test_a_run_is_told_in_a_paragraph() -> None:
    events = [
        snapshot(10, 0, 1.0),
        snapshot(10, 1, 3.0),
        snapshot(11, 0, 1.5),
        checkpoint(10),
        {"kind": "checkpoint-failed", "step": 20, "reason": "node 1: /disk is full."},
        {"kind": "checkpoint-skipped", "seat": 0, "step": 30, "reason": "step 20 ..."},
        {"kind": "checkpoint-skipped", "seat": 1, "step": 30, "reason": "step 20 ..."},
        {"kind": "checkpoint-skipped", "coordinator": 1, "step": 5, "reason": "it is damaged"},
        checkpoint(40),
        {"kind": "commit", "step": 40},
    ]
    story = storage_story(events)
    assert story.checkpoints == (10, 40)
    assert story.skipped == (30,)
    assert story.parts_s == {"codec": 0.2, "write": 0.4, "fsync": 0.3, "commit": 0.1}
    text = story.paragraph()
    assert "3 snapshots of 4 MB each" in text
    assert "1.50 ms (median)" in text
    assert "2 checkpoints went to disk, the newest of step 40: 12 MB in 1.00 s, 12 MB/s" in text
    assert "That of step 20 was given up: node 1: /disk is full." in text
    assert "1 were skipped" in text
    assert json.loads(json.dumps(story.to_json()))["failures"] == {"20": "node 1: /disk is full."}


def test_a_run_without_any_has_nothing_to_tell() -> None:
    assert storage_story([{"kind": "commit", "step": 1}]).paragraph() == ""


def test_the_bars_are_as_high_as_their_seconds() -> None:
    bars = [(10, {"codec": 0.25, "write": 0.5}), (20, {"codec": 0.0, "write": 0.25})]
    picture = ElementTree.fromstring(storage_plot(bars))
    rects = picture.findall("rect")
    heights = [float(r.attrib["height"]) for r in rects]
    assert [r.attrib["class"] for r in rects] == ["codec", "write"] * 2
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.02)
    assert heights[2] == 0
    assert heights[3] == pytest.approx(heights[0], abs=0.02)
    first, second = rects[:2]
    assert float(second.attrib["y"]) + heights[1] == pytest.approx(
        float(first.attrib["y"]), abs=0.1
    )
    assert [t.text for t in picture.findall("text")][-3:] == ["10", "20", "step"]


def test_only_a_run_with_checkpoints_has_the_picture() -> None:
    assert storage_section([snapshot(10, 0, 1.0)]) == ""
    page = storage_section([snapshot(10, 0, 1.0), checkpoint(10), checkpoint(20)])
    assert page.count("<rect") == 10
    assert "2 checkpoints went to disk" in page
