"""ftkit and torchft 0.2.0 on the same toy, in one go: kill -9, and the step's overhead.

Three replicas of one process each train the same MLP (`toy`) on gloo, or on ftkit's own data
plane; one of them kills itself with SIGKILL in the middle of a step, when its gradients are
ready and before they are reduced. Time runs from just before the kill to the moment when the
last survivor has committed a step that was not committed before the kill.

torchft runs in an environment of its own (`--venv`, made if it is not there: torch 2.13.0 and
torchft 0.2.0 from the package index), with its README's lighthouse: `--min_replicas 1
--quorum_tick_ms 100 --join_timeout_ms 10000`, a 5 s timeout of the process group, defaults
otherwise. Its survivors crash as it is, so the figure is taken with a patched comm hook
(`toy_torchft.patched_hook`); one run without the patch is made too, and told.

ftkit runs at its default settings. Runs alternate. Step times are those of the same runs
before the kill, with three replicas, against plain DDP on gloo in the same go. The two do not
promise the same: after the loss ftkit keeps the global batch (two ranks play three slots) and
ends in the undisturbed run's bits; torchft goes on with two thirds of the batch.

    python -m benchmarks.against_torchft [--venv FOLDER] [--quick] [--json] [--save]
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.children import Children, free_port, gloo_environment, python
from benchmarks.faults import follow
from benchmarks.figures import Figure, Report, as_samples, finish, parser, percentile, say
from benchmarks.jobs import JobFailed, params_of, python_path, scratch
from benchmarks.step_time import median_interval
from ftkit.core.fault_plan import Kind, PlannedFault, Point, to_environ
from ftkit.core.trace import read_run
from ftkit.launch.config import JobConfig, new_job_id
from ftkit.launch.job import run_job

REPLICAS = 3
PACKAGES = ("torch==2.13.0", "torchft==0.2.0", "numpy")

#: Steps at the beginning whose times are left out.
WARM = 10

#: Everything torchft waits for is shorter: a run that takes longer than this is stuck.
STUCK_S = 180.0

PATCH = (
    "torchft was patched: DistributedDataParallel._comm_hook returns a finished future where the "
    "reduction failed (stock: an AssertionError in every survivor); see toy_torchft.patched_hook"
)


class NoTorchft(RuntimeError):
    """torchft cannot be installed or started here; the message says exactly why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of one framework, in seconds."""

    framework: str
    repair_s: float | None
    """Kill to the survivors' next committed step; None: a survivor never came to it."""
    step_s: float
    """Median step before the kill."""
    survivors_lost: int
    """Survivors that ended with an error."""
    params: tuple[str, ...]
    """The survivors' digests at the end."""
    said: str = ""
    """The last line of a survivor that died."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    rng = random.Random(options.seed)
    runs, trouble = list[Run](), ""
    with scratch("torchft") as folder:
        try:
            interpreter = environment(options.venv)
        except NoTorchft as error:
            interpreter, trouble = None, str(error)
        for number in range(options.runs):
            kill_at, victim = options.steps // 2 + rng.randrange(10), rng.randrange(REPLICAS)
            if interpreter is not None and not trouble:
                try:
                    here = folder / f"torchft-{number}"
                    theirs = run_torchft(interpreter, here, options, kill_at, victim, patched=True)
                    runs.append(theirs)
                    say(f"torchft: {theirs.repair_s} s")
                except NoTorchft as error:
                    trouble = str(error)
            ours = run_ftkit(folder / f"ftkit-{number}", options, kill_at, victim)
            runs.append(ours)
            say(f"ftkit: {ours.repair_s} s")
            runs.append(run_plain(folder / f"plain-{number}", options))
        if interpreter is not None and not trouble and not options.no_stock:
            runs.append(
                run_torchft(
                    interpreter, folder / "stock", options, options.steps // 2, 1, patched=False
                )
            )
        _, undisturbed = ftkit_events(folder / "undisturbed", options, [])
    return finish(report(runs, params_of(undisturbed), trouble, vars(options)), options)


def environment(folder: Path) -> str:
    """The interpreter of torchft's environment at `folder`, made if need be. Blocks.

    Raises:
      NoTorchft: it could not be made; says what pip or Python said.
    """
    interpreter, stamp = folder / "bin" / "python", folder / "ftkit-benchmark"
    wanted = " ".join(PACKAGES)
    if not (stamp.is_file() and stamp.read_text() == wanted):
        say(f"installing {wanted} into {folder} (once)")
        folder.parent.mkdir(parents=True, exist_ok=True)
        venv.create(folder, with_pip=True, clear=True)
        _check_run([str(interpreter), "-m", "pip", "install", "--quiet", *PACKAGES], "installed")
    _check_run([str(interpreter), "-c", "import torch, torchft"], "imported")
    stamp.write_text(wanted)
    return str(interpreter)


def _check_run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        raise NoTorchft(
            f"torchft could not be {what}: {' '.join(command)} exited with {done.returncode}: "
            f"{done.stderr.strip()[-800:]}"
        )


def run_torchft(
    interpreter: str,
    folder: Path,
    options: argparse.Namespace,
    kill_at: int,
    victim: int,
    *,
    patched: bool,
) -> Run:
    """One lighthouse and three replicas, one of which kills itself. Blocks.

    Raises:
      NoTorchft: the replicas did not come to train.
    """
    folder.mkdir()
    port, start = free_port(), free_port()
    lighthouse = str(Path(interpreter).with_name("torchft_lighthouse"))
    quiet = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
    with Children(folder) as children:
        server = children.start(
            [
                *(lighthouse, "--bind", f"0.0.0.0:{port}", "--min_replicas", "1"),
                *("--quorum_tick_ms", "100", "--join_timeout_ms", "10000"),
            ],
            quiet,
        )
        replicas = [
            children.start(
                [
                    *(interpreter, "-u", "-m", "benchmarks.toy_torchft", str(index)),
                    *map(str, (REPLICAS, options.steps, options.rows)),
                    *(f"http://127.0.0.1:{port}", str(start)),
                    *(str(kill_at if index == victim else 0), "1" if patched else "0"),
                ],
                quiet,
            )
            for index in range(REPLICAS)
        ]
        deadline = time.monotonic() + STUCK_S
        for replica in replicas:
            try:
                replica.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f"torchft: a replica is stuck after {STUCK_S:.0f} s")
        codes = [replica.poll() for replica in replicas]
        lines = [_lines(folder / f"child-{1 + index}.out") for index in range(REPLICAS)]
        kills = [e for e in lines[victim] if e["kind"] == "kill"]
        if not kills or codes[victim] != -signal.SIGKILL:
            words = " | ".join(_last(children.errors(n)) for n in range(1 + REPLICAS))
            raise NoTorchft(
                f"torchft's replicas did not train until step {kill_at}: exit codes {codes}, "
                f"lighthouse {server.poll()}; last words: {words}"
            )
        survivors = [index for index in range(REPLICAS) if index != victim]
        lost = [index for index in survivors if codes[index] != 0]
        said = _last(children.errors(1 + lost[0])) if lost else ""
    return Run(
        framework="torchft" if patched else "torchft, stock",
        repair_s=repair_after(kills[0], [lines[index] for index in survivors]),
        step_s=median_interval(
            [_commits(line, until=kills[0]["mono"]) for line in lines], warm=WARM
        ),
        survivors_lost=len(lost),
        params=tuple(e["params"] for i in survivors for e in lines[i] if e["kind"] == "final"),
        said=said,
    )


def repair_after(
    kill: dict[str, Any], survivors: Sequence[Sequence[dict[str, Any]]]
) -> float | None:
    """Seconds from `kill` until each survivor has committed its step or a later one; pure."""
    at = [
        min(
            (
                e["mono"]
                for e in lines
                if e["kind"] == "commit" and e["step"] >= kill["step"] and e["mono"] > kill["mono"]
            ),
            default=None,
        )
        for lines in survivors
    ]
    moments = [moment for moment in at if moment is not None]
    return max(moments) - kill["mono"] if len(moments) == len(survivors) else None


def run_ftkit(folder: Path, options: argparse.Namespace, kill_at: int, victim: int) -> Run:
    """The same through ftkit, at default settings. Blocks."""
    fault = PlannedFault(
        kind=Kind.KILL, point=Point.BACKWARD, seat=victim, member=victim, step=kill_at + 1
    )
    code, events = ftkit_events(folder, options, [fault])
    (repair,) = follow(events, nproc=REPLICAS)
    killed = next(e["mono"] for e in events if e["kind"] == "drill")
    before = [
        [e["mono"] for e in events if _is_commit(e, member) and e["mono"] < killed]
        for member in range(REPLICAS)
    ]
    broken = [e for e in events if e["kind"] == "exit" and e["member"] != victim and e["code"]]
    return Run(
        framework="ftkit",
        repair_s=repair.repair_s,
        step_s=median_interval(before, warm=WARM),
        survivors_lost=len(broken),
        params=tuple(sorted(params_of(events))),
        said="" if code == 0 else f"exit code {code}",
    )


def ftkit_events(
    folder: Path, options: argparse.Namespace, faults: list[PlannedFault]
) -> tuple[int, list[dict[str, Any]]]:
    """One job of ftkit's; its exit code and events. Blocks."""
    os.environ["PYTHONPATH"] = python_path()
    sizes = map(str, (options.steps + options.tail, options.rows, REPLICAS))
    stop = run_job(
        JobConfig(
            job=new_job_id(),
            command=python("-m", "benchmarks.toy_ftkit", *sizes),
            nproc=REPLICAS,
            run_dir=str(folder),
            rank_logs=True,
            env=to_environ(faults),
        )
    )
    if stop.code:
        raise JobFailed(f"{stop.reason} (code {stop.code})")
    return stop.code, read_run(folder)


