"""report.html: one file that shows a run or a drill, with its pictures inside, nothing to fetch."""

from collections.abc import Iterable
from html import escape
from pathlib import Path

from ftkit.launch.checker import Outcome
from ftkit.launch.goodput import goodput
from ftkit.launch.html_page import html_page
from ftkit.launch.live import summary_rows
from ftkit.launch.report_history import Event, read_history
from ftkit.launch.report_pace import pace_section
from ftkit.launch.report_storage import storage_section
from ftkit.launch.report_svg import loss_plot, timeline_plot
from ftkit.launch.report_timeline import Doing, read_timeline
from ftkit.launch.report_view import RunView
from ftkit.launch.whole_file import write_whole


def render(
    events: Iterable[Event], reference_events: Iterable[Event] | None, outcome: Outcome | None
) -> str:
    """The report of a run as one HTML page, without scripts or links. Pure.

    Args:
      events: all events of the disturbed run.
      reference_events: of the undisturbed run; None leaves its curve out.
      outcome: what the checker said of a drill; None for a run that was none, of which nothing
        was expected.
    """
    events = sorted(events, key=lambda e: float(e.get("mono", 0.0)))
    losses = _losses(events)
    undisturbed = _losses(reference_events or ())
    view = RunView()
    for event in events:
        view.feed(event)
    happened = [*(story.sentence() for story in view.stories), *view.approximate]
    stories = "".join(f"<li>{escape(sentence)}</li>" for sentence in happened)
    faults = [(story.step, story.what) for story in view.stories]
    told = _of_run(view) if outcome is None else summary_rows(outcome)
    if outcome is not None or undisturbed:
        told = [*told, ("loss", _compared(losses, undisturbed))]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in told
    )
    wide = "<p>Wide line: the undisturbed run. Thin line: the disturbed one.</p>"
    legend = "".join(f'<i class="{doing}"></i>{doing}' for doing in Doing)
    title, said = "ftkit run", _ended(view)
    if outcome is not None:
        title, said = f"Drill: {outcome.fault} at {outcome.phase}", outcome.outcome
    colour = {"completed": "pass", "failed": "fail"}.get(said, said)
    seed = "" if outcome is None else f"Seed {outcome.seed}. "
    body = f"""<h1>{escape(title)}, <span class="{escape(colour)}">{escape(said)}</span></h1>
<table>{rows}</table>
<h2>What happened</h2><ul>{stories or "<li>Nothing went wrong.</li>"}</ul>
<h2>Loss</h2>
{wide if undisturbed else ""}
{loss_plot(losses, undisturbed, faults)}
<h2>The repair</h2>
<p>{legend}<i></i>A tick is a committed step, the dashed line the fault.</p>
{timeline_plot(read_timeline(events, whole=False))}
<h2>Until every rank is back</h2>
{timeline_plot(read_timeline(events))}
{_goodput_section(events)}
{pace_section(events)}
{storage_section(events)}
<p>{seed}Times are of this machine's monotonic clock.</p>"""
    return html_page(title, body)


def write_report(
    path: Path,
    events: Iterable[Event],
    reference_events: Iterable[Event] | None,
    outcome: Outcome | None,
) -> None:
    """Render to `path`. A reader sees the old file or the whole new one. OSError as it comes."""
    write_whole(path, render(events, reference_events, outcome))


def _ended(view: RunView) -> str:
    return str(view.outcome) if view.ended else "no end was written"


def _of_run(view: RunView) -> list[tuple[str, str]]:
    """What there is to say of a run from which nothing special was expected."""
    rows = [("last committed step", f"{view.step:,}")]
    if view.loss is not None:
        rows.append(("loss", f"{view.loss:.4f}"))
    rows.append(("ranks lost", str(sum(s.seat is not None for s in view.stories))))
    return [*rows, ("reason", view.reason)] if view.reason else rows


def _goodput_section(events: Iterable[Event]) -> str:
    """A heading, a sentence and the division of time; empty for a run without a step."""
    spent = goodput(events)
    if not spent.steps:
        return ""
    parts = [("committed", spent.committed_s), *spent.lost_s.items()]
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{seconds:.3f} s</td>"
        f"<td>{seconds / spent.wall_s:.1%}</td></tr>"
        for name, seconds in parts
    )
    return f"<h2>Goodput</h2><p>{escape(spent.paragraph())}</p><table>{rows}</table>"


def _losses(events: Iterable[Event]) -> dict[int, float]:
    return {c.step: c.loss for c in read_history(events).commits if c.loss is not None}


def _compared(losses: dict[int, float], undisturbed: dict[int, float]) -> str:
    shared = [step for step in losses if step in undisturbed]
    if not shared:
        return "no undisturbed run to compare with"
    off = [step for step in shared if losses[step] != undisturbed[step]]
    if off:
        return f"differs from the undisturbed run's at {len(off)} steps, first at step {min(off)}"
    return f"equal to the undisturbed run's in all {len(shared)} steps"
