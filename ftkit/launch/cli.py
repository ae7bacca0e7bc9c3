"""ftkit: the command line. One function a command; the work is done elsewhere."""

import contextlib
import difflib
import errno
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ftkit.core import exit_codes
from ftkit.core.errors import FtkitError, UsageError
from ftkit.launch import completion
from ftkit.launch.bench_command import bench
from ftkit.launch.choices import refuse_half_url, seconds_or_auto, steps_or_auto
from ftkit.launch.ckpt_command import ckpt
from ftkit.launch.later import Later
from ftkit.launch.logs import log_to_stderr
from ftkit.launch.programme import command as programme
from ftkit.launch.run_folder import RUNS, newest_run

log_to_stderr()


class Guarded(click.Group):
    """Shows our own errors and Ctrl-C as one message and an exit code, never as a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            click.echo(f"ftkit: {error}", err=True)
            sys.exit(exit_codes.USAGE)
        except FtkitError as error:
            click.echo(f"ftkit: {error}", err=True)
            sys.exit(exit_codes.UNRECOVERABLE)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = error.filename or "what is printed"
            click.echo(f"ftkit: {where} cannot be written: {error.strerror}", err=True)
            sys.exit(exit_codes.UNRECOVERABLE)
        except KeyboardInterrupt:
            click.echo("ftkit: interrupted", err=True)
            sys.exit(exit_codes.INTERRUPTED)


@click.group(cls=Guarded, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="ftkit")
def main() -> None:
    """Fault tolerance for distributed PyTorch training."""


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", "--nproc-per-node", default=1, show_default=True, help="Ranks on a node.")
@click.option("--nodes", "--nnodes", default=1, show_default=True, help="Nodes.")
@click.option(
    "--spares",
    default=0,
    show_default=True,
    help="Ranks more on each node, kept warm: one that is lost is replaced within a step or two.",
)
@click.option(
    "--spare-nodes",
    default=0,
    show_default=True,
    help="Nodes more, for ranks of nodes that --history advises against, or that are taken away.",
)
@click.option(
    "--engine", type=click.Choice(["embedded", "ray"]), help="Default: Ray if there is one."
)
@click.option(
    "--resources",
    default="",
    metavar="NAME=AMOUNT,...",
    help="With Ray: what each node books, such as GPU=8. Default: a GPU a rank, if there are enough.",
)
@click.option(
    "--placement",
    type=click.Choice(["auto", "spread", "strict-spread", "pack"]),
    default="auto",
    show_default=True,
    help="With Ray: whether nodes share machines; auto: where there are too few.",
)
@click.option(
    "--placement-timeout",
    "placement_s",
    default=300.0,
    show_default=True,
    help="With Ray: seconds that the cluster may take to make room, as by starting machines.",
)
@click.option(
    "--max-stall",
    "max_stall_s",
    default=30.0,
    show_default=True,
    help="Seconds a rank may keep the others waiting; all other times follow from it.",
)
@click.option(
    "--alarms-per-day",
    default=1.0,
    show_default=True,
    help="False alarms about slow ranks that the whole job may cost; fewer take more evidence.",
)
@click.option(
    "--parity", default="", help="k+m: any m nodes of a group of k + m may vanish together."
)
@click.option(
    "--parity-every",
    type=seconds_or_auto,
    metavar="SECONDS|auto",
    default=0,
    help="Between two rounds; 0: each follows the one before; auto: as often as pays.",
)
@click.option(
    "--max-slowdown",
    type=float,
    help="Parity and checkpoints travel while training does not, and beyond that take at most this "
    "part of the time, such as 0.01. Default: as fast as they can.",
)
@click.option(
    "--link-cap", type=float, help="With --max-slowdown: MB/s that a node sends of these, at most."
)
@click.option(
    "--memory-cap",
    type=float,
    help="With --max-slowdown: MB/s of memory traffic that they cause on a node, at most.",
)
@click.option("--run-dir", type=click.Path(path_type=Path), help="Default: runs/<job>.")
@click.option("--shm-root", default="/dev/shm", show_default=True, help="For snapshots in memory.")
@click.option(
    "--numa",
    default="auto",
    show_default=True,
    help="Memory node of a rank's snapshots: auto (that of its GPU or processors), off or a number.",
)
@click.option(
    "--on-loss",
    type=click.Choice(["auto", "smaller", "wait"]),
    default="auto",
    show_default=True,
    help="Where both can be done: go on smaller, wait for the replacement, or what loses less.",
)
@click.option("--max-restarts", default=100, show_default=True, help="Processes replaced in all.")
@click.option(
    "--preload/--no-preload",
    default=True,
    show_default=True,
    help="Import torch once a node, and fork its ranks from there.",
)
@click.option(
    "--record/--no-record",
    default=True,
    show_default=True,
    help="Record a script's gloo collectives, so that a rank that hangs is named.",
)
@click.option("--checkpoint-dir", default="", help="Where checkpoints go: a path or URL.")
@click.option(
    "--checkpoint-every",
    type=steps_or_auto,
    metavar="STEPS|auto",
    default=0,
    help="Steps between two; 0: the last alone; auto: as often as pays, by what is measured.",
)
@click.option(
    "--checkpoint-keep",
    default="last:3",
    show_default=True,
    help="Which to keep: last:N, every:STEPS, or both with a comma; '' for all.",
)
@click.option(
    "--fresh",
    is_flag=True,
    help="Begin at step 0. Checkpoints that are there go when the first new one is complete.",
)
@click.option("--metrics-port", default=0, help="Serve Prometheus metrics from each agent; 0: not.")
@click.option("--otel", is_flag=True, help="Send steps and verdicts as OpenTelemetry spans (OTLP).")
@click.option("--history", default="", help="File or URL that remembers nodes' faults across jobs.")
@click.option(
    "--preflight",
    type=click.Choice(["stop", "warn"]),
    is_flag=False,
    flag_value="stop",
    help="Check every node as `ftkit doctor` does before ranks start; stop when one fails, or warn.",
)
@click.option(
    "--drills/--no-drills",
    default=True,
    show_default=True,
    help="Whether `ftkit drill plan` of the same user may strike this job while it trains.",
)
@click.option("--quiet", is_flag=True, help="Say nothing but errors: no warnings of ftkit itself.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
@click.argument("script", shell_complete=completion.scripts)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    nproc: int,
    nodes: int,
    spares: int,
    spare_nodes: int,
    engine: str | None,
    resources: str,
    placement: str,
    placement_s: float,
    max_stall_s: float,
    alarms_per_day: float,
    parity: str,
    parity_every: float | str,
    max_slowdown: float | None,
    link_cap: float | None,
    memory_cap: float | None,
    numa: str,
    run_dir: Path | None,
    shm_root: str,
    on_loss: str,
    max_restarts: int,
    preload: bool,
    record: bool,
    checkpoint_dir: str,
    checkpoint_every: int | str,
    checkpoint_keep: str,
    fresh: bool,
    metrics_port: int,
    otel: bool,
    history: str,
    preflight: str | None,
    drills: bool,
    quiet: bool,
    as_json: bool,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT with ARGUMENTS on every rank, as torchrun does, and keep it alive.

    The exit code is 0 when every rank finished, the script's own when it failed, 64 when
    something was asked that cannot work, 130 or 143 after SIGINT or SIGTERM.
    """
    from ftkit.launch.config import JobConfig, default_engine, new_job_id
    from ftkit.launch.history import check_history
    from ftkit.launch.job import python_command, run_job
    from ftkit.launch.last_words import LastWords

    if script.startswith("-") and script != "-m":
        context = click.get_current_context()
        known = [name for option in context.command.params for name in option.opts]
        name = script.split("=")[0]
        near = difflib.get_close_matches(name, known)
        raise click.NoSuchOption(name, possibilities=near, ctx=context)
    log_to_stderr(quiet=quiet)
    job = new_job_id()
    folder = (run_dir or RUNS / job).resolve()
    engine = engine or default_engine()
    if engine != "ray" and (resources or placement != "auto"):
        raise UsageError(
            "--resources and --placement say where a Ray cluster puts the job's nodes, and this one "
            f"runs on the engine {engine}; give --engine ray, or set RAY_ADDRESS"
        )
    config = JobConfig(
        job=job,
        command=python_command(script, arguments),
        nodes=nodes,
        nproc=nproc,
        spares=spares,
        spare_nodes=spare_nodes,
        resources=resources,
        placement=placement,
        placement_s=placement_s,
        max_stall_s=max_stall_s,
        alarms_per_day=alarms_per_day,
        parity=parity,
        parity_every=parity_every,
        max_slowdown=max_slowdown,
        link_cap=None if link_cap is None else link_cap * 1e6,
        memory_cap=None if memory_cap is None else memory_cap * 1e6,
        numa=numa,
        run_dir=str(folder),
        shm_root=shm_root,
        on_loss=on_loss,
        restarts_max=max_restarts,
        preload=preload,
        record=record,
        checkpoint_dir=absolute(checkpoint_dir),
        checkpoint_every=checkpoint_every,
        checkpoint_keep=checkpoint_keep,
        checkpoint_fresh=fresh,
        metrics_port=metrics_port,
        history=absolute(history),
        preflight=preflight or "",
        drills=drills,
        quiet=quiet,
    )
    if checkpoint_dir:
        from ftkit.checkpoint.persist.keep import policies
        from ftkit.checkpoint.persist.retention import KeepBest

        # Refused before anything starts.
        if any(isinstance(policy, KeepBest) for policy in policies(checkpoint_keep)):
            raise UsageError(
                "--checkpoint-keep: a job's checkpoints carry no metric to choose the best by; use "
                "last:N and every:N"
            )
    check_history(config.history)
    _ = config.times  # an inconsistent set of times is refused before anything starts
    last = LastWords(
        folder, config.checkpoint_dir, lambda words: click.echo(f"ftkit: {words}", err=True)
    )
    followers: list[Callable[[], None]] = [last.poll] if checkpoint_dir else []
    with contextlib.ExitStack() as ends:
        if otel:
            from ftkit.launch.otel import Follower

            spans = Follower(folder, job, time.monotonic)
            ends.callback(spans.close)
            followers.append(spans.poll)

        def poll(_: object) -> None:
            for follow in followers:
                follow()

        stop = run_job(config, engine=engine, on_poll=poll)
    if as_json:
        told = {"code": stop.code, "reason": stop.reason, "run_dir": str(folder)}
        click.echo(json.dumps(told | ({"last_checkpoint": last.told} if last.told else {})))
    elif stop.code:
        click.echo(f"ftkit: {stop.reason} (events in {folder})", err=True)
    sys.exit(stop.code)


