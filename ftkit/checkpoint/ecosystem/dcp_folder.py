"""DCP's own folders, read and written through DCP: .metadata and *.distcp.

DCP's metadata is a pickle, and DCP unpickles it without restriction; here only the classes that
DCP itself puts there are let in, so that a folder from elsewhere cannot run code. Values are
read with `weights_only=True` for the same reason, and paths that lead out are refused.
"""

import io
import pickle
import warnings
from collections.abc import Callable
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    LoadPlanner,
    SavePlan,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ftkit.checkpoint.ecosystem.dcp_names import put
from ftkit.checkpoint.ecosystem.lazy import LazyState, LazyTensor, flatten
from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.persist.boxes import Box, uncovered
from ftkit.checkpoint.persist.store import confined
from ftkit.checkpoint.plain import decode
from ftkit.core.errors import IntegrityError, UsageError

METADATA = ".metadata"

_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    *((f"{_DCP}.metadata", name) for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    *(("torch", dtype) for dtype in ITEM_BYTES),
}  # fmt: skip


def _member(kind: Any, name: Any) -> Any:
    """What Python before 3.11.4 pickles an enum's member as: `getattr` of the enum."""
    if isinstance(kind, EnumType) and isinstance(name, str) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError(f"{name!r:.80} of {kind!r:.80} has no place in DCP's metadata")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in DCP's metadata")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        data = (Path(self.path) / METADATA).read_bytes()
        found = _MetadataUnpickler(io.BytesIO(data)).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise pickle.UnpicklingError("it holds no DCP metadata")
        for info in found.storage_data.values():
            confined(info.relative_path)
        return found


class _One(LoadPlanner):
    """Receives one tensor, or one value."""

    value: object = None

    def __init__(self, tensor: torch.Tensor | None = None) -> None:
        self._tensor = tensor

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise AssertionError("plans are made by hand here")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = torch.load(value, map_location="cpu", weights_only=True)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert self._tensor is not None, "values are loaded by load_bytes"
        sides = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        view = self._tensor
        for d, (first, count) in enumerate(sides):
            view = view.narrow(d, first, count)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...


def read(path: Path) -> LazyState:
    """Open a folder that `dcp.save` wrote. Tensors are read when they are asked for.

    Raises:
      IntegrityError: its metadata is damaged or names what does not belong there, or a tensor is
        not whole.
      UsageError: a value or dtype in it cannot be kept.
    """
    reader = _Reader(path)
    try:
        metadata = reader.read_metadata()
    except FileNotFoundError as error:
        raise UsageError(f"{path} is no folder of DCP: it has no {METADATA}") from error
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError,
            IndexError, KeyError, ImportError, MemoryError, RecursionError) as error:  # fmt: skip
        raise IntegrityError(f"{path / METADATA} is damaged or hostile: {error}") from error
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    places = metadata.planner_data or {}
    nested, lazy = dict[str, Any](), dict[str, LazyTensor]()
    for key, about in metadata.state_dict_metadata.items():
        place = places.get(key, (key,))
        leaf: object
        if isinstance(about, TensorStorageMetadata):
            tensor = _tensor(path, reader, key, about)
            lazy["/".join(map(str, place))] = tensor
            leaf = torch.empty(tensor.shape, dtype=tensor.torch_dtype, device="meta")
        else:
            leaf = _value(path, reader, key)
        put(nested, place, leaf)
    skeleton, found = flatten(nested, str(path))
    if found.keys() != lazy.keys():
        odd = sorted(found.keys() ^ lazy.keys())
        raise UsageError(f"{path}: tensors inside values cannot be kept: {odd[:5]}")
    return LazyState(skeleton, lazy)


def write(path: Path, state: LazyState, progress: Callable[[int], None] = lambda _: None) -> None:
    """Write a folder as `dcp.save` of one process does. Blocks; holds one tensor at a time.

    Raises:
      UsageError: keys that become one where DCP joins them with ".".
    """
    placeholders = dict[int, LazyTensor]()
    alive = list[torch.Tensor]()

    def placeholder(name: str) -> torch.Tensor:
        tensor = state.tensors[name].placeholder()
        alive.append(tensor)
        placeholders[id(tensor)] = state.tensors[name]
        return tensor

    class Planner(DefaultSavePlanner):
        """Reads a tensor when DCP is about to write it."""

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
            lazy = placeholders.get(id(self.lookup_object(write_item.index)))
            if lazy is None:
                return super().resolve_data(write_item)
            progress(lazy.nbytes)
            return lazy.read()

        def create_local_plan(self) -> SavePlan:
            inside = [
                key for key, value in self.state_dict.items()
                if not isinstance(value, torch.Tensor) and _holds_tensor(value)
            ]  # fmt: skip
            if inside:
                raise UsageError(
                    f"{inside[0]}: DCP does not look for tensors inside such a value; convert to "
                    "torch or safetensors"
                )
            return super().create_local_plan()

    cause: BaseException | None = None
    try:
        with warnings.catch_warnings():
            # It says that one process saves, which is what is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(
                decode(state.skeleton, placeholder),
                storage_writer=FileSystemWriter(path, sync_files=True),
                planner=Planner(),
                no_dist=True,
            )
    except CheckpointException as error:
        # DCP catches everything, Ctrl-C too, and wraps it in what is no Exception.
        cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, ValueError) and "duplicated flatten key" in str(cause):
        raise UsageError(f"two keys are one to DCP, which joins them with '.': {cause}") from cause
    if cause is not None:
        raise cause  # here, and not in the handler, so that it keeps its own context


def _holds_tensor(value: object) -> bool:
    match value:
        case torch.Tensor():
            return True
        case dict():
            return any(map(_holds_tensor, value.values()))
        case list() | tuple():
            return any(map(_holds_tensor, value))
        case _:
            return False


def _tensor(
    path: Path, reader: FileSystemReader, key: str, about: TensorStorageMetadata
) -> LazyTensor:
    dtype, shape = str(about.properties.dtype).removeprefix("torch."), tuple(about.size)
    if dtype not in ITEM_BYTES:
        raise UsageError(f"{path}: {key} has dtype {about.properties.dtype}, which is not known")
    boxes = [Box(tuple(c.offsets), tuple(c.sizes)) for c in about.chunks]
    why = uncovered(Box.whole(shape), boxes)
    if why is not None:
        raise IntegrityError(f"{path}: the chunks of {key} do not make it up: {why}")

    def read_tensor() -> torch.Tensor:
        tensor = torch.empty(shape, dtype=about.properties.dtype)
        whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(shape)), sizes=about.size)
        items = create_read_items_for_chunk_list(key, about, [whole]) if tensor.numel() else []
        _read(path, reader, key, LoadPlan(items), _One(tensor))
        return tensor

    return LazyTensor(dtype, shape, read_tensor)


def _value(path: Path, reader: FileSystemReader, key: str) -> object:
    one = _One()
    nothing = torch.Size((0,))
    index = MetadataIndex(key)
    item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)
    _read(path, reader, key, LoadPlan([item]), one)
    return one.value


def _read(path: Path, reader: FileSystemReader, key: str, plan: LoadPlan, one: _One) -> None:
    try:
        reader.read_data(plan, one).wait()
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path}: {key} is damaged, or an object that is no tensor or plain value, which is "
            f"never unpickled: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AssertionError) as error:
        raise IntegrityError(f"{path}: {key} cannot be read: {error!r}") from error
