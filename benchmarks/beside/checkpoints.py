"""Checkpoints by torch's DCP, for the tools that go back to one; needs only torch."""

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.beside.task import Task


def save(task: Task, model: nn.Module, optimizer: optim.Optimizer, step: int) -> None:
    """Save what is there after `step`, if it is its turn. All ranks of the group; blocks."""
    if task.save_every and step % task.save_every == 0:
        weights, moments = get_state_dict(model, optimizer)
        where = _folder(task) / f"step-{step}"
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=where)


def restore(task: Task, model: nn.Module, optimizer: optim.Optimizer) -> int:
    """Load the newest complete checkpoint, if there is one. Returns the step it was taken after."""
    # DCP writes the metadata last.
    found = [int(p.parent.name.partition("-")[2]) for p in _folder(task).glob("step-*/.metadata")]
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


def _folder(task: Task) -> Path:
    return Path(task.folder) / "checkpoints"
