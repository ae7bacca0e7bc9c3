"""The report's picture of storage: for each step that went to disk, where its time went. Pure."""

from collections.abc import Iterable
from html import escape

from ftkit.launch.report_history import Event
from ftkit.launch.report_svg import WIDTH, nice_ticks
from ftkit.launch.storage_story import PARTS, storage_story

_LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 64, 16, 16, 40, 240

#: Of a snapshot in memory: what its rank was held up for.
_MEMORY = "memory"


def storage_section(events: Iterable[Event]) -> str:
    """A heading, a paragraph and the bars; empty for a run that wrote no checkpoint."""
    events = list(events)
    written = [e for e in events if e["kind"] == "checkpoint"]
    if not written:
        return ""
    names = [_MEMORY, *PARTS.values()]
    legend = "".join(f'<i class="{name}"></i>{name}' for name in names)
    blocked: dict[int, float] = {}
    for event in events:
        if event["kind"] == "snapshot":
            step, spent = int(event["step"]), float(event["begin_s"]) + float(event["gate_s"])
            blocked[step] = max(blocked.get(step, 0.0), spent)
    bars = [
        (
            int(e["step"]),
            {_MEMORY: blocked.get(int(e["step"]), 0.0)}
            | {name: float(e[key]) for key, name in PARTS.items()},
        )
        for e in written
    ]
    return (
        f"<h2>Checkpoints</h2><p>{escape(storage_story(events).paragraph())}</p>"
        f"<p>{legend}<i></i>Seconds a step: of all writers together, beside training; memory is "
        f"what the slowest rank was held up for.</p>{storage_plot(bars)}"
    )


def storage_plot(bars: list[tuple[int, dict[str, float]]]) -> str:
    """One bar a step, of seconds by part, the first part at the bottom.

    Args:
      bars: (step, seconds by part); the parts' names are the style classes.
    """
    ticks = nice_ticks(0.0, max(max(sum(parts.values()) for _, parts in bars), 1e-6), 5)
    slot = (WIDTH - _LEFT - _RIGHT) / len(bars)

    def y(seconds: float) -> float:
        return _HEIGHT - _BOTTOM - seconds / ticks[-1] * (_HEIGHT - _TOP - _BOTTOM)

    label = "Where the time of each checkpoint went"
    drawn = [f'<svg viewBox="0 0 {WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
    drawn += [
        f'<line class="grid" x1="{_LEFT}" y1="{y(tick):.1f}" x2="{WIDTH - _RIGHT}" '
        f'y2="{y(tick):.1f}"/>'
        f'<text x="{_LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g} s</text>'
        for tick in ticks
    ]
    every = -(-len(bars) // 20)
    for index, (step, parts) in enumerate(bars):
        left, height = _LEFT + index * slot, 0.0
        for name, seconds in parts.items():
            top = y(height + seconds)
            drawn.append(
                f'<rect class="{name}" x="{left + slot * 0.1:.1f}" y="{top:.1f}" '
                f'width="{slot * 0.8:.1f}" height="{y(height) - top:.2f}">'
                f"<title>step {step}: {name} {seconds * 1e3:.1f} ms</title></rect>"
            )
            height += seconds
        if index % every == 0:
            drawn.append(
                f'<text x="{left + slot / 2:.1f}" y="{_HEIGHT - _BOTTOM + 18}" '
                f'text-anchor="middle">{step}</text>'
            )
    drawn.append(f'<text x="{WIDTH / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>')
    return "".join([*drawn, "</svg>"])
