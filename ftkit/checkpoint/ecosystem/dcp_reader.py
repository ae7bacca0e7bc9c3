"""FtkitStorageReader: `torch.distributed.checkpoint` loads from our store.

Each rank reads the chunks that its own part of the state meets, each checked before it is used.
All ranks must load the same step, whatever each of them finds damaged: every rank proposes the
newest step that is good for what it needs, and the coordinator settles on the oldest of those.
"""

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, StorageReader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from ftkit.checkpoint.ecosystem.address import Path, resolve
from ftkit.checkpoint.ecosystem.lazy import memory_of
from ftkit.checkpoint.ecosystem.skeleton import of_checkpoint
from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.persist.boxes import Box
from ftkit.checkpoint.persist.checkpoint import Checkpoint, Tensor, open_checkpoint
from ftkit.checkpoint.persist.store import open_store
from ftkit.checkpoint.plain import decode, encode
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _View:
    """A checkpoint as DCP sees it: flat, its keys joined with "."."""

    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]
    values: Mapping[str, object]
    places: Mapping[str, tuple[str | int, ...]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_View":
        made = dict[int, tuple[Tensor, torch.Tensor]]()

        def placeholder(name: str) -> torch.Tensor:
            about = checkpoint.tensors[name]
            dtype: torch.dtype = getattr(torch, about.dtype)
            tensor = torch.empty(about.shape, dtype=dtype, device="meta")
            made[id(tensor)] = about, tensor  # the tensor too, so that its id stays its own
            return tensor

        skeleton = of_checkpoint(checkpoint.tensors, checkpoint.small)
        try:
            flat, places = flatten_state_dict(decode(skeleton, placeholder))
        except ValueError as error:
            raise UsageError(
                f"step {checkpoint.step} has keys that are one to DCP, which joins them with '.': "
                f"{error}"
            ) from error
        tensors = {k: made[id(v)][0] for k, v in flat.items() if id(v) in made}
        values = {k: v for k, v in flat.items() if k not in tensors}
        return cls(checkpoint, tensors, values, places)

    def metadata(self) -> Metadata:
        found: dict[str, Any] = {
            key: TensorStorageMetadata(
                properties=TensorProperties(dtype=getattr(torch, about.dtype)),
                size=torch.Size(about.shape),
                # One chunk: any box of it can be read, and only what it meets is.
                chunks=[
                    ChunkStorageMetadata(
                        offsets=torch.Size([0] * len(about.shape)), sizes=torch.Size(about.shape)
                    )
                ],
            )
            for key, about in self.tensors.items()
        }
        found |= {key: BytesStorageMetadata() for key in self.values}
        return Metadata(state_dict_metadata=found, planner_data=dict(self.places))


class FtkitStorageReader(StorageReader):
    """Gives `dcp.load` what `FtkitStorageWriter`, a training job or `convert` stored.

    `dcp.load(state, storage_reader=FtkitStorageReader("runs/a"))` loads the newest good
    checkpoint; `step=100`, or `checkpoint_id="100"`, that one. Several ranks give equal
    arguments; their layouts need not be those that saved. A partial state dict loads the part.
    A training job's checkpoint has the keys of `get_model_state_dict` and
    `get_optimizer_state_dict`, below the names the job protected them by ("model", "optimizer").

    A tensor of another dtype than the saved one is converted, as DCP does; another shape is
    refused by DCP, which names both.

    Errors reach the caller inside DCP's `CheckpointException`, a `BaseException`; `failures` has
    ours by rank: IntegrityError for damage, which names chunk and file; UsageError; StoreError.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        step: int | None = None,
        fallback: bool = False,
        options: Mapping[str, object] | None = None,
    ) -> None:
        """Make a reader; touches nothing yet.

        Args:
          root: the folder or URL that holds checkpoints; None to take it from `checkpoint_id`.
          step: which to load; None for the newest whose record and manifest are good.
          fallback: where a chunk that some rank needs is damaged, load the newest older step
            that is good for all ranks, and log a warning, instead of raising. Every rank then
            reads what it needs twice, the second time from the page cache.
          options: for the store, as of `open_store`.
        """
        super().__init__()
        resolve(root or ".", step, None)
        self._root, self._step, self._fallback = root, step, fallback
        self._options = dict(options or {})
        self._id: Path | None = None
        self._view: _View | None = None

    @property
    def step(self) -> Step:
        """The step that was loaded last. UsageError before the first load."""
        return self._opened().checkpoint.step

    def reset(self, checkpoint_id: Path | None = None) -> None:
        self._id = checkpoint_id
        self._view = None

    def read_metadata(self) -> Metadata:
        root, step = resolve(self._root, self._step, self._id)
        store = open_store(root, **self._options)
        if step is not None and self._fallback:
            found = open_checkpoint(store, below=Step(step + 1))
        else:
            found = open_checkpoint(store, step)
        self._view = _View.of(found)
        return self._view.metadata()

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        while self._fallback:
            view = self._opened()
            try:
                self._try(plan)
                break
            except IntegrityError as error:
                logger.warning(
                    "checkpoint of step %s is passed over: %s", view.checkpoint.step, error
                )
                self._older(plan, view.checkpoint.step, error)
        return replace(plan, storage_data=self.step)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        agreed = min(plan.storage_data for plan in plans)
        return [replace(plan, storage_data=agreed) for plan in plans]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        view = self._opened()
        if plan.storage_data != view.checkpoint.step:
            view = self._switch(plan, open_checkpoint(view.checkpoint.store, plan.storage_data))
        for item in plan.items:
            key = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, _as_torch_file(view.values[key], key))
            else:
                tensor = planner.resolve_tensor(item).detach()
                self._read(item, tensor)
                planner.commit_tensor(item, tensor)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        return bool(str(checkpoint_id))

    def _opened(self) -> _View:
        if self._view is None:
            raise UsageError("nothing was loaded yet with this FtkitStorageReader")
        return self._view

    def _read(self, item: ReadItem, target: torch.Tensor) -> None:
        view = self._opened()
        about = view.tensors[item.storage_index.fqn]
        dtype: torch.dtype = getattr(torch, about.dtype)
        direct = target.is_contiguous() and target.device.type == "cpu" and target.dtype == dtype
        # A lazy conjugate's memory is not its elements.
        direct = direct and not (target.is_conj() or target.is_neg())
        host = target if direct else torch.empty(target.shape, dtype=dtype)
        view.checkpoint.read(about.name, _box(item), memory_of(host))
        if host is not target:
            target.copy_(host)

    def _try(self, plan: LoadPlan) -> None:
        """Read what the plan needs, for its checks alone."""
        view = self._opened()
        for item in plan.items:
            if item.type != LoadItemType.BYTE_IO:
                about, box = view.tensors[item.storage_index.fqn], _box(item)
                scratch = bytearray(box.size * ITEM_BYTES[about.dtype])
                view.checkpoint.read(about.name, box, memoryview(scratch))

    def _older(self, plan: LoadPlan, than: Step, damage: IntegrityError) -> None:
        try:
            found = open_checkpoint(self._opened().checkpoint.store, below=than)
        except UsageError:
            raise damage from None  # there is no older one: this damage is what matters
        self._switch(plan, found)

    def _switch(self, plan: LoadPlan, checkpoint: Checkpoint) -> _View:
        """Go on with another step, when what the plan reads is the same in it."""
        old, new = self._opened(), _View.of(checkpoint)
        for key in {item.storage_index.fqn for item in plan.items}:
            was, now = old.tensors.get(key), new.tensors.get(key)
            if was != now or (was is None and key not in new.values):
                raise IntegrityError(
                    f"step {old.checkpoint.step} is damaged, and step {checkpoint.step} before it "
                    f"has {now or 'no tensor ' + repr(key)} where that has {was or 'a value'}"
                )
        self._view = new
        return new


def _box(item: ReadItem) -> Box:
    return Box(tuple(item.storage_offsets), tuple(item.lengths))


def _as_torch_file(value: object, key: str) -> io.BytesIO:
    """A value in the only form that DCP's planners take one: a torch file, made here and now."""
    inside = dict[str, torch.Tensor]()
    encode(value, key, inside)
    if inside:
        raise UsageError(
            f"{min(inside)} is a tensor inside a value that DCP does not look into; load it with "
            "`convert` instead"
        )
    data = io.BytesIO()
    torch.save(value, data)
    data.seek(0)
    return data
