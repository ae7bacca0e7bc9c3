"""A newcomer's first minutes: commands that answer at once, and the first survived kill.

::

    help, ls     `ftkit --help`, and `ftkit ckpt ls` of a folder with ten checkpoints: wall time, median
    first kill   a fresh clone in a folder of its own: `scripts/demo` from nothing to its last line, less
                 what installing torch takes

The clone is of this checkout's last commit. It installs from the package index that pip is set to.

    python -m benchmarks.first_steps [--clones 1] [--quick] [--json] [--save]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import ROOT, Job, JobFailed, scratch

#: Goals, in seconds.
HELP_S, LS_S, FIRST_KILL_S = 0.3, 0.5, 90.0
CHECKPOINTS, STEPS_EACH = 10, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--runs", type=int, help="of each command (15; quick: 3)")
    made.add_argument("--clones", type=int, help="fresh clones (1; quick: 0)")
    options = made.parse_args(argv)
    runs = options.runs or (3 if options.quick else 15)
    clones = (0 if options.quick else 1) if options.clones is None else options.clones
    with scratch("first-steps") as folder:
        checkpoints = folder / "checkpoints"
        steps = CHECKPOINTS * STEPS_EACH
        Job(nproc=1, steps=steps, slots=1, slot_size=1).run(
            folder / "job",
            settings={
                "checkpoint_dir": str(checkpoints),
                "checkpoint_every": STEPS_EACH,
                "checkpoint_keep": f"last:{CHECKPOINTS}",
            },
        )
        help_s = [timed("--help") for _ in range(runs)]
        ls_s = [timed("ckpt", "ls", str(checkpoints)) for _ in range(runs)]
        kills = [first_kill(folder / f"clone-{number}") for number in range(clones)]
    return finish(report(help_s, ls_s, kills, options), options)


def timed(*arguments: str) -> float:
    """Seconds that a command of ftkit's takes, its interpreter's start included. JobFailed."""
    command = [str(Path(sys.executable).with_name("ftkit")), *arguments]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise JobFailed(f"{' '.join(arguments)}: {done.stderr[-500:]}")
    return time.monotonic() - start


def first_kill(clone: Path) -> tuple[float, float]:
    """Seconds that the demo took in a fresh clone, and those of them that torch took. JobFailed."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True, timeout=60)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    python = shutil.which(os.environ.get("FTKIT_PYTHON", "python3.11")) or sys.executable
    start = time.monotonic()
    _run([python, "-m", "venv", ".venv"], clone, env)
    before_torch = time.monotonic()
    pip = [".venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "torch==2.13.0"], clone, env)
    torch_s = time.monotonic() - before_torch
    told = _run(["./scripts/demo", "--json"], clone, env)
    total_s = time.monotonic() - start
    if not json.loads(told.splitlines()[-1]):
        raise JobFailed(f"the demo told nothing: {told[-500:]}")
    say(f"fresh clone to first survived kill {total_s:.1f} s, of which torch {torch_s:.1f} s")
    return total_s, torch_s


def _run(command: Sequence[str], where: Path, env: dict[str, str]) -> str:
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, cwd=where, env=env, stdout=subprocess.PIPE, stderr=errors, text=True,
            timeout=900, check=False,
        )  # fmt: skip
        if done.returncode:
            errors.seek(0)
            raise JobFailed(f"{command[0]} exited with {done.returncode}: {errors.read()[-800:]}")
    return done.stdout


def report(
    help_s: Sequence[float],
    ls_s: Sequence[float],
    kills: Sequence[tuple[float, float]],
    options: argparse.Namespace,
) -> Report:
    """The figures; pure."""
    figures = [
        Figure(name="ftkit --help", value=median(help_s), unit="s", at_most=HELP_S),
        Figure(name="ftkit ckpt ls", value=median(ls_s), unit="s", at_most=LS_S),
    ]
    if kills:
        first = Figure(
            name="fresh clone to first survived kill, less torch",
            value=median(total - torch for total, torch in kills),
            unit="s",
            at_most=FIRST_KILL_S,
        )
        figures.append(first)
    return Report(
        name="first_steps",
        figures=figures,
        computed={"checkpoints": str(CHECKPOINTS)},
        problems=[],
        options=vars(options),
        samples={"help_s": list(help_s), "ls_s": list(ls_s), "kills_s": [list(k) for k in kills]},
    )


if __name__ == "__main__":
    sys.exit(main())