def run_plain(folder: Path, options: argparse.Namespace) -> Run:
    """Plain DDP on gloo, undisturbed. Blocks."""
    folder.mkdir()
    port = free_port()
    with Children(folder) as children:
        for rank in range(REPLICAS):
            children.start(
                python("-m", "benchmarks.toy_plain", str(options.steps // 2), str(options.rows)),
                gloo_environment(rank, REPLICAS, port),
            )
        told = children.wait(timeout_s=STUCK_S)
        lines = [_lines(folder / f"child-{rank}.out") for rank in range(REPLICAS)]
    return Run(
        framework="plain DDP",
        repair_s=None,
        step_s=median_interval([_commits(line) for line in lines], warm=WARM),
        survivors_lost=0,
        params=tuple(sorted({str(t["params"]) for t in told})),
    )


def report(
    runs: Sequence[Run], undisturbed: set[str], trouble: str, options: dict[str, object]
) -> Report:
    """Both sides and their ratio; pure."""
    of = {name: [r for r in runs if r.framework == name] for name in {r.framework for r in runs}}
    problems, notes = list[str](), list[str]()
    for r in of.get("ftkit", []):
        if set(r.params) != undisturbed:
            problems.append(f"ftkit ended in {r.params}, the undisturbed run in {undisturbed}")
    for r in of.get("torchft", []):
        if len(set(r.params)) > 1:
            notes.append(f"torchft's survivors ended in different parameters: {r.params}")
    repair = {
        name: [r.repair_s for r in of.get(name, []) if r.repair_s is not None]
        for name in ("ftkit", "torchft")
    }
    step = {name: statistics.median(r.step_s for r in mine) for name, mine in of.items()}
    middle = {name: percentile(values, 50) for name, values in repair.items()}
    notes += [PATCH] if "torchft" in of else []
    notes += [f"no figures for torchft: {trouble}"] if trouble else []
    for r in of.get("torchft, stock", []):
        notes.append(
            f"torchft without the patch, one run: {r.survivors_lost} of {REPLICAS - 1} survivors "
            f"crashed{': ' + r.said if r.said else ''}"
        )
    lost = sum(r.repair_s is None for r in of.get("torchft", []))
    if lost:
        notes.append(f"in {lost} of torchft's runs a survivor never committed again; left out")
    figures = [
        Figure(name="ftkit: kill to next committed step, p50", value=middle["ftkit"], unit="s"),
        Figure(name="torchft: the same, p50", value=middle["torchft"], unit="s"),
        Figure(
            name="ftkit / torchft",
            value=_ratio(middle["ftkit"], middle["torchft"]),
            unit="x",
            at_most=1.0,
            against="torchft 0.2.0, patched",
        ),
        Figure(name="plain DDP on gloo: median step", value=step.get("plain DDP"), unit="s"),
        *(
            Figure(
                name=f"{name}: step / plain DDP",
                value=_ratio(step.get(name), step.get("plain DDP")),
                unit="x",
                against=_added(step.get(name), step.get("plain DDP")),
            )
            for name in ("ftkit", "torchft")
        ),
    ]
    return Report(
        name="against_torchft",
        figures=figures,
        computed={
            "parameters of ftkit, undisturbed and disturbed": " ".join(sorted(undisturbed)),
            "parameters of torchft's survivors": " ".join(
                sorted({p for r in of.get("torchft", []) for p in r.params})
            ),
        },
        problems=problems,
        notes=notes,
        options=options,
        samples=as_samples(runs),
    )


def _last(errors: str) -> str:
    """What a Python process died of: the last line that names an exception."""
    lines = [line for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line and not line.startswith(" ")]
    return (named or lines or [""])[-1]


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def _added(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else f"{(ours - theirs) * 1e3:+.1f} ms a step"


def _is_commit(event: dict[str, Any], member: int) -> bool:
    return bool(event["kind"] == "commit" and event["member"] == member)


def _commits(lines: Sequence[dict[str, Any]], until: float = float("inf")) -> list[float]:
    return [float(e["mono"]) for e in lines if e["kind"] == "commit" and e["mono"] < until]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a child's output; others (a framework's own words) are passed over."""
    texts = path.read_text(errors="replace").splitlines()
    return [json.loads(text) for text in texts if text.startswith('{"kind"')]


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    made = parser(__doc__)
    made.add_argument(
        "--venv",
        type=Path,
        default=cache / "ftkit" / ".venv-torchft",
        help="torchft's environment; made when it is not there",
    )
    made.add_argument("--runs", type=int, help="kills of each framework (5; quick: 1)")
    made.add_argument("--steps", type=int, default=160, help="steps; the kill is half-way")
    made.add_argument("--tail", type=int, default=200, help="ftkit's steps more: to rejoin in")
    made.add_argument("--rows", type=int, default=512, help="rows of a block: the step's length")
    made.add_argument("--no-stock", action="store_true", help="no run of torchft as it is")
    made.add_argument("--seed", type=int, default=0, help="decides victims and moments")
    options = made.parse_args(argv)
    if options.runs is None:
        options.runs = 1 if options.quick else 5
    return options


if __name__ == "__main__":
    sys.exit(main())
