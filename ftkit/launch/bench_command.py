"""`ftkit bench`: ftkit beside other tools, measured here. The benchmarks are part of the source."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click

import ftkit
from ftkit.core.errors import UsageError
from ftkit.launch.choices import chosen

#: The peers that there are; `benchmarks.beside.tools` says how each is run.
PEERS = ("torchft", "torchrun", "nvrx", "ray")

#: Stalls within which the slowest tool trains on: NVRx waits for two and then starts all ranks anew.
PATIENCE = 4


@click.group()
def bench() -> None:
    """Measure ftkit beside other tools."""


@bench.command("peers")
@click.option("--only", default="", help=f"Some of {', '.join(PEERS)}, with commas. Default: all.")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Of each tool, undisturbed and struck; each strikes another rank.",
)
@click.option(
    "--fault",
    type=click.Choice(["kill", "stop"]),
    default="kill",
    show_default=True,
    help="SIGKILL or SIGSTOP, in the middle of a step.",
)
@click.option("--nproc", type=click.IntRange(min=2), default=3, show_default=True, help="Ranks.")
@click.option(
    "--steps",
    type=click.IntRange(min=24),
    default=240,
    show_default=True,
    help="Steps of each run.",
)
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Rows of a rank's batch: how long a step takes.",
)
@click.option(
    "--save-every",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Steps between two checkpoints of the tools that go back to one.",
)
@click.option(
    "--stall",
    "stall_s",
    type=click.FloatRange(min=1),
    default=5.0,
    show_default=True,
    help="Seconds a rank may keep the others waiting, given to every tool that can be told.",
)
@click.option(
    "--time-limit",
    "limit_s",
    type=click.FloatRange(min=1),
    default=90.0,
    show_default=True,
    help="Seconds without a finished step after which a run is ended.",
)
@click.option("--seed", default=0, show_default=True, help="Decides the moments.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("peers.html"),
    show_default=True,
    help="The page with the table and the plot.",
)
@click.option("--save", "keep", is_flag=True, help="Keep the figures in benchmarks/results too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def peers(only: str, keep: bool, as_json: bool, out: Path, **asked: Any) -> None:
    """Run the same training and the same fault through ftkit and its peers, and compare.

    Peers are installed into environments of their own under ~/.cache/ftkit/peers, once; all run on
    the torch that ftkit runs on. Tools take turns. What cannot be installed or does not recover gets
    a row that says why. Exits with 1 when ftkit itself did not do as it promises.

    Needs a clone of ftkit's repository: the benchmarks are not installed with it.
    """
    names = chosen(only, PEERS, option="--only")
    if asked["steps"] < 2 * asked["save_every"]:
        raise UsageError(
            f"--steps {asked['steps']} is less than twice --save-every {asked['save_every']}: a run "
            "would be struck before its first checkpoint; give more steps or save more often"
        )
    stall, limit = asked["stall_s"], asked["limit_s"]
    if limit < PATIENCE * stall:
        raise UsageError(
            f"--time-limit {limit:g} is less than {PATIENCE} times --stall {stall:g}: tools that wait so "
            "long before they begin to recover would be ended in the middle of it; raise the one or "
            "lower the other"
        )
    folder = out.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"--out {out}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"--out {out}: {folder} cannot be written to; name another file")
    bench = benchmark("benchmarks.beside.bench")
    code = bench.run(bench.Settings(only=names, **asked), out=out, keep=keep, as_json=as_json)
    sys.exit(code)


def benchmark(name: str) -> Any:
    """A module of the benchmarks, which lie beside the package in a clone.

    Raises:
      UsageError: ftkit was installed without them; says how to get them.
    """
    root = Path(ftkit.__file__).parents[1]
    if not (root / (name.replace(".", "/") + ".py")).is_file():
        raise UsageError(
            f"the benchmarks are not installed with ftkit ({root} has no benchmarks/): clone ftkit's "
            "repository, `pip install -e .` in the clone, and run this again there"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(name)
