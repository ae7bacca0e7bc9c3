"""The report's two pictures as inline SVG: losses over steps, and seats over time. Pure."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from ftkit.launch.report_timeline import Timeline

WIDTH = 860
_LEFT, _RIGHT = 64, 16
_PLOT_WIDTH = WIDTH - _LEFT - _RIGHT


def loss_plot(
    disturbed: Mapping[int, float],
    undisturbed: Mapping[int, float],
    faults: Sequence[tuple[int, str]],
) -> str:
    """Loss over steps of both runs; where they are equal the thin line lies on the wide one.

    Args:
      disturbed: loss by step.
      undisturbed: the same of the run without a fault; may be empty.
      faults: (step, words), each drawn as a vertical line.
    """
    finite = [v for v in (*disturbed.values(), *undisturbed.values()) if math.isfinite(v)]
    if not finite:
        return "<p>No step told a loss.</p>"
    height, top, bottom = 320, 16, 40
    steps = [*disturbed, *undisturbed]
    low_step, high_step = min(steps), max(max(steps), min(steps) + 1)
    ticks = nice_ticks(min(finite), max(finite), 5)
    low, high = min(ticks[0], min(finite)), max(ticks[-1], max(finite))

    def x(step: float) -> float:
        return _LEFT + (step - low_step) / (high_step - low_step) * _PLOT_WIDTH

    def y(loss: float) -> float:
        return top + (high - loss) / (high - low) * (height - top - bottom)

    parts = [opening(height, "Loss of the disturbed and of the undisturbed run over steps")]
    for tick in ticks:
        parts.append(_line(_LEFT, y(tick), WIDTH - _RIGHT, y(tick), "grid"))
        parts.append(text(_LEFT - 8, y(tick) + 4, f"{tick:g}", "end"))
    parts += [
        text(x(tick), height - bottom + 18, f"{tick:g}", "middle")
        for tick in nice_ticks(low_step, high_step, 8)
        if low_step <= tick <= high_step
    ]
    parts.append(text(_LEFT + _PLOT_WIDTH / 2, height - 6, "step", "middle"))
    for losses, style in ((undisturbed, "undisturbed"), (disturbed, "disturbed")):
        points = " ".join(
            f"{x(s):.1f},{y(v):.1f}" for s, v in sorted(losses.items()) if math.isfinite(v)
        )
        parts.append(f'<polyline class="{style}" points="{points}"/>')
    for step, words in faults:
        parts.append(_line(x(step), top, x(step), height - bottom, "fault"))
        side, shift = ("end", -6) if x(step) > WIDTH / 2 else ("start", 6)
        parts.append(text(x(step) + shift, top + 12, words, side))
    return "".join([*parts, "</svg>"])


def timeline_plot(timeline: Timeline) -> str:
    """A row for each seat: what it was doing, its commits as ticks, the faults as lines."""
    if not timeline.seats or timeline.end <= timeline.start:
        return "<p>No rank committed a step.</p>"
    row, top, bottom = 34, 26, 40
    height = top + row * len(timeline.seats) + bottom
    origin = timeline.faults[0].at if timeline.faults else timeline.start
    length = timeline.end - timeline.start

    def x(at: float) -> float:
        return _LEFT + (at - timeline.start) / length * _PLOT_WIDTH

    tops = {seat: top + row * i for i, seat in enumerate(timeline.seats)}
    parts = [opening(height, "What each rank was doing around the incident")]
    for seat, y in tops.items():
        parts.append(text(_LEFT - 8, y + 19, f"rank {seat}", "end"))
    for span in timeline.spans:
        took = (span.end - span.start) * 1000
        parts.append(
            f'<rect class="{span.doing}" x="{x(span.start):.1f}" y="{tops[span.seat] + 4}" '
            f'width="{max(x(span.end) - x(span.start), 0.5):.1f}" height="{row - 12}">'
            f"<title>rank {span.seat} {span.doing} for {took:.0f} ms</title></rect>"
        )
    labelled: set[int] = set()
    # Closer than this, ticks would be all that is seen of a row.
    room = len(timeline.commits) <= len(tops) * _PLOT_WIDTH / 3
    for mark in timeline.commits if room else ():
        if mark.seat not in tops:
            continue
        y = tops[mark.seat]
        parts.append(
            f'<line class="commit" x1="{x(mark.at):.1f}" y1="{y + 4}" x2="{x(mark.at):.1f}" '
            f'y2="{y + row - 8}"><title>rank {mark.seat} committed step {mark.step}</title></line>'
        )
        if mark.step not in labelled and len(timeline.commits) <= 40 * len(tops):
            labelled.add(mark.step)
            parts.append(text(x(mark.at), top - 4, str(mark.step), "middle", "small"))
    parts += [
        _line(x(fault.at), top, x(fault.at), height - bottom + 4, "fault")
        for fault in timeline.faults
    ]
    for tick in nice_ticks(timeline.start - origin, timeline.end - origin, 8):
        if timeline.start <= origin + tick <= timeline.end:
            label = f"{tick:g} s"
            parts.append(text(x(origin + tick), height - bottom + 18, label, "middle"))
    whence = "the fault" if timeline.faults else "the first step shown"
    parts.append(text(_LEFT + _PLOT_WIDTH / 2, height - 6, f"time since {whence}", "middle"))
    return "".join([*parts, "</svg>"])


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` round numbers that cover low..high, at least two, rising."""
    if high - low < 1e-9 * max(1.0, abs(low)):
        high = low + max(abs(low), 1e-6)  # too flat for round numbers to tell apart
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.floor(low / width), math.ceil(high / width)
    return [float(f"{i * width:.12g}") for i in range(first, last + 1)]


def opening(height: int, label: str) -> str:
    """The start of a picture as wide as all are; `label` is for those who cannot see it."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, anchor: str, style: str = "label") -> str:
    """Words at a place; `anchor` as in SVG: start, middle, end."""
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )
