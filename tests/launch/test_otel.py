"""A run's events as OpenTelemetry spans. Where its SDK is not installed these are skipped."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.launch.otel import Follower, Spans


def event(t: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"t": t, "mono": t - 1000.0, "kind": kind, **fields}


EVENTS = [
    event(1000.0, "spawn", pid=1),
    event(1001.0, "commit", step=1, generation=1, loss=2.0, seat=0),
    event(1001.1, "commit", step=1, generation=1, loss=2.0, seat=1),
    event(1002.0, "commit", step=2, generation=1, loss=None, seat=1),
    event(1002.1, "commit", step=2, generation=1, loss=1.0, seat=0),
    event(1003.0, "suspicion", fault="sdc", member=7, seat=1, since_s=1.0, reason="r", peer=None,
          confidence=0.5),
    event(1003.5, "verdict", fault="sdc", member=7, seat=1, since_s=1.0, reason="s", peer=None,
          confidence=0.9),
    event(1004.0, "verdict", fault="exited", member=8, seat=2, since_s=4.0, reason="gone", peer=3,
          confidence=1.0),
    event(1004.5, "verdict", fault="slow"),  # of a later version
    event(1005.0, "verdict-over", fault="sdc", member=7, seat=1, suspected=False, lasted_s=4.0),
    event(1006.0, "decision", action="replace", reason="seat 2 is gone"),
    event(1009.0, "end", outcome="completed"),
]  # fmt: skip


def test_steps_and_verdicts_are_spans_of_one_trace() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="ftkit[otel] is not installed")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider, out = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(out))
    spans = Spans(provider.get_tracer("t"), "job-1")
    spans.take(EVENTS[:5])
    spans.take(EVENTS[5:])
    spans.close()
    spans.close()
    told = [
        (s.name, s.start_time / 1e9, s.end_time / 1e9, dict(s.attributes))
        for s in out.get_finished_spans()
    ]
    assert told[0] == ("ftkit.step", 1001.0, 1002.0, {"ftkit.step": 2, "ftkit.generation": 1})
    name, start, end, attributes = told[1]
    assert (name, start, end) == ("ftkit.verdict", 1001.0, 1005.0)
    assert (attributes["ftkit.reason"], attributes["ftkit.suspected"]) == ("s", False)
    assert [(n, s, e) for n, s, e, _ in told[2:]] == [
        ("ftkit.verdict", 1004.0, 1009.0),
        ("ftkit.job", 1000.0, 1009.0),
    ]
    assert told[2][3]["ftkit.peer"] == 3
    finished = out.get_finished_spans()
    root = finished[-1]
    assert root.events[0].attributes["ftkit.action"] == "replace"
    assert {s.parent.span_id for s in finished[:-1]} == {root.context.span_id}


def test_without_opentelemetry_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(UsageError, match=r"ftkit\[otel\]"):
        Follower(tmp_path, "job", lambda: 0.0)
