"""FtkitStorageWriter: `torch.distributed.checkpoint` saves into our store.

The calls of one save, and what each does here::

    reset                    the step
    set_up_storage_writer    (every rank)    refuse what cannot work
    prepare_global_plan      (coordinator)   lease, room for the step, the plan of the arrays
    write_data               (every rank)    boxes to durable files, a fragment of the manifest
    finish                   (coordinator)   fragments to a committed checkpoint

Until `finish` nothing is visible to readers, so a rank may die anywhere. DCP passes plans and
results between ranks itself, as pickles of its own making; nothing pickled reaches the store.
"""

import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.checkpoint import SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ftkit.checkpoint.ecosystem.address import Path, resolve
from ftkit.checkpoint.ecosystem.dcp_names import (
    Place,
    box_of,
    boxes,
    check_names,
    name_of,
    skeleton_of,
    tensor_data,
)
from ftkit.checkpoint.ecosystem.lazy import check_storable, memory_of
from ftkit.checkpoint.ecosystem.skeleton import STATE_DICT
from ftkit.checkpoint.persist.codecs import CodecPolicy
from ftkit.checkpoint.persist.commit import begin, commit
from ftkit.checkpoint.persist.lease import Lease, one_time
from ftkit.checkpoint.persist.manifest import Fragment
from ftkit.checkpoint.persist.plan import CheckpointPlan, Piece
from ftkit.checkpoint.persist.store import Store, open_store
from ftkit.checkpoint.persist.write import write
from ftkit.checkpoint.plain import encode
from ftkit.core.errors import FtkitError, UsageError
from ftkit.core.ids import JobId, Step

#: A dead process of this host is noticed at once; one of another host after this long. DCP
#: gives no sign of life between its calls, so it must be longer than a save takes.
LEASE_S = 600.0


@dataclass(frozen=True)
class Share:
    """What the coordinator tells each rank, in DCP's plan. Holds no step: DCP may cache plans."""

    plan: CheckpointPlan
    """The arrays that this rank writes into."""
    digest: str
    """Of the whole plan."""
    names: Mapping[str, str]
    """Our name of each tensor of this rank, by DCP's."""


class _Save:
    """One save under way, of one thread."""

    def __init__(self, store: Store, step: Step) -> None:
        self.store = store
        self.step = step
        self.lease: Lease | None = None

    def take(self, job: JobId) -> Lease:
        # Each save is a job of its own: two at once must not share the root.
        self.lease = Lease.take(self.store, one_time(job), term_s=LEASE_S)
        # DCP tells nobody here when another rank failed: then it is given up with this object.
        self._finalizer = weakref.finalize(self, _release, self.lease)
        return self.lease

    def end(self) -> None:
        """Give the lease up, if it was taken."""
        if self.lease is not None:
            self._finalizer()

    @contextmanager
    def ending_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.end()
            raise


