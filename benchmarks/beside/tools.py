"""The tools that are compared: how each is started for a task, and what was set."""

import contextlib
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.beside.environments import Environment
from benchmarks.beside.task import Task
from benchmarks.children import free_port, gloo_environment
from benchmarks.jobs import ROOT, python_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One process to start."""

    argv: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)
    server: bool = False
    """Runs until it is ended; nobody waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Where a run takes place."""

    task: Task
    python: Path
    shm: Path
    """An empty folder of shared memory, removed afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A row of the table."""

    name: str
    peer: str
    """What `--only` calls it: rows of the same software share it."""
    commands: Callable[[Site], list[Command]]
    environment: Environment | None = None
    """None: runs on ftkit's own Python."""
    saves: bool = False
    """Whether it goes back to a checkpoint after a fault."""
    disturbed: bool = True
    """Whether faults are done to it."""
    how: str = ""
    """What a reader must know of its settings."""


TORCHFT = Environment(
    name="torchft", packages=("torchft==0.2.0", "numpy"), probe="import torch, torchft"
)
NVRX = Environment(
    name="nvrx",
    packages=("nvidia-resiliency-ext==0.4.1", "numpy"),
    probe="import torch, nvidia_resiliency_ext.inprocess",
)
RAY = Environment(
    name="ray", packages=("ray[train]==2.60.0",), probe="import torch, ray.train.torch"
)

#: Free ports that NVRx takes after its first: one for each restart.
RESTARTS = 4

#: Where torch's launcher shares one store among all its restarts.
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def _module(site: Site, name: str, *arguments: str) -> tuple[str, ...]:
    return (str(site.python), "-u", "-m", f"benchmarks.beside.{name}", *arguments)


def _ddp(site: Site) -> list[Command]:
    port, ranks = free_port(), site.task.slots
    return [
        Command(argv=_module(site, "with_torchrun"), env=gloo_environment(rank, ranks, port))
        for rank in range(ranks)
    ]


def _ftkit(site: Site) -> list[Command]:
    options = [
        *("--nproc", str(site.task.slots), "--max-stall", str(site.task.stall_s)),
        *("--engine", "embedded", "--shm-root", str(site.shm), "--quiet"),
        *("--run-dir", str(Path(site.task.folder) / "run")),
    ]
    argv = [
        *(str(site.python), "-m", "ftkit.launch.cli", "run", *options),
        *("-m", "benchmarks.beside.with_ftkit"),
    ]
    return [Command(argv=argv, env={"PYTHONPATH": python_path()})]


def _torchft(variant: str) -> Callable[[Site], list[Command]]:
    def commands(site: Site) -> list[Command]:
        port, meet = free_port(), free_port()
        lighthouse = Command(
            argv=[
                *(str(site.python.with_name("torchft_lighthouse")), "--bind", f"127.0.0.1:{port}"),
                *("--min_replicas", "1", "--quorum_tick_ms", "100", "--join_timeout_ms", "10000"),
            ],
            server=True,
        )
        replicas = [
            Command(
                argv=_module(
                    *(site, "with_torchft", str(index)),
                    *(f"http://127.0.0.1:{port}", str(meet), variant),
                ),
                env={"RUST_LOG": "error"},
            )
            for index in range(site.task.slots)
        ]
        return [lighthouse, *replicas]

    return commands


def _torchrun(*, shared_store: bool) -> Callable[[Site], list[Command]]:
    def commands(site: Site) -> list[Command]:
        argv = [
            *(str(site.python), "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(site.task.slots), "--max-restarts", "3"),
            *("-m", "benchmarks.beside.with_torchrun"),
        ]
        return [Command(argv=argv, env={SHARED_STORE: "0" if shared_store else "1"})]

    return commands


def _nvrx(site: Site) -> list[Command]:
    first, ranks = _free_row(1 + RESTARTS), site.task.slots
    return [
        Command(argv=_module(site, "with_nvrx"), env=gloo_environment(rank, ranks, first))
        for rank in range(ranks)
    ]


def _ray(site: Site) -> list[Command]:
    # A token of this run's own, or Ray would write one into the home of whoever runs this.
    return [
        Command(
            argv=_module(site, "with_ray", str(Path(site.task.folder) / "ray"), str(site.shm)),
            env={"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        )
    ]


DDP = Tool(name="plain DDP", peer="ddp", commands=_ddp, disturbed=False)

FTKIT = Tool(
    name="ftkit",
    peer="ftkit",
    commands=_ftkit,
    how="`ftkit run` with its defaults and --max-stall; every step is in memory, nothing on disk",
)

#: In the order of the table.
PEERS = (
    Tool(
        name="torchft",
        peer="torchft",
        commands=_torchft("stock"),
        environment=TORCHFT,
        how="as it is: its README's lighthouse, the limit of its process group set. A dead replica "
        "is not started again, which torchft leaves to a launcher",
    ),
    Tool(
        name="torchft, patched",
        peer="torchft",
        commands=_torchft("patched"),
        environment=TORCHFT,
        how="its DDP hook returns a finished future where a reduction failed "
        "(benchmarks/toy_torchft.py, patched_hook)",
    ),
    Tool(
        name="torchrun + DCP",
        peer="torchrun",
        commands=_torchrun(shared_store=True),
        saves=True,
        how="as it is: --standalone --max-restarts 3, the rest by default",
    ),
    Tool(
        name="torchrun + DCP, own store",
        peer="torchrun",
        commands=_torchrun(shared_store=False),
        saves=True,
        how=f"the same with {SHARED_STORE}=1",
    ),
    Tool(
        name="NVRx in-process",
        peer="nvrx",
        commands=_nvrx,
        environment=NVRX,
        saves=True,
        how="inprocess.Wrapper, checkpoints by DCP; all its intervals 0.2 s (1 s by default), soft "
        "and hard limit 1.5 and 2 times the stall (60 and 90 s by default)",
    ),
    Tool(
        name="Ray Train",
        peer="ray",
        commands=_ray,
        environment=RAY,
        saves=True,
        how="TorchTrainer on gloo, FailureConfig(max_failures=3), a cluster of its own; rank 0 "
        "reports a checkpoint",
    ),
)

#: Every row, and what `--only` may name.
TOOLS = (DDP, FTKIT, *PEERS)
NAMES = tuple(dict.fromkeys(tool.peer for tool in PEERS))


def _free_row(count: int) -> int:
    """The first of `count` neighbouring ports that were free a moment ago."""
    for _ in range(100):
        first = free_port()
        with contextlib.ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return first
    raise OSError(f"no {count} neighbouring ports are free on 127.0.0.1")


def environment_of(tool: Tool, task: Task) -> dict[str, str]:
    """What every process of a run is given besides: the task, this checkout, one thread."""
    return {**task.to_environ(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
