"""The comparison as a table and as a page with a plot of the times to recover; pure."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.beside.rows import HEADER, Row, cells, remarks
from ftkit.launch.html_page import html_page
from ftkit.launch.report_svg import WIDTH, opening, text

#: What the columns hold, for the page and the docs.
LEGEND = (
    "recovered: runs in which training went on. a step again: from the fault until the whole world "
    "that trains next has finished an optimizer step, median; new steps: until the struck step is "
    "done. steps repeated: finished before, and done once more. batches lost: blocks of the global "
    "batches that are in no gradient. final parameters: against the tool's own undisturbed run, by "
    "the norm of the difference. step, with saves: median and mean step, undisturbed, beside plain "
    "DDP's. a rank, all processes: peak memory, undisturbed."
)

_STYLE = f"""
body {{ max-width: 1300px; }} th {{ text-align: left; padding-right: 1.5rem; font-weight: 600; }}
h3 {{ font-size: 1rem; margin-bottom: 0; }} svg {{ max-width: {WIDTH}px; }}
.again {{ fill: var(--line); }} .ahead {{ fill: none; stroke: var(--line); stroke-width: 1.5; }}
"""

_LEFT, _RIGHT, _ROW, _TOP, _BOTTOM = 190, 30, 30, 10, 44


def markdown(rows: Mapping[str, Row]) -> str:
    """The table, aligned, as Markdown."""
    plain = rows["plain DDP"]
    lines = [HEADER, *(cells(row, plain) for row in rows.values())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    drawn = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    return "\n".join([drawn[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *drawn[1:]])


def plot(rows: Sequence[Row]) -> str:
    """A line for each tool, a dot for each run, over seconds after the fault on a log scale."""
    struck = [row for row in rows if row.struck]
    times = [
        seconds
        for row in struck
        for s in row.struck
        for seconds in (s.recovery.again_s, s.recovery.ahead_s)
        if seconds is not None
    ]
    if not times:
        return "<p>No tool trained on after a fault.</p>"
    low = math.floor(math.log10(max(min(times), 1e-3)))
    high = max(math.ceil(math.log10(max(times))), low + 1)
    height = _TOP + _ROW * len(struck) + _BOTTOM

    def x(seconds: float) -> float:
        share = (math.log10(max(seconds, 1e-3)) - low) / (high - low)
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    parts = [opening(height, "Seconds from the fault until training went on, by tool")]
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{height - _BOTTOM}"/>'
        )
        parts.append(text(at, height - _BOTTOM + 18, f"{10.0**power:g} s", "middle"))
    words = "seconds after the fault, log scale"
    parts.append(text((_LEFT + WIDTH - _RIGHT) / 2, height - 6, words, "middle"))
    for number, row in enumerate(struck):
        y = _TOP + _ROW * (number + 0.5)
        parts.append(text(_LEFT - 10, y + 4, row.name, "end"))
        for s in row.struck:
            if s.recovery.ahead_s is not None:
                parts.append(_dot(x(s.recovery.ahead_s), y, "ahead", s.recovery.ahead_s))
            if s.recovery.again_s is not None:
                parts.append(_dot(x(s.recovery.again_s), y, "again", s.recovery.again_s))
        never = [s for s in row.struck if s.recovery.again_s is None]
        if never:
            count = f"{len(never)} of {len(row.struck)} never" if row.recovered else "never"
            mark = f"{count}: {never[0].why.partition(';')[0]}"
            parts.append(text(_LEFT + 6, y - 6 if row.recovered else y + 4, mark, "start", "small"))
    return "".join([*parts, "</svg>"])


def render(rows: Mapping[str, Row], *, fault: str, ranks: int, facts: str) -> str:
    """The whole page, without scripts or links.

    Args:
      rows: in the order of the table, "plain DDP" among them.
      fault: what was done to a rank.
      ranks: of the job.
      facts: the machine and the versions, in a line.
    """
    plain = rows["plain DDP"]
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row, plain)) + "</tr>"
        for row in rows.values()
    )
    notes = "".join(
        f"<h3>{escape(row.name)}</h3><ul>"
        + "".join(f"<li>{escape(words)}</li>" for words in remarks(row, ranks=ranks))
        + "</ul>"
        for row in rows.values()
        if remarks(row, ranks=ranks)
    )
    title = f"ftkit and its peers: {fault} of one rank of {ranks}"
    body = f"""<h1>{escape(title)}</h1>
<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>
<p>{escape(LEGEND)}</p>
<h2>Time to recover</h2>
<p>Full dot: a step was finished again. Ring: the struck step was done, so that all that follows is
new.</p>
{plot(list(rows.values()))}
<h2>Row by row</h2>
{notes}
<p>{escape(facts)}</p>"""
    return html_page(title, body, style=_STYLE)


def _dot(x: float, y: float, style: str, seconds: float) -> str:
    radius = 4 if style == "again" else 6
    return (
        f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
        f"<title>{seconds:.3f} s</title></circle>"
    )