def absolute(url: str) -> str:
    """A path made absolute, as the job's processes may run elsewhere; URLs as they are.

    Raises:
      UsageError: it has one slash of a URL's two, and would become a folder named s3: here.
    """
    refuse_half_url(url)
    return url if not url or "://" in url else str(Path(url).resolve())


@main.group()
def drill() -> None:
    """Break a real run on purpose, and check what comes of it."""


@drill.command("list")
@click.option("--json", "as_json", is_flag=True)
def drill_list(as_json: bool) -> None:
    """The faults there are, and where in a step they can strike."""
    from ftkit.launch.drill_catalogue import CATALOGUE, NODE_CATALOGUE
    from ftkit.launch.mixed_drills import POINTS

    every = CATALOGUE | NODE_CATALOGUE
    if as_json:
        faults = [{"fault": name, "what": what} for name, what in every.items()]
        click.echo(json.dumps({"faults": faults, "phases": [p.value for p in POINTS]}))
        return
    for name, what in every.items():
        click.echo(f"{name:19} {what}")
    click.echo(f"\nphases (--at): {', '.join(p.value for p in POINTS)}; bucket k as backward:k")


#: A count of what there must be one of.
POSITIVE = click.IntRange(min=1)


def drill_options(*, steps: int) -> Callable[[Any], Any]:
    """The options that every drill takes; `steps` is the default length of the job."""

    def add(command: Any) -> Any:
        options = [
            click.option("--nproc", type=POSITIVE, default=3, show_default=True, help="Ranks."),
            click.option("--nodes", type=POSITIVE, default=1, show_default=True, help="Nodes."),
            click.option("--seed", default=0, show_default=True, help="Decides what is not given."),
            click.option(
                "--steps", type=POSITIVE, default=steps, show_default=True, help="Steps of the job."
            ),
            click.option("--engine", type=click.Choice(["embedded", "ray"]), default="embedded"),
            click.option("--max-stall", "max_stall_s", default=30.0, show_default=True),
            click.option("--parity", default="", help="k+m, as for `ftkit run`."),
            click.option(
                "--sharded",
                type=click.IntRange(min=0),
                is_flag=False,
                flag_value=1,
                default=0,
                metavar="[RANKS]",
                help="Cut the bundled job's model over all ranks (FSDP2), or over RANKS (HSDP).",
            ),
            click.option(
                "--zero", is_flag=True, help="Cut the bundled job's optimizer state over the ranks."
            ),
            click.option("--script", help="Your own script in place of the bundled job."),
            click.option("--run-dir", type=click.Path(path_type=Path)),
            click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
        ]
        for option in reversed(options):
            command = option(command)
        return command

    return add


