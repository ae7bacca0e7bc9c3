"""Commit: fragments to a checkpoint, by a record that is written last.

A checkpoint exists when `commit.json` does. Before it is written, everything else is durable;
it appears whole or not at all; and it says which manifest it commits, so that nothing of
another attempt can be taken for this one's.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import xxhash

from ftkit.checkpoint.persist import manifest
from ftkit.checkpoint.persist.folder import COMMIT, MANIFEST, STATE, step_folder
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.manifest import Fragment, Kind, Row
from ftkit.checkpoint.persist.plan import TENSORS, Array, CheckpointPlan
from ftkit.checkpoint.persist.profile import SaveProfile
from ftkit.checkpoint.persist.store import Store
from ftkit.checkpoint.persist.write import metadata_row
from ftkit.checkpoint.persist.zarr_format import METADATA, group_metadata
from ftkit.core.clock import Clock, MonotonicClock
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import Step

#: Raised with every change that an older reader would misread.
VERSION = 1

_FORMAT = "ftkit-checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """What `commit.json` says."""

    step: Step
    files: Mapping[str, tuple[int, str]]
    """Bytes and XXH3-128 of the files that the manifest does not describe, itself first."""
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """What retention may judge by: a loss, say. None for what was not finite."""
    profile: SaveProfile = field(default_factory=SaveProfile)
    """Of all writers together, up to the commit itself."""
    written_at: float | None = None
    """Unix seconds by the committer's clock; None where it was not kept."""

    def encode(self) -> bytes:
        """Canonical JSON, with a digest of the rest as its last value."""
        body = {
            "format": _FORMAT,
            "version": VERSION,
            "step": self.step,
            "files": {name: list(value) for name, value in self.files.items()},
            "metrics": dict(self.metrics),
            "profile": self.profile.to_json(),
            "written_at": self.written_at,
        }
        return _sealed(body)

    @classmethod
    def decode(cls, data: bytes) -> "CommitRecord":
        """Read `encode`.

        Raises:
          IntegrityError: a byte differs from what was written.
          UsageError: it is whole, and of a format that this ftkit does not read.
        """
        try:
            value = json.loads(data)
            whole = isinstance(value, dict) and _sealed(value) == data
        except (ValueError, RecursionError) as error:
            raise IntegrityError(f"{COMMIT} is damaged: {error}") from error
        if not whole or value.get("format") != _FORMAT:
            raise IntegrityError(f"{COMMIT} is damaged: its digest is not that of its contents")
        if value.get("version") != VERSION:
            raise UsageError(
                f"checkpoint of step {value.get('step')} has format version "
                f"{value.get('version')}, this ftkit reads {VERSION}: use the ftkit that wrote it, "
                "or a newer one"
            )
        try:
            numbers = *value["metrics"].values(), value.get("written_at")
            if not all(isinstance(n, int | float | None) for n in numbers):
                raise TypeError("metrics and times are numbers or null")
            return cls(
                step=Step(value["step"]),
                files={str(n): (int(c), str(d)) for n, (c, d) in value["files"].items()},
                metrics=value["metrics"],
                profile=SaveProfile.of_json(value["profile"]),
                written_at=value.get("written_at"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{COMMIT} lacks what it must say: {error!r}") from error


def begin(store: Store, step: Step, lease: Lease) -> None:
    """Make room for a checkpoint: remove what a dead writer left of the same step.

    Called by the one who will commit, before any writer starts.

    Raises:
      UsageError: the step is committed already; a checkpoint is never overwritten.
      RootInUse: the lease is no longer this job's.
    """
    lease.check()
    folder = step_folder(step)
    found = store.sizes(folder)
    if COMMIT in found:
        raise UsageError(
            f"step {step} is committed in {store.url}; a checkpoint is never overwritten. Choose "
            "another root, or remove it with `gc` first"
        )
    if found:
        store.remove_tree(folder)


def commit(
    store: Store,
    step: Step,
    plan: CheckpointPlan,
    fragments: Iterable[Fragment],
    lease: Lease,
    *,
    metrics: Mapping[str, float] | None = None,
    clock: Clock | None = None,
) -> CommitRecord:
    """Join what the writers wrote to one checkpoint. Blocks until it is durable.

    Args:
      store: where the writers wrote to.
      step: the step they wrote.
      plan: the plan they wrote by.
      fragments: what `write` returned to each of them.
      lease: this job's, on this root.
      metrics: kept in the record, for retention.
      clock: for the profile.

    Returns:
      The record, as it stands in the store.

    Raises:
      UsageError: fragments are of another step or plan, use the same key of small state, hold
        a part of a tensor twice, or leave one out. Nothing was committed.
      RootInUse: another job has taken the lease over. Nothing was committed.
      CapacityError, StoreError: as of `write`. Nothing was committed, unless the error came
        from the last write itself: then `open_checkpoint` says.
    """
    clock = clock or MonotonicClock()
    start = clock.now()
    fragments = list(fragments)
    for fragment in fragments:
        if (fragment.step, fragment.plan_digest) != (step, plan.digest):
            raise UsageError(
                f"a fragment is of step {fragment.step} and plan {fragment.plan_digest}, not of "
                f"step {step} and plan {plan.digest}: its writer planned with other boxes"
            )
    small = _merged(fragments)
    rows = [row for fragment in fragments for row in fragment.rows]
    bare = [a for a in _arrays(plan) if not a.grid.box.size]  # no writer has a first box of these
    rows += [metadata_row(array, array.metadata) for array in bare]
    why = missing(plan, rows)
    if why is not None:
        raise UsageError(f"step {step} cannot be committed: {why}")
    folder = step_folder(step)
    loose = {
        MANIFEST: manifest.encode(rows),
        STATE: json.dumps(small, separators=(",", ":")).encode(),
        **_groups(plan),
    }
    with store.batch() as batch:
        for array in bare:
            batch.create(f"{folder}/{array.path}/{METADATA}", [array.metadata])
        for name, data in loose.items():
            batch.create(f"{folder}/{name}", [data])
        batch.flush()
    profile = SaveProfile.total(f.profile for f in fragments)
    profile.commit_s = clock.now() - start
    lease.check()
    record = CommitRecord(
        step=step,
        files={name: (len(data), digest(data)) for name, data in loose.items()},
        metrics={k: v if isfinite(v) else None for k, v in (metrics or {}).items()},
        profile=profile,
        written_at=lease.checked_at,
    )
    try:
        store.put(f"{folder}/{COMMIT}", record.encode(), exclusive=True)
    except FileExistsError as error:
        raise UsageError(f"step {step} was committed by another in the meantime") from error
    return record


@contextmanager
def abandoned_on_error(store: Store, step: Step) -> Iterator[None]:
    """Remove what a block wrote of a step when it fails: nothing fills the disk for nothing.

    What is committed stays: Ctrl-C may come when the commit is through.
    """
    try:
        yield
    except BaseException:
        if COMMIT not in store.sizes(step_folder(step)):
            store.remove_tree(step_folder(step))
        raise


def missing(plan: CheckpointPlan, rows: Iterable[Row]) -> str | None:
    """Why these rows are not the plan's, each once; None when they are. Pure."""
    found = set[tuple[str, str, tuple[int, ...]]]()
    for row in rows:
        if row.kind == Kind.INDEX:
            continue
        key = row.file, row.kind, row.offsets
        if key in found:
            return f"two writers wrote {row.box} of {row.tensor!r}"
        found.add(key)
    for array in _arrays(plan):
        wanted = {(f"{array.path}/{METADATA}", str(Kind.METADATA), array.grid.box.offsets)}
        for file, part in array.files(array.grid.box):
            wanted |= {(file, str(Kind.CHUNK), c.offsets) for _, c in array.chunks(part)}
        absent = wanted - found
        if absent:
            file, _, offsets = min(absent)
            return (
                f"no writer wrote {array.name!r} from {list(offsets)} on ({file}); "
                f"{len(absent)} of its {len(wanted)} parts are missing"
            )
        found -= wanted
    if found:
        return f"{min(found)[0]} was written and is not in the plan"
    return None


def digest(data: bytes) -> str:
    """XXH3-128, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


def _sealed(value: Mapping[str, object]) -> bytes:
    body = {k: v for k, v in value.items() if k != "digest"}
    text = json.dumps(body, separators=(",", ":"))
    return json.dumps(body | {"digest": digest(text.encode())}, separators=(",", ":")).encode()


def _arrays(plan: CheckpointPlan) -> Iterable[Array]:
    return (array for arrays in plan.arrays.values() for array in arrays)


def _groups(plan: CheckpointPlan) -> dict[str, bytes]:
    """The zarr.json of every group: the root, and the tensors kept as several arrays."""
    found = {f"{TENSORS}/{METADATA}": group_metadata({"format": _FORMAT, "version": VERSION})}
    for arrays in plan.arrays.values():
        if len(arrays) > 1:
            first = arrays[0]
            about = {"name": first.name, "dtype": first.dtype, "shape": list(first.whole)}
            found[f"{first.path.rpartition('/')[0]}/{METADATA}"] = group_metadata(about)
    return found


def _merged(fragments: Iterable[Fragment]) -> dict[str, Any]:
    small = dict[str, Any]()
    for fragment in fragments:
        twice = small.keys() & fragment.small.keys()
        if twice:
            raise UsageError(f"two writers give small state under {sorted(twice)}")
        small |= fragment.small
    return small
