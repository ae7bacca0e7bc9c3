"""One programme from the command's options to its exit code."""

import json
from pathlib import Path

import click

from ftkit.core import exit_codes
from ftkit.core.errors import UsageError
from ftkit.launch.choices import chosen
from ftkit.launch.drill_access import read_access
from ftkit.launch.drill_faults import LIVE_FAULTS, OF_NODES
from ftkit.launch.history import check_history
from ftkit.launch.programme.command import STOP
from ftkit.launch.programme.costs import Budget, prior
from ftkit.launch.programme.driver import Driver
from ftkit.launch.programme.guards import Guards
from ftkit.launch.programme.machine import Options
from ftkit.launch.programme.record import DrillRecord, Survival
from ftkit.launch.programme.schedule import seconds_of
from ftkit.launch.report_view import duration
from ftkit.launch.sigterm import sigterm_as_ctrl_c


def run_programme(
    run_dir: Path,
    *,
    every: str | None,
    faults: str,
    count: int | None,
    seed: int,
    budget: str,
    budget_window: str,
    steps_between: int,
    only_with_spares: bool,
    give_up: str,
    patience: str,
    history: Path,
    stop_file: Path | None,
    as_json: bool,
) -> int:
    """`ftkit drill plan`, whose options these are. Blocks. Returns the exit code.

    Raises:
      UsageError: the job takes no drills, or not these, or the options contradict one another.
      StoreError: the history cannot be read or written.
    """
    stop_files = (run_dir / STOP, *((stop_file,) if stop_file else ()))
    if there := [path for path in stop_files if path.exists()]:
        way = "`ftkit drill stop --clear`" if there[0].name == STOP else "removing it"
        raise UsageError(f"drills are stopped: {there[0]} is there; {way} allows them again")
    access = read_access(run_dir)
    asked = chosen(faults, LIVE_FAULTS, option="--fault")
    if not asked:
        raise UsageError(f"--fault names nothing: choose among {', '.join(LIVE_FAULTS)}")
    if access.nodes < 2 and (of_nodes := [f for f in asked if f in OF_NODES]):
        raise UsageError(
            f"the job has one node, and {', '.join(of_nodes)} would leave nobody: choose kill or stop"
        )
    if access.seats < 2:
        raise UsageError("the job has one rank, and a drill would leave nobody: start it with more")
    prior_s, budget_s = prior(access.max_stall_s), seconds_of(budget, option="--budget")
    if prior_s > budget_s:
        raise UsageError(
            f"--budget {budget} is less than a drill may cost that was never seen: {prior_s:g} s, twice "
            f"the job's --max-stall of {access.max_stall_s:g} s. Nothing could ever be struck: give more"
        )
    options = Options(
        job=access.job,
        faults=tuple(asked),
        guards=Guards(
            budget=Budget(
                lost_s=budget_s, window_s=seconds_of(budget_window, option="--budget-window")
            ),
            steps_between=steps_between,
            only_with_spares=only_with_spares,
            parity=access.parity,
        ),
        seed=seed,
        every_s=None if every is None else seconds_of(every, option="--every"),
        count=count,
        prior_s=prior_s,
    )
    try:
        history.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--history {history}: {error}") from error
    check_history(str(history))

    def noted(record: DrillRecord) -> None:
        click.echo(json.dumps(record.to_json()) if as_json else sentence(record))

    driver = Driver(
        run_dir,
        access,
        options,
        history=history,
        stop_files=stop_files,
        limit_s=seconds_of(give_up, option="--give-up"),
        patience_s=seconds_of(patience, option="--patience"),
        say=lambda words: click.echo(words, err=as_json),
        noted=noted,
    )
    with sigterm_as_ctrl_c() as received:
        try:
            last = driver.run()
        except KeyboardInterrupt:
            click.echo("ftkit: the programme was interrupted; the job goes on", err=True)
            return 128 + received[0] if received else exit_codes.INTERRUPTED
    click.echo(f"the programme is over: {last.reason}", err=as_json)
    return last.code


def sentence(record: DrillRecord) -> str:
    """A drill in one line."""
    if record.outcome is Survival.SKIPPED:
        return f"no {record.fault} in this interval: {record.reason}"
    ranks = ", ".join(str(s) for s in record.seats)
    parts = [f"{record.fault} of rank {ranks} at step {record.step}: {record.outcome}"]
    if record.reason:
        parts.append(record.reason)
    for what, seconds in (
        ("seen after", record.detect_s),
        ("next step after", record.next_step_s),
        ("whole after", record.whole_s),
        ("cost", record.lost_s),
    ):
        if seconds is not None:
            parts.append(f"{what} {duration(seconds)}")
    return ", ".join(parts)
