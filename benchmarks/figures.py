"""Figures: what every benchmark ends in, as a table, as JSON, and kept beside the others.

A figure is a ratio or a percentile that was measured in one run, with its goal beside it. A
benchmark also says what it *computed* (a digest of the trained parameters, mostly) and which
of its own conditions were broken: figures of a run with problems count for nothing, so that
nothing can be made fast by being made wrong.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ftkit.core.samples import quantile
from ftkit.launch.whole_file import write_whole

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number."""

    name: str
    value: float | None
    """None when it could not be measured; then it holds no goal."""
    unit: str
    at_most: float | None = None
    """The goal; with no goal of either kind, it is shown and judged by nobody."""
    at_least: float | None = None
    """The goal of a figure that is better the larger it is."""
    against: str = ""
    """What a peer needs, or what the ratio's denominator is."""

    @property
    def goal(self) -> str:
        """The goal as a person writes it; empty without one."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    @property
    def holds(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.at_most is None and self.at_least is None:
            return None
        if self.value is None:
            return False
        enough = self.at_least is None or self.value >= self.at_least
        return enough and (self.at_most is None or self.value <= self.at_most)

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "goal": self.goal,
            "holds": self.holds,
            "against": self.against,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one run of one benchmark found."""

    name: str
    figures: Sequence[Figure]
    computed: Mapping[str, str]
    """What was computed, by name: digests of parameters, above all."""
    problems: Sequence[str] = ()
    """Conditions of the measurement that did not hold; the figures are void then."""
    notes: Sequence[str] = ()
    """Whatever a reader of the figures must know: what was patched, what was left out."""
    options: Mapping[str, object] = field(default_factory=dict)
    samples: object = None
    """The single measurements behind the figures, JSON-safe."""

    def to_json(self) -> dict[str, object]:
        """One object, as `--json` prints it."""
        return {
            "benchmark": self.name,
            "figures": [f.to_json() for f in self.figures],
            "computed": dict(self.computed),
            "problems": list(self.problems),
            "notes": list(self.notes),
            # Where a result is kept says nothing about it.
            "options": {k: _plain(v) for k, v in self.options.items() if k != "save"},
            "samples": self.samples,
            "machine": machine(),
            "versions": versions(),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The nearest rank (`core.samples.quantile`); None of no values. Pure."""
    there = list(values)
    return quantile(there, percent / 100) if there else None


def table(report: Report) -> str:
    """The report for a terminal: figures, then what was computed, notes and problems."""
    rows = [("figure", "value", "goal", "", "against")]
    for f in report.figures:
        verdict = {None: "", True: "holds", False: "FAILS"}[f.holds]
        rows.append((f.name, show(f.value, f.unit), f.goal, verdict, f.against))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]).rstrip()
        for row in rows
    ]
    lines += [f"computed {name}: {value}" for name, value in report.computed.items()]
    lines += [f"note: {note}" for note in report.notes]
    lines += [f"PROBLEM: {problem}" for problem in report.problems]
    return "\n".join(lines)


def show(value: float | None, unit: str) -> str:
    """A number as a person reads it."""
    if value is None:
        return "-"
    return f"{value:.4g} {unit}".rstrip()


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `doc` is its docstring."""
    made = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        conflict_handler="resolve",
    )
    made.add_argument("--quick", action="store_true", help="few runs: minutes, and little to say")
    made.add_argument("--json", action="store_true", help="print one JSON object, nothing else")
    made.add_argument(
        "--save",
        nargs="?",
        type=Path,
        const=RESULTS,
        metavar="FOLDER",
        help="keep the result in FOLDER (benchmarks/results), and renew the table there",
    )
    return made


def finish(report: Report, options: argparse.Namespace) -> int:
    """Print the report, and keep it if asked to. Returns the exit code: 1 with problems.

    A report with problems is not kept: its figures count for nothing.
    """
    document = report.to_json()
    print(json.dumps(document) if options.json else table(report), flush=True)
    if options.save is not None and not report.problems:
        save(document, options.save)
    return 1 if report.problems else 0


def save(document: Mapping[str, object], folder: Path) -> None:
    """Write FOLDER/<benchmark>.json, and FOLDER/README.md anew from all results there.

    `document` is what `Report.to_json` made for `--json`; made anew it would tell another time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{document['benchmark']}.json", json.dumps(document, indent=1) + "\n")
    kept = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    write_whole(folder / "README.md", overview(kept))


def overview(results: Sequence[Mapping[str, object]]) -> str:
    """All results that were kept, as one Markdown page; pure."""
    lines = [
        "# Results",
        "",
        "Written by `--save`; not edited by hand. What each figure means: `../README.md`.",
        "",
        "| benchmark | figure | value | goal | holds | against | measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        figures = result["figures"]
        assert isinstance(figures, list), "Report.to_json writes a list"
        for f in figures:
            holds = {None: "", True: "yes", False: "**no**"}[f["holds"]]
            cells = [result["benchmark"], f["name"], show(f["value"], f["unit"]), f["goal"], holds]
            quick = dict(result["options"]).get("quick")  # type: ignore[call-overload]
            when = str(result["at"])[:10] + (" (quick)" if quick else "")
            lines.append("| " + " | ".join(map(str, [*cells, f["against"], when])) + " |")
    machines = sorted({str(r["machine"]) for r in results})
    lines += ["", *(f"Machine: {m}" for m in machines)]
    for result in results:
        notes = result["notes"]
        assert isinstance(notes, list), "Report.to_json writes a list"
        lines += ["", *(f"- {result['benchmark']}: {note}" for note in notes)] if notes else []
    return "\n".join(lines) + "\n"


def machine() -> str:
    """What was measured on, in a line: processors that this process may use, and memory."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return f"{cores} cores {platform.machine()}, {memory:.0f} GiB, load {load:.1f} at the end"


def versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in ("ftkit", "torch", "torchft", "torch_checkpointing"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue  # ftkit run from a checkout, or a peer that is not in this environment
    return found


def say(text: str) -> None:
    """Tell the person who waits, apart from the result."""
    print(text, file=sys.stderr, flush=True)


def _plain(value: object) -> object:
    if isinstance(value, Path) and value.is_relative_to(Path.home()):
        value = Path("~") / value.relative_to(Path.home())  # a result says nothing of whose it is
    return value if isinstance(value, bool | int | float | str | list | None) else str(value)


def as_samples(items: Iterable[object]) -> list[dict[str, object]]:
    """Dataclasses as JSON-safe dictionaries."""
    return [asdict(item) for item in items]  # type: ignore[call-overload]