@drill.command("run")
@click.argument("fault", shell_complete=completion.faults)
@click.option(
    "--at",
    "at",
    shell_complete=completion.phases,
    help="The phase of the step, by default one the seed picks.",
)
@click.option(
    "--count", type=click.IntRange(min=1), default=1, show_default=True, help="How many drills."
)
@drill_options(steps=200)
def drill_run(fault: str, at: str | None, count: int, as_json: bool, **options: Any) -> None:
    """Run the drill FAULT (see `ftkit drill list`; `all` picks faults by the seed).

    Exits with 0 when every drill passed, 1 when one failed, 2 when one could not be judged.
    """
    from ftkit.launch.drill_command import run_drills

    sys.exit(run_drills(fault, at=at, count=count, as_json=as_json, **options))


@drill.command("demo")
@click.option("--data", type=click.Path(path_type=Path), help="Text to train on.")
@click.option("--report", type=click.Path(path_type=Path), default=Path("report.html"))
@drill_options(steps=240)
def drill_demo(data: Path | None, report: Path, **options: Any) -> None:
    """The main job: train, lose a rank in the middle of a step, and end with the same bits."""
    from ftkit.launch.drill_command import run_demo

    sys.exit(run_demo(data=data, report=report, **options))


@main.command()
@click.argument(
    "run_dir",
    type=click.Path(path_type=Path),
    required=False,
    shell_complete=completion.runs,
)
@click.option("--json", "as_json", is_flag=True, help="The state now, as one JSON object.")
@click.option("--once", is_flag=True, help="Show the state now and end.")
def status(run_dir: Path | None, as_json: bool, once: bool) -> None:
    """Watch a running job (the newest one, or that of RUN_DIR)."""
    from ftkit.launch.live import follow

    sys.exit(follow(newest_run(run_dir), once=once, as_json=as_json))


