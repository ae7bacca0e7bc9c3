"""Save and load without a job: one process, one call, the same format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ftkit.checkpoint.load import load_state, small_of_seats
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.commit import CommitRecord, abandoned_on_error, begin, commit
from ftkit.checkpoint.persist.lease import Lease, one_time
from ftkit.checkpoint.persist.plan import CheckpointPlan, Piece
from ftkit.checkpoint.persist.source import CheckpointSource, small_by_seat
from ftkit.checkpoint.persist.store import open_store
from ftkit.checkpoint.persist.write import write
from ftkit.checkpoint.state import ProtectedState, Stateful, bytes_of
from ftkit.core.errors import UsageError
from ftkit.core.ids import JobId, Seat, Step


def save(
    url: str | Path,
    step: int,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    scheduler: Stateful | Sequence[Stateful] = (),
    metrics: dict[str, float] | None = None,
    **extra: Stateful,
) -> CommitRecord:
    """Write a checkpoint of this process's state. Blocks until it is durable.

    Args:
      url: the root: a path, or any URL that fsspec knows.
      step: which step it is.
      model: as `Session.protect` takes it, and so the others. The tensors must be whole on this
        process: of a sharded model, every rank's part is needed.
      optimizer: one or several.
      scheduler: one or several.
      metrics: kept in the record, for retention.
      **extra: further objects with `state_dict` and `load_state_dict`.

    Returns:
      The commit record; its `profile` says where the time went.

    Raises:
      UsageError: the step is committed already, or the state is a part of a sharded one.
      RootInUse: a job writes there.
      CapacityError: the store is full. Nothing was committed.
      StoreError: the store failed. Nothing was committed.
    """
    picture = _protected(model, optimizer, scheduler, extra).picture()
    pieces = [
        Piece(
            entry.name,
            entry.dtype,
            entry.global_shape,
            entry.offsets,
            entry.shape,
            bytes_of(live.tensor.detach().cpu().contiguous()),
        )
        for entry, live in zip(picture.layout.entries, picture.live, strict=True)
    ]
    plan, store = CheckpointPlan.of(pieces), open_store(url)
    with Lease.take(store, one_time(JobId("save"))) as lease:
        begin(store, Step(step), lease)
        small = {"0": json.loads(picture.small)}
        with abandoned_on_error(store, Step(step)):
            fragment = write(store, Step(step), plan, lease.kept_while(pieces), small=small)
            return commit(store, Step(step), plan, [fragment], lease, metrics=metrics)


def load(
    url: str | Path,
    step: int | None = None,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    scheduler: Stateful | Sequence[Stateful] = (),
    **extra: Stateful,
) -> int:
    """Load a checkpoint into this process's state, in place. Blocks.

    Written by `save` or by a job of any size and sharding: of a sharded model, each rank reads
    the boxes that it holds.

    Args:
      url: the root.
      step: which; None for the newest good one.
      model: what to load into, as for `save`; the same objects under the same names.
      optimizer: one or several.
      scheduler: one or several.
      **extra: further objects.

    Returns:
      The step that was loaded.

    Raises:
      UsageError: there is no such checkpoint.
      StateChanged: it is of another model. Nothing was changed.
      IntegrityError: it is damaged. The state may be partly loaded: load an older one.
      StoreError: the store failed; as above.
    """
    if step is not None and step < 0:
        raise UsageError(f"there is no step {step}")
    found = open_checkpoint(open_store(url), None if step is None else Step(step))
    state = _protected(model, optimizer, scheduler, extra)
    small = small_of_seats(small_by_seat(found), Seat(0))
    load_state(state, [CheckpointSource(found)], small=small)
    return found.step


def _protected(
    model: torch.nn.Module, optimizer: object, scheduler: object, extra: Mapping[str, Stateful]
) -> ProtectedState:
    state: Any = {"model": model, "optimizer": optimizer, "scheduler": scheduler, **extra}
    return ProtectedState(**state)