class FtkitStorageWriter(StorageWriter):
    """Stores what `dcp.save` and `dcp.async_save` are given: zarr, checksums, atomic commit.

    `dcp.save(state, storage_writer=FtkitStorageWriter("runs/a", step=100))`, or one writer for
    many saves, each with `checkpoint_id="100"` (or "step-100", or "<root>/step-100"). Several
    ranks give equal arguments. Tensors of any DTensor layout are stored as the boxes that ranks
    hold, replicated ones once; other values as JSON, exactly, and never pickled.

    Errors reach the caller of a save of several ranks inside DCP's `CheckpointException`, which
    is no `Exception` but a `BaseException`; `failures` has ours by rank. They are UsageError
    (a value that JSON cannot hold, named; a step that exists), RootInUse (also when two saves
    of one process overlap), CapacityError and StoreError. After any of them nothing is
    committed and older checkpoints are untouched.

    May be handed to another process (DCP's process-based `async_save`): what is under way stays.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        step: int | None = None,
        job: str = "dcp",
        codec: CodecPolicy | None = None,
        timeout_s: float | None = None,
        options: Mapping[str, object] | None = None,
    ) -> None:
        """Make a writer; touches nothing yet.

        Args:
          root: the folder or URL that holds checkpoints; None to take it from `checkpoint_id`.
          step: the step of the checkpoint, unless `checkpoint_id` says it.
          job: who holds the lease of the root, in messages.
          codec: as of `CheckpointPlan.of`.
          timeout_s: give up when one rank's writing takes longer.
          options: for the store, as of `open_store`.
        """
        super().__init__()
        resolve(root or ".", step, None)
        self._root, self._step, self._job = root, step, JobId(job)
        self._codec, self._timeout_s = codec, timeout_s
        self._options = dict(options or {})
        # By thread: overlapping async saves share this object, and DCP resets it for each.
        self._here = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_here"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._here = threading.local()

    def reset(self, checkpoint_id: Path | None = None) -> None:
        self._here.id = checkpoint_id
        self._drop()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("use_collectives") is False:
            raise UsageError(
                "use_collectives=False leaves nobody to commit the checkpoint for all ranks; "
                "save without it"
            )
        root, step = resolve(self._root, self._step, getattr(self._here, "id", None))
        if step is None:
            raise UsageError(
                f"which step of {root}? Give step= to the writer, or checkpoint_id='step-<n>'"
            )
        self._drop()
        self._here.save = _Save(open_store(root, **self._options), step)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        save: _Save = self._here.save
        with save.ending_on_error():
            begin(save.store, save.step, save.take(self._job))
            return self._shared_out(plans)

    def _shared_out(self, plans: list[SavePlan]) -> list[SavePlan]:
        fresh = [plan for plan in plans if plan.usable]
        if not fresh:
            return plans  # DCP caches plans, and each rank has its share from the last time
        if len(fresh) < len(plans):
            raise UsageError(
                "the plans of some ranks changed since the last save and DCP cached the others; "
                "save without enable_plan_caching while the state changes"
            )
        places = dict[str, Place]()
        for plan in plans:
            places |= plan.planner_data or {}
        check_names((i.index.fqn for p in plans for i in p.items if i.tensor_data), places)
        held = (
            box_of(name_of(i.index.fqn, places), tensor_data(i))
            for p in plans
            for i in p.items
            if i.tensor_data
        )
        whole = CheckpointPlan.of(held, codec=self._codec)
        return [replace(p, storage_data=_share(whole, p, places)) for p in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        save: _Save = self._here.save
        share = plan.storage_data
        if not isinstance(share, Share):
            raise UsageError("DCP's plan was not prepared by this writer; was the planner shared?")
        pieces = (
            _piece(share.names[item.index.fqn], planner, item)
            for item in plan.items
            if item.tensor_data and item.tensor_data.chunk.sizes.numel()
        )
        with save.ending_on_error():
            # Values first: one that cannot be stored is refused before anything is written.
            small = {i.index.fqn: _value(planner, i) for i in plan.items if not i.tensor_data}
            fragment = write(
                save.store, save.step, share.plan, pieces, small=small, timeout_s=self._timeout_s
            )
        data = replace(fragment, plan_digest=share.digest).encode()
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(""), fragment.profile.stored_bytes, data)])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        save: _Save = self._here.save
        assert save.lease is not None, "finish follows prepare_global_plan on the coordinator"
        with save.ending_on_error():
            fragments = [Fragment.decode(r.storage_data) for several in results for r in several]
            places: Mapping[str, Place] = metadata.planner_data or {}
            whole = CheckpointPlan.of(boxes(metadata, places), codec=self._codec)
            values = {key: value for f in fragments for key, value in f.small.items()}
            skeleton = Fragment(
                step=save.step,
                plan_digest=whole.digest,
                rows=(),
                small={STATE_DICT: skeleton_of(metadata, places, values)},
            )
            fragments = [replace(f, small={}) for f in fragments]
            commit(save.store, save.step, whole, [*fragments, skeleton], save.lease)
        self._drop()

    def _drop(self) -> None:
        """Forget what this thread had under way."""
        save: _Save | None = getattr(self._here, "save", None)
        if save is not None:
            save.end()
        self._here.save = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Path) -> bool:
        return resolve(None, None, checkpoint_id)[1] is not None


def _release(lease: Lease) -> None:
    try:
        lease.release()
    except FtkitError:
        pass  # the store failed: the lease runs out by itself, or with this process


def _share(whole: CheckpointPlan, plan: SavePlan, places: Mapping[str, Place]) -> Share:
    names = {i.index.fqn: name_of(i.index.fqn, places) for i in plan.items if i.tensor_data}
    mine = CheckpointPlan({name: whole.arrays[name] for name in names.values()})
    return Share(mine, whole.digest, names)


def _value(planner: SavePlanner, item: WriteItem) -> object:
    if not isinstance(planner, DefaultSavePlanner):
        # Another planner gives nothing but a pickle of the value.
        raise UsageError(
            f"{item.index.fqn}: values that are no tensors need a planner made from "
            f"DefaultSavePlanner, not {type(planner).__name__}"
        )
    tensors = dict[str, torch.Tensor]()
    value = encode(planner.lookup_object(item.index), item.index.fqn, tensors)
    if tensors:
        raise UsageError(
            f"{min(tensors)} is a tensor inside a value that DCP does not look into; keep tensors "
            "in dicts and lists, and let the planner flatten them"
        )
    return value


def _piece(name: str, planner: SavePlanner, item: WriteItem) -> Piece:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor), "DCP gives tensors for tensor items"
    check_storable(name, tensor)
    return box_of(name, tensor_data(item))._replace(data=memory_of(tensor))