@main.command()
@click.argument(
    "run_dir",
    metavar="[JOB]",
    type=click.Path(path_type=Path),
    required=False,
    shell_complete=completion.runs,
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8610,
    show_default=True,
    help="0 takes any that is free.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Where to listen; anywhere but on this machine alone, the page asks for a token.",
)
@click.option("--open", "open_browser", is_flag=True, help="Show the page in the browser.")
def ui(run_dir: Path | None, port: int, host: str, open_browser: bool) -> None:
    """Serve a web page that follows a run (JOB or its folder; by default the newest).

    Ranks, who waits for whom, copies of the state and incidents as they happen. The run is only
    read: the page costs its ranks nothing, may be started and ended at any time, and shows a run
    that is over as well.
    """
    from ftkit.launch.ui.command import serve

    found = newest_run(run_dir)
    code = serve(found, host=host, port=port, open_browser=open_browser, say=click.echo)
    sys.exit(code)


@main.command()
@click.argument(
    "run_dir",
    type=click.Path(path_type=Path),
    required=False,
    shell_complete=completion.runs,
)
@click.option("--json", "as_json", is_flag=True)
def explain(run_dir: Path | None, as_json: bool) -> None:
    """Say in a paragraph what happened in a run, and why."""
    from ftkit.core.trace import read_run, told_by
    from ftkit.detection.bundle import paragraph
    from ftkit.detection.incident import explain as explain_events
    from ftkit.detection.incident import incidents
    from ftkit.launch.approximate_story import approximate_story
    from ftkit.launch.goodput import goodput
    from ftkit.launch.incidents import read_bundles
    from ftkit.launch.storage_story import storage_story

    run_dir = newest_run(run_dir)
    events, bundles = read_run(run_dir), read_bundles(run_dir)
    with told_by(run_dir):
        storage, time_spent = storage_story(events), goodput(events)
        if as_json:
            told = {
                "incidents": [i.to_json() for i in incidents(events)],
                "bundles": [{**incident, "nodes": nodes} for incident, nodes in bundles],
            }
            also = {"storage": storage.to_json(), "goodput": time_spent.to_json()}
            text = json.dumps(told | also)
        else:
            told_of = (
                explain_events(events),
                *(paragraph(incident, nodes) for incident, nodes in bundles),
                *approximate_story(events),
                time_spent.paragraph(),
                storage.paragraph(),
            )
            text = "\n\n".join(t for t in told_of if t)
    click.echo(text)


