"""`ftkit drill plan`, `stop` and `certificate`: drill programmes from the command line.

Exit codes of `plan`: 0 all drills were survived, or drills were stopped; 1 one was not survived; 2
none could be done, or its outcome is not known; 64 asked for what cannot be; 130, 143 interrupted.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click

from ftkit.core.errors import UsageError
from ftkit.launch import completion
from ftkit.launch.run_folder import RUNS, newest_run
from ftkit.launch.whole_file import write_whole

#: The stop switch of a run's drills, in its folder.
STOP = "drills.stop"

HISTORY = RUNS / "drills.jsonl"


@click.command("plan")
@click.argument(
    "run_dir",
    metavar="[JOB]",
    type=click.Path(path_type=Path),
    required=False,
    shell_complete=completion.runs,
)
@click.option(
    "--every",
    metavar="TIME",
    help="One strike in each interval of this length, at a random moment: 30m, 6h, 1d.",
)
@click.option(
    "--fault", "faults", default="kill", show_default=True, metavar="A,B,…",
    help="What may be done: kill, stop (a rank), lose-node, preempt (a node). The seed picks.",
)  # fmt: skip
@click.option(
    "--once", is_flag=True, help="One drill; without --every as soon as the guards allow."
)
@click.option("--count", type=click.IntRange(min=1), help="End once so many drills were survived.")
@click.option("--seed", default=0, show_default=True, help="Decides when, what and whom.")
@click.option(
    "--budget", default="5m", show_default=True, metavar="TIME",
    help="Training time that drills may cost within --budget-window.",
)  # fmt: skip
@click.option(
    "--budget-window", default="24h", show_default=True, metavar="TIME",
    help="How far back drills count against --budget.",
)  # fmt: skip
@click.option(
    "--steps-between", type=click.IntRange(min=1), default=100, show_default=True,
    help="Steps that are committed undisturbed before a strike.",
)  # fmt: skip
@click.option("--only-with-spares", is_flag=True, help="Only while spares stand by for all struck.")
@click.option(
    "--give-up", default="10m", show_default=True, metavar="TIME",
    help="The job has failed a drill if it is not whole again by then.",
)  # fmt: skip
@click.option(
    "--patience", default="1m", show_default=True, metavar="TIME",
    help="Of --once without --every: how long the guards may forbid it.",
)  # fmt: skip
@click.option(
    "--history", type=click.Path(path_type=Path), default=HISTORY, show_default=True,
    help="Where drills are kept, a line each; one file serves a cluster.",
)  # fmt: skip
@click.option(
    "--stop-file",
    type=click.Path(path_type=Path),
    help="A file that stops the programme when it is there, as `ftkit drill stop` does.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a drill on stdout.")
def plan(run_dir: Path | None, once: bool, as_json: bool, **given: Any) -> None:
    """Drill a running JOB again and again (its folder or name; by default the newest).

    Attaches to a job that `ftkit run` of the same user started, and strikes it at random moments, each
    time only if it is healthy, has been undisturbed, and the budget allows. It ends when a drill is not
    survived. The job goes on when the programme ends, whatever ends it.
    """
    from ftkit.launch.programme.programme import run_programme

    if once and given["count"] not in (None, 1):
        raise UsageError("--once is --count 1: leave one of them out")
    if once:
        given["count"] = 1
    if given["every"] is None and not once:
        raise UsageError("say how often: --every 6h; or --once")
    sys.exit(run_programme(newest_run(run_dir), as_json=as_json, **given))


@click.command("stop")
@click.argument(
    "run_dir",
    metavar="[JOB]",
    type=click.Path(path_type=Path),
    required=False,
    shell_complete=completion.runs,
)
@click.option("--clear", is_flag=True, help="Allow drills again.")
def stop(run_dir: Path | None, clear: bool) -> None:
    """Stop all drill programmes of JOB, and have none begin, until --clear.

    What has been struck already is watched to its end.
    """
    path = newest_run(run_dir) / STOP
    try:
        if clear:
            path.unlink(missing_ok=True)
        else:
            path.touch()
    except OSError as error:
        raise UsageError(f"{path} cannot be changed: {error}") from error
    click.echo(f"drills are {'allowed again' if clear else f'stopped: {path} is there'}")


@click.command("certificate")
@click.argument("histories", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write an HTML page there, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def certificate(histories: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Say what was survived, when and how fast, from the HISTORIES that `ftkit drill plan` keeps.

    By fault: drills, how many were survived, with the interval of the share, times, dates, versions and
    sizes. Exits with 1 when a drill was not survived, with 2 when there was none.
    """
    from ftkit.launch.programme import certificate_view, record
    from ftkit.launch.programme.certificate import certify

    records = []
    for path in histories or (HISTORY,):
        if not path.is_file():
            raise UsageError(f"there is no history {path}; `ftkit drill plan --history` writes one")
        found, strange = record.read(path)
        if strange:
            click.echo(f"ftkit: {strange} lines of {path} are no drills: passed over", err=True)
        records += found
    done = certify(records)
    if out is not None:
        try:
            write_whole(out, certificate_view.html(done))
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
    click.echo(json.dumps(done.to_json()) if as_json else certificate_view.text(done))
    if not done.faults:
        sys.exit(2)
    sys.exit(any(fault.survived < fault.struck for fault in done.faults))
