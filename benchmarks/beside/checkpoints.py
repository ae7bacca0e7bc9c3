"""Checkpoints for the tools that go back to one, and those by torch's DCP; needs only torch."""

from pathlib import Path
from typing import Any, Protocol

import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.beside.task import Task


class Checkpoints(Protocol):
    """How a tool saves, and where it goes on from. All ranks of the group call alike; blocks."""

    def restore(self, task: Task, model: nn.Module, optimizer: optim.Optimizer) -> int:
        """Load the newest complete one, if there is one. Returns the step it was taken after."""

    def save(self, task: Task, model: nn.Module, optimizer: optim.Optimizer, step: int) -> None:
        """Save what is there after `step`, whose turn it is."""


class ByDCP:
    """In a folder of the task."""

    def restore(self, task: Task, model: nn.Module, optimizer: optim.Optimizer) -> int:
        """As in the protocol."""
        # DCP writes the metadata last.
        found = [int(p.parent.name.partition("-")[2]) for p in _folder(task).glob("*/.metadata")]
        if not found:
            return 0
        newest = max(found)
        weights, moments = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=_folder(task) / f"step-{newest}")
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return newest

    def save(self, task: Task, model: nn.Module, optimizer: optim.Optimizer, step: int) -> None:
        """As in the protocol."""
        weights, moments = get_state_dict(model, optimizer)
        where = _folder(task) / f"step-{step}"
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=where)


def _folder(task: Task) -> Path:
    return Path(task.folder) / "checkpoints"
