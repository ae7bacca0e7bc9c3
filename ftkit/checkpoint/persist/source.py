"""A checkpoint as a source of boxes: loaded into any world, as snapshots are."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.persist import boxes
from ftkit.checkpoint.persist.checkpoint import Checkpoint, load, steps
from ftkit.checkpoint.persist.commit import digest
from ftkit.checkpoint.persist.folder import COMMIT, step_folder
from ftkit.checkpoint.persist.store import Store
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Seat, Step


class CheckpointSource:
    """A checkpoint. Fits `BoxSource`; reads only the chunks that a box meets."""

    threads = 4
    """While one waits for the store, another checks what it has got."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def entries(self) -> Iterator[TensorBox]:
        """Every tensor, whole."""
        for tensor in self._checkpoint.tensors.values():
            yield TensorBox(tensor.name, tensor.dtype, tensor.shape, Box.whole(tensor.shape))

    def read(self, name: str, box: Box, out: memoryview, /) -> None:
        """See `BoxSource.read`."""
        self._checkpoint.read(name, boxes.Box(box.offsets, box.shape), out)

    def __str__(self) -> str:
        return f"step {self._checkpoint.step} in {self._checkpoint.store.url}"


def small_by_seat(checkpoint: Checkpoint) -> dict[Seat, Mapping[str, Any]]:
    """The small state of each seat that saved. IntegrityError when it was saved by none."""
    found = {Seat(int(k)): v for k, v in checkpoint.small.items() if k.isdecimal()}
    if not found:
        raise IntegrityError(
            f"{CheckpointSource(checkpoint)} has no small state of any seat, only "
            f"{sorted(checkpoint.small)}: it was not written by a job or by `save`"
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What `newest_good` found."""

    step: Step | None
    """None: there is no checkpoint."""
    damaged: Mapping[Step, str]
    """Newer ones that were passed over, and what is wrong with each."""


def identity(store: Store, step: Step) -> str | None:
    """A digest that no other checkpoint of any run has; None without a commit record."""
    try:
        return digest(store.get(f"{step_folder(step)}/{COMMIT}"))
    except FileNotFoundError:
        return None


def identities(store: Store) -> tuple[str, ...]:
    """The `identity` of every committed checkpoint, damaged or not."""
    found = (identity(store, step) for step in steps(store))
    return tuple(i for i in found if i is not None)


def newest_good(store: Store, *, ignore: Collection[str] = ()) -> Found:
    """The newest checkpoint of which every byte is as it was written. Blocks: reads it all.

    Args:
      store: the root.
      ignore: checkpoints, by `identity`, that are as if they were not there.

    Raises:
      UsageError: one newer than all good ones has a format that this ftkit does not read.
      StoreError: the store failed. What it may hold is not known.
    """
    damaged = dict[Step, str]()
    for step in reversed(steps(store)):
        known = identity(store, step)
        if known is None or known in ignore:
            continue
        try:
            load(store, step).verify()
        except FileNotFoundError:
            continue  # removed meanwhile
        except IntegrityError as error:
            damaged[step] = str(error)
            continue
        return Found(step=step, damaged=damaged)
    return Found(step=None, damaged=damaged)