@main.command()
@click.argument(
    "run_dir",
    type=click.Path(path_type=Path),
    required=False,
    shell_complete=completion.runs,
)
@click.option("--world", type=click.IntRange(min=1), help="Ranks of the full job.")
@click.option("--lost", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--node-lost", is_flag=True, help="Another node has to be found for them.")
@click.option("--spares", type=click.IntRange(min=0), default=0, help="Hot spares that are ready.")
@click.option("--world-min", type=click.IntRange(min=1), default=1, help="Fewer cannot train.")
@click.option("--no-memory", is_flag=True, help="Memory does not hold the whole state.")
@click.option("--parity-steps", type=click.IntRange(min=0), help="Steps since what parity has.")
@click.option("--disk-steps", type=click.IntRange(min=0), help="Steps since the checkpoint.")
@click.option("--stale-steps", type=click.IntRange(min=0), help="Age of the lost shard's copy.")
@click.option("--done-steps", type=click.IntRange(min=0), default=0, help="Steps so far.")
@click.option("--neighbours", is_flag=True, help="The lost are a stage whose neighbours live.")
@click.option("--swapped", is_flag=True, help="The lost is an outer stage, with a stand-in.")
@click.option("--remaining-s", type=click.FloatRange(min=0), help="Training still to do.")
@click.option("--allow-approximate", is_flag=True, help="Ways that change the result, too.")
@click.option("--step-s", type=click.FloatRange(min=0, min_open=True), help="A step, full world.")
@click.option("--slots", type=click.IntRange(min=1), help="Of the global batch, kept whole.")
@click.option("--mtbf-h", type=click.FloatRange(min=0, min_open=True), help="Of one rank.")
@click.option("--cost", "given", multiple=True, metavar="NAME=VALUE", help="Any other cost.")
@click.option("--json", "as_json", is_flag=True)
def plan(
    run_dir: Path | None,
    world: int | None,
    step_s: float | None,
    slots: int | None,
    mtbf_h: float | None,
    given: tuple[str, ...],
    no_memory: bool,
    neighbours: bool,
    as_json: bool,
    **loss: Any,
) -> None:
    """Say what would be done about a loss, and what each way back would cost.

    Costs are those that RUN_DIR measured, where it is given, and those of the options; the rest
    is assumed, and listed. Prints the intervals of snapshots, parity and checkpoints as well.
    """
    from ftkit.launch.plan_command import gather, show
    from ftkit.recovery.policy import Loss

    if run_dir is not None:
        run_dir = newest_run(run_dir)
    costs, rate, chosen = gather(
        run_dir, world=world, step_s=step_s, slots=slots, given=given, mtbf_h=mtbf_h
    )
    try:
        lost = Loss(
            world=costs.world,
            in_memory=not no_memory,
            snapshot_steps=None if no_memory else 0,
            neighbours_alive=neighbours,
            **loss,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    show(lost, costs, rate, chosen, as_json=as_json)


@main.command()
@click.argument(
    "run_dir",
    type=click.Path(path_type=Path),
    required=False,
    shell_complete=completion.runs,
)
@click.option("--reference", type=click.Path(path_type=Path), help="An undisturbed run.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("report.html"))
@click.option("--json", "as_json", is_flag=True)
def report(run_dir: Path | None, reference: Path | None, out: Path, as_json: bool) -> None:
    """Write a page with the loss, the timeline and the goodput of a run."""
    from ftkit.core.trace import read_run, told_by
    from ftkit.launch.approximate_story import approximate_story
    from ftkit.launch.checker import check, expectation_of
    from ftkit.launch.goodput import goodput
    from ftkit.launch.report import write_report

    run_dir = newest_run(run_dir)
    events = read_run(run_dir)
    undisturbed = read_run(newest_run(reference)) if reference else None
    # What was not meant to be broken is no drill, and has nothing to pass.
    drilled = any(e.get("kind") == "drill" for e in events)
    with told_by(run_dir):
        outcome = None
        if drilled or reference:
            outcome = check(events, undisturbed, expectation_of(events))
        try:
            write_report(out, events, undisturbed, outcome)
        except OSError as error:
            raise UsageError(f"--out {out} cannot be written: {error.strerror}") from error
        spent, mixed = goodput(events), approximate_story(events)
    if as_json:
        click.echo(json.dumps({"report": str(out), "approximate": mixed} | spent.to_json()))
    else:
        click.echo("\n".join(t for t in (spent.paragraph(), *mixed, f"wrote {out}") if t))


@main.group(invoke_without_command=True)
@click.option("--history", type=click.Path(path_type=Path), help="Results as JSON lines: compared.")
@click.option("--disk", type=click.Path(path_type=Path), default=Path(), help="On the disk to try.")
@click.option("--shm-root", type=click.Path(path_type=Path), default=Path("/dev/shm"))
@click.option("--torch/--no-torch", default=True, show_default=True, help="Try torch and GPUs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.pass_context
def doctor(
    context: click.Context,
    history: Path | None,
    disk: Path,
    shm_root: Path,
    torch: bool,
    as_json: bool,
) -> None:
    """Look whether this machine, or these, can carry a job.

    Without a command this node is checked: processors, memory, disk, network, clock, torch, GPUs.
    Exits with 1 when something failed.
    """
    if context.invoked_subcommand is not None:
        return
    from ftkit.launch.preflight import check_node, compared
    from ftkit.launch.preflight_view import show

    if disk.exists() and not disk.is_dir():
        raise UsageError(f"--disk {disk} is no folder: give one on the disk to try")
    found = check_node(disk, shm_root, torch=torch)
    try:
        found = compared(found, history)
    except OSError as error:
        raise UsageError(f"--history {history} cannot be used: {error.strerror}") from error
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        show(found)
    sys.exit(1 if found.failed else 0)


@doctor.command("network")
@click.option("--nproc", default=4, show_default=True, help="Processes of this machine to try.")
@click.option("--nodes", "--nnodes", default=1, show_default=True, help="Nodes; run it on each.")
@click.option("--node-rank", default=0, show_default=True, help="Which of them this is.")
@click.option("--master", default="", help="HOST:PORT at which node 0 is met.")
@click.option("--host", default="", help="This node's address, as the others know it.")
@click.option("--seconds", default=0.3, show_default=True, help="How long each pair is tried.")
@click.option("--transport", type=click.Choice(["auto", "tcp", "cma"]), default="auto")
@click.option("--connections", default=1, show_default=True, help="TCP connections to a node.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor_network(
    seconds: float, transport: str, connections: int, as_json: bool, **where: Any
) -> None:
    """Measure between all nodes, and show the ring that a job would use.

    Exits with 1 when two nodes cannot reach each other.
    """
    from ftkit.launch.network_doctor import configured, examine, show

    found = examine(config=configured(seconds, transport, connections), **where)
    if found is None:
        return  # node 0 has it
    if as_json:
        click.echo(json.dumps(found.to_json()))
    else:
        show(found)
    sys.exit(1 if found.unreachable else 0)


@doctor.command("offenders")
@click.option("--history", required=True, help="The file or URL given to `ftkit run --history`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def doctor_offenders(history: str, as_json: bool) -> None:
    """Say which nodes fail far more often than the others, and what to leave out.

    Also how often failed jobs were started again, and whether it helped. Exits with 1 when there is
    a node to leave out. What the rule would have avoided elsewhere: `ftkit detect replay`.
    """
    from ftkit.launch.offenders_command import offenders

    sys.exit(offenders(history, as_json=as_json))


for command in (programme.plan, programme.stop, programme.certificate):
    drill.add_command(command)
main.add_command(bench)
main.add_command(ckpt)
main.add_command(
    Later(
        "detect",
        "ftkit.launch.detect_command",
        "Judge a recorded job with the detectors that watch a live one.",
    )
)


if __name__ == "__main__":
    main()
