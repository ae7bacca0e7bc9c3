"""The parts of the page as HTML, with the report's own pictures as inline SVG. Pure.

Each part is a string that the page's script puts into the element of the same id, and only when
it has changed; so whatever comes from a job is escaped here.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from ftkit.core.verdict import ACCUSES_NOBODY
from ftkit.launch.report_heat import step_heat, wait_heat
from ftkit.launch.report_pace import read_pace
from ftkit.launch.report_svg import loss_plot, timeline_plot
from ftkit.launch.report_timeline import Doing, read_timeline
from ftkit.launch.report_view import duration
from ftkit.launch.ui.view import RankNow, RankState, UiView

#: Of a larger job the ranks that do not train come first, and the rest is counted.
TILES_MAX = 1024
_TIMELINE_ROWS = 32
TIMELINE_S = 20.0
#: A rank that has stood still for so long gets a word about it.
_STILL_S = 1.0
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def parts(
    view: UiView, ranks: Sequence[RankNow], bundles: Sequence[tuple[int, str]]
) -> dict[str, str]:
    """Element id -> its HTML.

    Args:
      view: the run.
      ranks: `view.ranks` at this moment.
      bundles: (number, paragraph) of the incidents that were kept, oldest first.
    """
    pace = read_pace(view.pace)
    waits = "<p>No step was timed yet.</p>"
    if pace.work:
        waits = f"{wait_heat(pace.waits)}<h3>Work by step</h3>{step_heat(pace.work)}"
    faults = [(story.step, story.what) for story in view.run.stories if story.drilled]
    return {
        "now": _now(view, ranks),
        "ranks": _ranks(ranks),
        "timeline": _timeline(view, ranks),
        "waits": waits,
        "tiers": _tiers(view),
        "said": _said(view),
        "incidents": _incidents(view, bundles),
        "happened": _happened(view),
        "loss": loss_plot(view.losses, {}, faults),
    }


def _now(view: UiView, ranks: Sequence[RankNow]) -> str:
    run = view.run
    state = "running"
    if run.ended:
        state = f"{run.outcome}: {run.reason}" if run.reason else str(run.outcome)
    figures = {
        "step": f"{run.step:,}",
        "loss": "…" if run.loss is None else f"{run.loss:.4f}",
        "ranks that train": f"{sum(r.state is RankState.TRAINING for r in ranks)} of {len(ranks)}",
        "generation": str(run.generation),
        "job": state,
    }
    return "".join(
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items()
    )


def _ranks(ranks: Sequence[RankNow]) -> str:
    if not ranks:
        return "<p>No rank was started yet.</p>"
    urgent = sorted(ranks, key=_urgency)
    shown = sorted(urgent[:TILES_MAX], key=lambda r: r.seat)
    more = len(ranks) - len(shown)
    tiles = "".join(_tile(rank) for rank in shown)
    rest = f"<p>{more} more ranks train.</p>" if more else ""
    return f'<div class="tiles">{tiles}</div>{rest}'


def _tile(rank: RankNow) -> str:
    lines = [rank.phase or rank.state.value]
    if rank.op:
        lines.append(rank.op)
    if rank.still_s is not None and rank.still_s >= _STILL_S:
        lines.append(f"still for {rank.still_s:.0f} s")
    if rank.said:
        lines.append(rank.said)
    accused = " accused" if rank.accused else ""
    words = f"rank {rank.seat}, member {rank.member}: {rank.state}, " + ", ".join(lines)
    if rank.step is not None:
        words += f", step {rank.step}"
    told = "".join(f"<span>{escape(line)}</span>" for line in lines)
    return (
        f'<div class="tile {rank.state}{accused}" title="{escape(words)}"><b>{rank.seat}</b>'
        f"{told}</div>"
    )


def _timeline(view: UiView, ranks: Sequence[RankNow]) -> str:
    timeline = read_timeline(view.recent, last_s=TIMELINE_S)
    urgent = sorted(ranks, key=_urgency)
    rows = {r.seat for r in urgent[:_TIMELINE_ROWS]}
    if len(rows) < len(timeline.seats):
        timeline = replace(
            timeline,
            seats=tuple(s for s in timeline.seats if s in rows),
            spans=tuple(s for s in timeline.spans if s.seat in rows),
        )
    legend = "".join(f'<i class="{doing}"></i>{doing}' for doing in Doing)
    return f"<p>{legend}<i></i>A tick is a committed step.</p>{timeline_plot(timeline)}"


def _tiers(view: UiView) -> str:
    rows = []
    for tier in view.tiers.tiers.values():
        if tier.step is None and not tier.wrong:
            rows.append(f"<tr><td>{tier.name}</td><td colspan=5>nothing there</td></tr>")
            continue
        behind = "" if tier.step is None else f"{max(0, view.run.step - tier.step)} behind"
        cells = (
            tier.name,
            "none" if tier.step is None else f"step {tier.step:,}",
            behind,
            "" if tier.size is None else size(tier.size),
            "" if tier.took_s is None else duration(tier.took_s),
            tier.detail,
        )
        wrong = f'<tr class="wrong"><td></td><td colspan=5>{escape(tier.wrong)}</td></tr>'
        rows.append(
            "<tr>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
            + (wrong if tier.wrong else "")
        )
    heads = "".join(f"<th>{name}</th>" for name in ("tier", "newest", "", "size", "took", ""))
    return f"<table><tr>{heads}</tr>{''.join(rows)}</table>"


def _said(view: UiView) -> str:
    lines = "".join(
        f'<li class="{"label" if e["fault"] in ACCUSES_NOBODY else escape(str(e["kind"]))}">rank {escape(str(e.get("seat")))}: '
        f"{'suspected ' if e['kind'] == 'suspicion' else ''}{escape(str(e['fault']))}: "
        f"{escape(str(e.get('reason', '')))}</li>"
        for e in view.said()
    )
    return f"<ul>{lines}</ul>" if lines else "<p>Nothing is said of anybody.</p>"


def _incidents(view: UiView, bundles: Sequence[tuple[int, str]]) -> str:
    stories = "".join(
        f'<li class="{"closed" if s.closed else "open"}">{escape(s.sentence())}</li>'
        for s in reversed(view.run.stories[-20:])
    )
    kept = "".join(
        f"<details><summary>What was kept of incident {number}</summary>"
        f"<p>{escape(text)}</p></details>"
        for number, text in reversed(bundles)
    )
    return (f"<ul>{stories}</ul>" if stories else "<p>Nothing went wrong.</p>") + kept


def _happened(view: UiView) -> str:
    lines = "".join(
        f"<tr><td>{time.strftime('%H:%M:%S', time.localtime(line.t))}</td>"
        f"<td>{escape(line.kind)}</td><td>{escape(line.words)}</td></tr>"
        for line in reversed(view.happened)
    )
    return f"<table>{lines}</table>" if lines else "<p>Nothing yet.</p>"


def _urgency(rank: RankNow) -> tuple[bool, bool, int]:
    return not rank.accused, rank.state is RankState.TRAINING, rank.seat


def size(count: float) -> str:
    """Bytes for people: '512 B', '1.5 MB'."""
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return (
        f"{count:.0f} {_UNITS[unit]}" if not unit or count >= 100 else f"{count:.1f} {_UNITS[unit]}"
    )
