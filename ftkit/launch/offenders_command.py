"""What `ftkit doctor offenders` does: nodes to leave out, and the retries of failed jobs."""

import json
import time
from pathlib import Path

import click

from ftkit.core.errors import UsageError
from ftkit.detection.offenders import OffenderConfig
from ftkit.detection.retries import RetryStats, retry_stats
from ftkit.launch.choices import refuse_half_url
from ftkit.launch.history import History, attempts, fleet

#: Nodes shown on a terminal.
SHOWN = 20


def offenders(where: str, *, as_json: bool) -> int:
    """Print the advice. Returns the exit code: 1 when there is a node to leave out.

    Raises:
      UsageError: there is no history at `where`.
      StoreError: it cannot be read.
    """
    refuse_half_url(where)
    if Path(where.removeprefix("file://")).is_dir():
        raise UsageError(
            f"--history {where} is a folder; give the file that `ftkit run --history` writes"
        )
    records = History(where, job="").read()
    if not records:
        raise UsageError(f"{where} holds no history; `ftkit run --history` makes one")
    scores = fleet(records, OffenderConfig()).scores(time.time())
    retries = retry_stats(attempts(records))
    out = [s.node for s in scores if s.offender]
    if as_json:
        click.echo(
            json.dumps(
                {
                    "leave_out": out,
                    "nodes": [s.to_json() for s in scores],
                    "retries": retries.to_json(),
                }
            )
        )
        return 1 if out else 0
    for s in scores[:SHOWN]:
        advice = "LEAVE OUT" if s.offender else ""
        click.echo(
            f"{s.node:24} {s.faults:4} faults, {s.recent:6.2f} recent, P(10x) {s.certainty:.3f}  "
            f"{advice}".rstrip()
        )
    click.echo(f"leave out: {', '.join(out) or 'nobody'}")
    click.echo(_told(retries))
    return 1 if out else 0


def _told(retries: RetryStats) -> str:
    if retries.interval_s is None or retries.chain_success is None:
        return "no failed job was started again"
    first, middle, last = (f"{s / 60:.1f}" for s in retries.interval_s)
    return (
        f"retries: {retries.chains} chains, {retries.attempts} attempts, {middle} min apart "
        f"(quartiles {first} to {last}); {retries.chain_success:.0%} of chains and "
        f"{retries.attempt_success or 0:.0%} of attempts trained again"
    )
