"""Spans: a run's steps and what was found wrong, as OpenTelemetry spans. Optional: `ftkit run --otel`.

`ftkit run` follows the run's own event files, so ranks and agents know nothing of it, and what they do
costs no more. One trace a run::

    ftkit.job                      the run; decisions are its events
      ftkit.step                   from one committed step to the next, once for all ranks
      ftkit.verdict                from when a fault is believed to have begun until it is over

Where spans go is OpenTelemetry's matter: its OTLP exporter reads OTEL_EXPORTER_OTLP_ENDPOINT and the
like. Spans that cannot be sent are dropped.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from ftkit.core.errors import UsageError
from ftkit.core.trace import MALFORMED
from ftkit.launch.event_tail import EventTail

#: Event files are looked at so often.
EVERY_S: Final = 1.0


class Spans:
    """Turns events into spans. One thread's object."""

    def __init__(self, tracer: Any, job: str) -> None:
        """Make spans with `tracer` (opentelemetry.trace.Tracer)."""
        self._tracer = tracer
        self._job = job
        self._root: Any = None
        self._parent: Any = None
        self._step = -1
        self._step_at = 0
        self._open: dict[tuple[object, object], Any] = {}
        self._last = 0

    def take(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take in events of the run, in order of time. What lacks a field is passed over."""
        for event in events:
            at = _ns(event["t"])
            if self._root is None:
                self._begin(at)
            self._last = max(self._last, at)
            try:
                self._take(event, at)
            except MALFORMED:
                continue

    def close(self) -> None:
        """The run is over: what is still wrong ends with it."""
        for span in [*self._open.values(), *filter(None, [self._root])]:
            span.end(end_time=self._last)
        self._open.clear()
        self._root = None

    def _begin(self, at: int) -> None:
        from opentelemetry.trace import set_span_in_context

        self._root = self._tracer.start_span(
            "ftkit.job", start_time=at, attributes={"ftkit.job": self._job}
        )
        self._parent = set_span_in_context(self._root)

    def _take(self, event: Mapping[str, Any], at: int) -> None:
        match event["kind"]:
            case "commit":
                self._commit(event, at)
            case "verdict" | "suspicion":
                key = event["member"], event["fault"]
                if key not in self._open:
                    # How long ago it began, on the clock of whoever says so.
                    ago = max(0.0, float(event["mono"]) - float(event["since_s"]))
                    self._open[key] = self._tracer.start_span(
                        "ftkit.verdict", self._parent, start_time=at - _ns(ago)
                    )
                for name in ("fault", "seat", "member", "reason", "confidence", "peer"):
                    if event.get(name) is not None:
                        self._open[key].set_attribute(f"ftkit.{name}", event[name])
                self._open[key].set_attribute("ftkit.suspected", event["kind"] == "suspicion")
            case "verdict-over":
                span = self._open.pop((event["member"], event["fault"]), None)
                if span is not None:
                    span.end(end_time=at)
            case "decision":
                told = {f"ftkit.{n}": str(event[n]) for n in ("action", "reason") if n in event}
                self._root.add_event("decision", told, timestamp=at)
            case _:
                pass

    def _commit(self, event: Mapping[str, Any], at: int) -> None:
        """The first rank that commits a step ends it, whatever had to be played again before."""
        step = int(event["step"])
        if step <= self._step:
            return
        begun, self._step, self._step_at = self._step_at, step, at
        if not begun:
            return  # when the first one began nobody has said
        attributes: dict[str, Any] = {"ftkit.step": step}
        if event.get("generation") is not None:
            attributes["ftkit.generation"] = event["generation"]
        if event.get("loss") is not None:
            attributes["ftkit.loss"] = event["loss"]
        span = self._tracer.start_span(
            "ftkit.step", self._parent, start_time=begun, attributes=attributes
        )
        span.end(end_time=at)


class Follower:
    """Sends the spans of one run as it goes on. `poll` now and then, `close` in the end."""

    def __init__(self, run_dir: Path, job: str, clock: Callable[[], float]) -> None:
        """Begin to follow. UsageError: OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise UsageError(
                f"--otel needs OpenTelemetry ({error}): pip install 'ftkit[otel]'"
            ) from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "ftkit"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._spans = Spans(self._provider.get_tracer("ftkit"), job)
        self._tail = EventTail(run_dir)
        self._clock, self._due = clock, 0.0

    def poll(self) -> None:
        """Look for new events, if it is time."""
        if self._clock() >= self._due:
            self._due = self._clock() + EVERY_S
            self._spans.take(self._tail.poll())

    def close(self) -> None:
        """Send what is left. Blocks for as long as the exporter tries."""
        self._spans.take(self._tail.poll())
        self._spans.close()
        self._provider.shutdown()


def _ns(seconds: float) -> int:
    return int(float(seconds) * 1e9)
