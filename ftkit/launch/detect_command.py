"""`ftkit detect`: what the detectors say of a job that was recorded."""

import json
from pathlib import Path
from typing import Any

import click

from ftkit.core.errors import UsageError
from ftkit.detection import offender_replay
from ftkit.detection.offenders import OffenderConfig
from ftkit.detection.step_detector import PaceConfig
from ftkit.launch.replay import Replayed, replay
from ftkit.launch.titan import read_titan
from ftkit.launch.traces import FORMATS, read_trace

#: A history of failures by node, not of steps by rank.
TITAN = "titan"


@click.group()
def detect() -> None:
    """Judge a recorded job with the detectors that watch a live one."""


@detect.command("replay")
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    type=click.Choice([*sorted(FORMATS), TITAN]),
    required=True,
    help="Of TRACE. Titan's is a history of failures: which nodes would have been left out.",
)
@click.option(
    "--effect",
    default=PaceConfig().effect,
    show_default=True,
    help="The smallest slowdown to be found: 0.1 is 10 %.",
)
@click.option(
    "--alarms-per-day",
    default=PaceConfig().alarms_per_day,
    show_default=True,
    help="False alarms that a job of this size may cost.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def replay_command(
    trace: Path, format_: str, effect: float, alarms_per_day: float, as_json: bool
) -> None:
    """Say who is slow in TRACE, what is uneven, and who is at fault."""
    if format_ == TITAN:
        _replay_offenders(trace, as_json)
        return
    try:
        config = PaceConfig(effect=effect, alarms_per_day=alarms_per_day)
    except ValueError as error:
        raise UsageError(str(error)) from error
    replayed = replay(read_trace(trace, format_), config)
    if as_json:
        click.echo(json.dumps(to_json(replayed, trace, config)))
        return
    click.echo(f"{replayed.ranks} ranks, {replayed.steps} steps")
    for said in replayed.said:
        verdict = said.verdict
        over = "" if said.lasts else " (over by the end)"
        click.echo(f"{verdict.fault.upper()} from step {said.step} on{over}: {verdict.reason}")
    if not replayed.accused:
        click.echo("nobody is accused")


def _replay_offenders(path: Path, as_json: bool) -> None:
    """Leave offenders out as the history goes by, and print what that would have avoided."""
    faults, nodes = read_titan(path)
    config = OffenderConfig()
    done = offender_replay.replay(faults, nodes, config)
    if as_json:
        rule = {"half_life_s": config.half_life_s, "factor": config.factor}
        click.echo(
            json.dumps(
                {"trace": str(path), **rule, "certainty": config.certainty, **done.to_json()}
            )
        )
        return
    click.echo(
        f"{done.faults} failures of {done.nodes} slots: {done.avoided} avoided "
        f"({done.avoided_share:.2%}), {len(done.left_out)} slots quarantined "
        f"({done.left_out_share:.3%}; {done.node_time_share:.3%} of all slots' time)"
    )


def to_json(replayed: Replayed, trace: Path, config: PaceConfig) -> dict[str, Any]:
    """What `--json` prints. `accused` are seats with their places; all else is in `verdicts`."""
    return {
        "trace": str(trace),
        "ranks": replayed.ranks,
        "steps": replayed.steps,
        "effect": config.effect,
        "alarms_per_day": config.alarms_per_day,
        "accused": [
            {
                "seat": said.verdict.seat,
                "place": said.verdict.evidence.get("place", ""),
                "fault": said.verdict.fault.value,
                "factor": said.verdict.evidence.get("factor"),
                "phase": said.verdict.evidence.get("phase"),
                "step": said.step,
                "after_steps": said.steps,
            }
            for said in replayed.accused
        ],
        "verdicts": [
            {
                "fault": said.verdict.fault.value,
                "seat": said.verdict.seat,
                "member": said.verdict.member,
                "reason": said.verdict.reason,
                "since_s": said.verdict.since_s,
                "confidence": said.verdict.confidence,
                "evidence": dict(said.verdict.evidence),
                "step": said.step,
                "after_steps": said.steps,
                "lasts": said.lasts,
            }
            for said in replayed.said
        ],
    }
