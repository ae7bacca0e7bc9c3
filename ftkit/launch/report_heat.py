"""Heat maps of a report as inline SVG: rank by step, who waits for whom, dp x pp x tp. Pure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from statistics import median

from ftkit.launch.report_svg import WIDTH, opening, text

_LEFT, _TOP = 64, 20
#: Of a job larger than that, the rows that differ most are shown.
ROWS_MAX = 64
#: Of a run longer than that, neighbouring steps share a column, which shows the worst of them.
COLUMNS_MAX = 180
#: This many times the median, and everything above, has the full colour.
_FULL = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's coordinates in a job that is parallel in three ways."""

    dp: int
    pp: int
    tp: int


def step_heat(seconds: Mapping[int, Mapping[int, float]]) -> str:
    """Each rank's own work by step, against the median of all ranks in that step.

    Args:
      seconds: seat -> step -> seconds of work, waiting left out. Ranks may lack steps.
    """
    ratios = ratio_to_median(seconds)
    steps = sorted({step for row in ratios.values() for step in row})
    if not steps:
        return "<p>No step was timed.</p>"
    bundle = math.ceil(len(steps) / COLUMNS_MAX)
    columns = [steps[i : i + bundle] for i in range(0, len(steps), bundle)]
    seats = sorted(ratios, key=lambda seat: -max(ratios[seat].values(), default=0.0))
    shown = sorted(seats[:ROWS_MAX])
    size = min(24.0, (WIDTH - _LEFT - 8) / len(columns))
    row = 16
    height = _TOP + row * len(shown) + 22
    parts = [opening(height, "Work of each rank in each step against the median")]
    for line, seat in enumerate(shown):
        y = _TOP + row * line
        parts.append(text(_LEFT - 8, y + 12, f"rank {seat}", "end", "small"))
        for column, together in enumerate(columns):
            here = [ratios[seat][step] for step in together if step in ratios[seat]]
            if here:
                span = _span(together[0], together[-1])
                words = f"rank {seat}, step {span}: {max(here):.2f} x the median"
                cell = _LEFT + column * size, y + 1, size, row - 2
                parts.append(_cell(*cell, _shade(max(here)), words))
    parts.append(text(_LEFT, height - 6, f"step {steps[0]}", "start", "small"))
    parts.append(text(_LEFT + size * len(columns), height - 6, f"{steps[-1]}", "end", "small"))
    if len(seats) > len(shown):
        parts.append(text(WIDTH / 2, 12, f"{len(shown)} of {len(seats)} ranks", "middle", "small"))
    return "".join([*parts, "</svg>"])


def wait_heat(waited: Mapping[tuple[int, int], float]) -> str:
    """Who waited for whom: a dark column is a rank that all others wait for.

    Args:
      waited: (who waits, whom for), both seats -> seconds in all.
    """
    # Without the pairs that never waited the busiest are left, in a job of any size.
    blame: dict[int, float] = {}
    for pair, spent in waited.items():
        for seat in pair:
            blame[seat] = blame.get(seat, 0.0) + spent
    seats = sorted(sorted(blame, key=lambda seat: -blame[seat])[: ROWS_MAX // 2])
    most = max(waited.values(), default=0.0)
    if not seats or most <= 0:
        return "<p>Nobody waited for anybody.</p>"
    size = 22
    height = _TOP + size * len(seats) + 8
    parts = [opening(height, "Seconds each rank waited for each other")]
    for i, waiter in enumerate(seats):
        parts.append(text(_LEFT + size * i + size / 2, _TOP - 6, str(waiter), "middle", "small"))
        parts.append(text(_LEFT - 8, _TOP + size * i + 15, f"rank {waiter}", "end", "small"))
        for j, late in enumerate(seats):
            if spent := waited.get((waiter, late), 0.0):
                words = f"rank {waiter} waited {spent:.3g} s for rank {late}"
                cell = _LEFT + size * j, _TOP + size * i, size - 2, size - 2
                parts.append(_cell(*cell, spent / most, words))
    beside = _LEFT + size * len(seats) + 16
    parts.append(text(beside, _TOP + 15, "row: who waits; column: for whom", "start", "small"))
    return "".join([*parts, "</svg>"])


def grid_heat(places: Mapping[int, Place], ratios: Mapping[int, float]) -> str:
    """The ranks of a hybrid job at their places: a block for each tp, its rows pp, columns dp.

    Args:
      places: seat -> its coordinates.
      ratios: seat -> its work against its role's median; a seat without is drawn empty.
    """
    if not places:
        return ""
    wide = 1 + max(p.dp for p in places.values())
    tall = 1 + max(p.pp for p in places.values())
    blocks = sorted({p.tp for p in places.values()})
    size = max(6.0, min(26.0, (WIDTH - _LEFT) / (wide * len(blocks) + len(blocks))))
    height = round(_TOP + size * tall + 24)
    parts = [opening(height, "Work of each rank at its place in the job")]
    parts += [
        text(_LEFT - 8, _TOP + size * (i + 0.7), f"pp {i}", "end", "small") for i in range(tall)
    ]
    for number, tp in enumerate(blocks):
        left = _LEFT + number * size * (wide + 1)
        parts.append(text(left, _TOP - 6, f"tp {tp}", "start", "small"))
        parts.append(text(left, height - 6, f"dp 0 to {wide - 1}", "start", "small"))
        for seat, place in places.items():
            if place.tp == tp:
                ratio = ratios.get(seat)
                told = "not timed" if ratio is None else f"{ratio:.2f} x its role's median"
                words = f"rank {seat} (dp {place.dp}, pp {place.pp}, tp {tp}): {told}"
                x, y = left + size * place.dp, _TOP + size * place.pp
                depth = 0.0 if ratio is None else _shade(ratio)
                parts.append(_cell(x, y, size - 1, size - 1, depth, words))
    return "".join([*parts, "</svg>"])


def ratio_to_median(seconds: Mapping[int, Mapping[int, float]]) -> dict[int, dict[int, float]]:
    """What each seat's work in each step is against the median of the seats that told it."""
    by_step: dict[int, list[float]] = {}
    for row in seconds.values():
        for step, spent in row.items():
            if math.isfinite(spent):
                by_step.setdefault(step, []).append(spent)
    middle = {step: median(values) for step, values in by_step.items()}
    return {
        seat: {
            step: spent / middle[step]
            for step, spent in row.items()
            if math.isfinite(spent) and middle[step] > 0
        }
        for seat, row in seconds.items()
    }


def _shade(ratio: float) -> float:
    """How dark: nothing at the median or below, all at `_FULL`."""
    return min(1.0, max(0.0, (ratio - 1.0) / (_FULL - 1.0)))


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


def _cell(x: float, y: float, width: float, height: float, depth: float, words: str) -> str:
    return (
        f'<rect class="heat" x="{x:.1f}" y="{y:.1f}" width="{max(width - 0.5, 0.5):.1f}" '
        f'height="{height:.1f}" fill-opacity="{0.08 + 0.92 * depth:.2f}">'
        f"<title>{escape(words)}</title></rect>"
    )
