"""The certificate as text and as one HTML page, without scripts or links. Pure."""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape

from ftkit.launch.html_page import html_page
from ftkit.launch.programme.certificate import (
    P95_MIN,
    Certificate,
    FaultSummary,
    Quantiles,
    Setting,
)
from ftkit.launch.report_view import duration

_HEADS = ("fault", "drills", "survived", "95 % interval", "next step p50", "p95", "whole again p50",
          "p95", "first", "last")  # fmt: skip

_STYLE = """
body { max-width: 1000px; }
td, th { padding: .25rem 1.2rem .25rem 0; text-align: left; border-bottom: 1px solid var(--faint);
  font-variant-numeric: tabular-nums; }
"""


def text(certificate: Certificate) -> str:
    """For a terminal, or a mail."""
    if not certificate.faults:
        parts = ["No drill was done: nothing is known of what this cluster survives."]
    else:
        parts = [_table([_HEADS, *(_row(fault) for fault in certificate.faults)])]
        parts += [s for fault in certificate.faults for s in _settings(fault)]
        parts += [f"not survived: {line}" for line in _failures(certificate)]
        parts += _notes(certificate)
    if certificate.skipped:
        parts.append(f"{certificate.skipped} intervals without a drill: " + _skips(certificate))
    return "\n".join(parts)


def html(certificate: Certificate) -> str:
    """For people who did not run it."""
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _row(fault)) + "</tr>"
        for fault in certificate.faults
    )
    heads = "".join(f"<th>{escape(head)}</th>" for head in _HEADS)
    settings = "".join(
        f"<li>{escape(s)}</li>" for fault in certificate.faults for s in _settings(fault)
    )
    failures = "".join(f"<li class=fail>{escape(f)}</li>" for f in _failures(certificate))
    notes = "".join(f"<p>{escape(note)}</p>" for note in _notes(certificate))
    skips = ""
    if certificate.skipped:
        skips = (
            f"<h2>Intervals without a drill</h2><p>{certificate.skipped}: "
            f"{escape(_skips(certificate))}</p>"
        )
    body = (
        f"<table><tr>{heads}</tr>{rows}</table><h2>What was drilled</h2><ul>{settings}</ul>"
        "<h2>What was not survived</h2>"
        + (f"<ul>{failures}</ul>" if failures else "<p class=pass>Nothing.</p>")
        + notes
        if certificate.faults
        else "<p>No drill was done: nothing is known of what this cluster survives.</p>"
    )
    return html_page(
        "ftkit: what was survived", f"<h1>What was survived</h1>\n{body}{skips}", style=_STYLE
    )


def _row(of: FaultSummary) -> tuple[str, ...]:
    low, high = of.interval
    return (
        of.fault,
        str(of.struck),
        str(of.survived),
        f"{100 * low:.1f} to {100 * high:.1f} %",
        *_times(of.next_step_s),
        *_times(of.whole_s),
        _date(of.first),
        _date(of.last),
    )


def _times(q: Quantiles | None) -> tuple[str, str]:
    if q is None:
        return "-", "-"
    return duration(q.p50), duration(q.p95) + ("" if q.count >= P95_MIN else "*")


def _settings(of: FaultSummary) -> list[str]:
    return [f"{of.fault}: {_setting(s)}" for s in of.settings]


def _setting(s: Setting) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in s.versions)
    drills = f"{s.drills} drill" + ("s" if s.drills != 1 else "")
    return f"{drills} of a job of {s.world} ranks on {s.nodes} nodes ({s.engine}; {versions})"


def _failures(certificate: Certificate) -> list[str]:
    return [
        f"{fault.fault}, {_moment(at)}: {why}"
        for fault in certificate.faults
        for at, why in fault.failures
    ]


def _notes(certificate: Certificate) -> list[str]:
    lost = sum(fault.lost_s for fault in certificate.faults)
    replayed = sum(fault.steps_replayed for fault in certificate.faults)
    slots = sum(fault.slots_lost for fault in certificate.faults)
    notes = [
        f"Cost: {duration(lost)} of training; {replayed} steps were played again, {slots} slots lost.",
        "Struck: " + (", ".join(certificate.nodes) or "machines without a name") + ".",
        "The interval is of the share that is survived (Wilson); what is not known counts as not.",
        "Times are from the strike, of drills that were survived.",
    ]
    few = [
        q
        for fault in certificate.faults
        for q in (fault.next_step_s, fault.whole_s)
        if q is not None and q.count < P95_MIN
    ]
    if few:
        notes.append(f"* of fewer than {P95_MIN} drills: the slowest.")
    return notes


def _skips(certificate: Certificate) -> str:
    return "; ".join(f"{count} times {reason}" for reason, count in certificate.skips)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _date(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d")


def _moment(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
