"""convert: a checkpoint from one format to another, tensor by tensor.

The target appears under its name when it is whole and durable, and not before: a conversion that
fails, is interrupted or killed leaves none (a killed one leaves a `.part-` beside it).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch

from ftkit.checkpoint.ecosystem import dcp_folder, safetensors, torch_file
from ftkit.checkpoint.ecosystem.address import Path as Address
from ftkit.checkpoint.ecosystem.address import split
from ftkit.checkpoint.ecosystem.lazy import LazyState, LazyTensor, memory_of
from ftkit.checkpoint.ecosystem.skeleton import STATE_DICT, of_checkpoint, renamed
from ftkit.checkpoint.persist.boxes import Box
from ftkit.checkpoint.persist.checkpoint import Checkpoint, Tensor, open_checkpoint
from ftkit.checkpoint.persist.codecs import CodecPolicy
from ftkit.checkpoint.persist.commit import abandoned_on_error, begin, commit
from ftkit.checkpoint.persist.folder import PART
from ftkit.checkpoint.persist.lease import Lease, one_time
from ftkit.checkpoint.persist.plan import CheckpointPlan, Piece
from ftkit.checkpoint.persist.store import failed, open_store
from ftkit.checkpoint.persist.write import write
from ftkit.core.errors import StoreError, UsageError
from ftkit.core.ids import JobId


class Format(StrEnum):
    """What `convert` reads and writes."""

    FTKIT = "ftkit"
    SAFETENSORS = "safetensors"
    DCP = "dcp"
    TORCH = "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What `convert` did."""

    source: Format
    target: Format
    tensors: int
    nbytes: int
    """Of the tensors."""


#: Told the bytes there are in all, and gives what is told the bytes of each tensor done.
Progress = Callable[[int], Callable[[int], None]]


def convert(
    src: Address,
    dst: Address,
    *,
    to: str,
    part: str | None = None,
    codec: CodecPolicy | None = None,
    progress: Progress | None = None,
    options: Mapping[str, object] | None = None,
) -> Converted:
    """Copy a checkpoint into another format. Blocks; holds one tensor at a time.

    The format of `src` is told by looking: a root of checkpoints or one of its steps (the newest
    good one of a root), a folder of `dcp.save`, a safetensors file, a `torch.save` file. Every
    checksum that the source has is checked. Values that are no tensors come along; a
    safetensors file keeps them in its header.

    Args:
      src: what to read: a path, or for ours any URL.
      dst: what to make; it must not exist. For "ftkit", "<root>/step-<n>".
      to: "ftkit", "safetensors", "dcp" or "torch".
      part: of our checkpoints or others with parts ("model", "optimizer"), only that one, under
        its bare names, as model files have them. To "ftkit": the part that a file of bare names
        becomes.
      codec: to "ftkit": as of `CheckpointPlan.of`.
      progress: for a progress bar.
      options: for the stores of ours, as of `open_store`.

    Returns:
      What was copied.

    Raises:
      UsageError: no such source or format; the target exists or cannot hold what there is.
      IntegrityError: the source is damaged; names the file, and the chunk where there are any.
      CapacityError, StoreError: writing failed.
    """
    try:
        target = Format(to)
    except ValueError:
        raise UsageError(f"{to!r} is no format; there are {', '.join(Format)}") from None
    try:
        source = detect(src)
        state = _read(src, source, options or {})
    except OSError as error:
        raise StoreError(f"{os.fspath(src)} cannot be read: {error}") from error
    if part is not None:
        state = _under(state, part) if target is Format.FTKIT else state.part(part)
    done = progress(state.nbytes) if progress else lambda _: None
    if target is Format.FTKIT:
        _into_ours(dst, state, codec, done, options or {})
    else:
        goal = Path(dst)
        with _appearing(goal) as path:
            if target is Format.DCP:
                dcp_folder.write(path, state, done)
            else:
                with path.open("wb") as file:
                    if target is Format.SAFETENSORS:
                        safetensors.write(file, state, done)
                    else:
                        torch_file.write(file, state, goal.parent, done)
    return Converted(source=source, target=target, tensors=len(state.tensors), nbytes=state.nbytes)


