"""The task that every tool trains: one model, one data set, one global batch, one fault; needs torch.

A step's global batch is `slots` blocks of the toy's data; slot i of step s is block
(s - 1) * slots + i, whoever plays it. Where fewer ranks are left than slots, a rank plays several
(`mine`), if its tool lets it. What ranks do is written to a step log each, `steps/<pid>.jsonl`:

    begin    `step`: training (re)starts in this process, this step is next
    commit   `step`, `blocks`: the optimizer has stepped, and what was in this rank's gradient
    strike   `step`: this rank is about to kill or to stop itself
    final    `peak_mib`: all steps are done, the parameters lie in `finals/<pid>.pt`

Every line has `mono`, monotonic seconds of the host.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.toy import BLOCKS, Noise, loss_of

#: The environment variable that carries a task to its ranks.
VARIABLE = "FTKIT_BENCH_TASK"

#: What can be done to a rank.
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run."""

    folder: str
    """For step logs, checkpoints and whatever else the run writes."""
    steps: int
    slots: int
    """Of the global batch, and ranks to begin with."""
    rows: int
    """Of a block: how long a step takes."""
    save_every: int
    """Steps between two checkpoints of the tools that go back to one."""
    stall_s: float
    """How long a rank may keep the others waiting, where a tool can be told."""
    fault: str = ""
    """A key of SIGNALS; empty for an undisturbed run."""
    victim: int = 0
    strike: int = 0
    """In the middle of this step, counted from 1."""

    def to_environ(self) -> dict[str, str]:
        """How ranks are told."""
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environ(cls) -> "Task":
        """The task of this process. KeyError outside a run."""
        return cls(**json.loads(os.environ[VARIABLE]))

    def mine(self, step: int, rank: int, world: int) -> list[int]:
        """The blocks of `step` that a rank plays in a world of `world` ranks."""
        return [(step - 1) * self.slots + slot for slot in range(rank, self.slots, world)]


def batch_loss(
    task: Task, model: nn.Module, data: Noise, blocks: Sequence[int], world: int
) -> Tensor:
    """The loss whose gradient, averaged over `world` ranks, is that of the global batch."""
    rows = torch.cat([data[block % BLOCKS] for block in blocks])
    loss = loss_of(model, rows)
    return loss if task.slots == world else loss * (len(blocks) * world / task.slots)


class StepLog:
    """What one process tells of its steps, and the fault it does to itself."""

    def __init__(self, task: Task, rank: int) -> None:
        """`rank`: which of the task's ranks this one is, for the fault."""
        self._task = task
        self._rank = rank
        self._step = 0
        self._blocks: Sequence[int] = ()
        folder = Path(task.folder) / "steps"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def begin(self, model: nn.Module, step: int) -> None:
        """Training (re)starts with `step`; `model` is the one that may be struck."""
        if self._task.fault:
            # The gradient of the first layer comes last: all others are there.
            next(model.parameters()).register_hook(self._strike)
        self._tell("begin", step=step)

    def attempt(self, step: int, blocks: Sequence[int]) -> None:
        """This rank plays `step` now, with these blocks."""
        self._step, self._blocks = step, blocks

    def commit(self) -> None:
        """The step that was attempted last is done."""
        self._tell("commit", step=self._step, blocks=list(self._blocks))

    def final(self, model: nn.Module) -> None:
        """All steps are done."""
        folder = Path(self._task.folder) / "finals"
        folder.mkdir(exist_ok=True)
        whole = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
        part = folder / f"{os.getpid()}.part"
        torch.save(whole, part)
        part.replace(part.with_suffix(".pt"))
        self._tell("final", peak_mib=peak_mib())

    def _strike(self, gradient: Tensor) -> None:
        task = self._task
        if self._rank != task.victim or self._step < task.strike:
            return
        try:
            (Path(task.folder) / "struck").touch(exist_ok=False)
        except FileExistsError:
            return  # a job that was started again is not struck again
        self._tell("strike", step=self._step)
        os.kill(os.getpid(), SIGNALS[task.fault])

    def _tell(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"kind": kind, "mono": time.monotonic()} | fields) + "\n")


def peak_mib() -> float:
    """The most memory this process has had, in MiB: its resident pages, shared ones too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM: peak memory is read on Linux only")


def leave() -> None:
    """End well, at once: threads of gloo's or of a tool's servers would abort or outlive the rest."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