def detect(src: Address) -> Format:
    """The format of what is there.

    Raises:
      UsageError: nothing is there, or nothing that `convert` reads.
    """
    path = Path(src)
    if "://" in os.fspath(src):
        return Format.FTKIT
    if path.is_dir():
        return Format.DCP if (path / dcp_folder.METADATA).is_file() else Format.FTKIT
    if not path.is_file():
        raise UsageError(f"there is nothing at {path}")
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\x03\x04":
        return Format.TORCH
    # A safetensors header is an object; a torch file of before 1.6 begins with a pickle.
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return Format.SAFETENSORS
    if head[:1] == b"\x80":
        return Format.TORCH
    raise UsageError(
        f"{path} is no safetensors file and none of torch.save, or its beginning is damaged"
    )


def _read(src: Address, source: Format, options: Mapping[str, object]) -> LazyState:
    match source:
        case Format.DCP:
            return dcp_folder.read(Path(src))
        case Format.SAFETENSORS:
            return safetensors.read(Path(src))
        case Format.TORCH:
            return torch_file.read(Path(src))
        case Format.FTKIT:
            root, step = split(src)
            return of_ours(open_checkpoint(open_store(root, **options), step))


def of_ours(checkpoint: Checkpoint) -> LazyState:
    """A checkpoint of ours as a state dict."""

    def lazy(about: Tensor) -> LazyTensor:
        def read() -> torch.Tensor:
            tensor = torch.empty(about.shape, dtype=getattr(torch, about.dtype))
            checkpoint.read(about.name, Box.whole(about.shape), memory_of(tensor))
            return tensor

        return LazyTensor(about.dtype, about.shape, read)

    skeleton = of_checkpoint(checkpoint.tensors, checkpoint.small)
    return LazyState(skeleton, {name: lazy(t) for name, t in checkpoint.tensors.items()})


def _under(state: LazyState, part: str) -> LazyState:
    if not part or part.startswith("$") or "/" in part:
        raise UsageError(f"{part!r} cannot name a part: it is empty, or has '/' or a leading $")
    skeleton = {part: renamed(state.skeleton, lambda name: f"{part}/{name}")}
    return LazyState(skeleton, {f"{part}/{name}": t for name, t in state.tensors.items()})


def _into_ours(
    dst: Address,
    state: LazyState,
    codec: CodecPolicy | None,
    done: Callable[[int], None],
    options: Mapping[str, object],
) -> None:
    root, step = split(dst)
    if step is None:
        raise UsageError(f"which step shall {os.fspath(dst)} be? Give <root>/step-<n>")
    store = open_store(root, **options)

    def pieces() -> Iterator[Piece]:
        for name, t in state.tensors.items():
            data = memory_of(t.read())
            yield Piece(name, t.dtype, t.shape, (0,) * len(t.shape), t.shape, data)
            done(t.nbytes)

    boxes = (
        Piece(name, t.dtype, t.shape, (0,) * len(t.shape), t.shape, memoryview(b""))
        for name, t in state.tensors.items()
    )
    plan = CheckpointPlan.of(boxes, codec=codec)
    with Lease.take(store, one_time(JobId("convert")), term_s=600.0) as lease:
        begin(store, step, lease)
        with abandoned_on_error(store, step):
            fragment = write(store, step, plan, pieces(), small={STATE_DICT: state.skeleton})
            commit(store, step, plan, [fragment], lease)


@contextmanager
def _appearing(goal: Path) -> Iterator[Path]:
    """A path to write to, which becomes `goal` when the block ends well."""
    if goal.exists() or goal.is_symlink():
        raise UsageError(f"{goal} exists; nothing is overwritten. Choose another name")
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=goal.parent, prefix=PART))
        try:
            made = scratch / goal.name
            yield made
            _sync(made)
            if made.is_dir():
                made.rename(goal)
            else:
                os.link(made, goal)  # unlike a rename, refuses what appeared in the meantime
            _sync_one(goal.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except FileExistsError as error:
        raise UsageError(f"{goal} appeared in the meantime; it was left as it is") from error
    except OSError as error:
        failed(error, "writing", str(goal))
    except RuntimeError as error:
        # torch's writer fails a second time over the end of the file, and hides the reason.
        reason = error.__context__
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__context__
        failed(reason or error, "writing", str(goal))


def _sync(path: Path) -> None:
    for folder, _, files in os.walk(path) if path.is_dir() else ():
        for name in files:
            _sync_one(Path(folder, name))
    _sync_one(path)


def _sync_one(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
