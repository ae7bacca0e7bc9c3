"""DCP's flat keys and boxes, and our names and pieces for them.

DCP's planner flattens a nested state dict to keys joined with "."; beside them it keeps each
value's place in the nested one, from which our names are made: joined with "/".
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem

from ftkit.checkpoint.ecosystem.lazy import flatten
from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.persist.plan import Piece
from ftkit.checkpoint.plain import decode
from ftkit.core.errors import UsageError

#: Where a value stands in the nested state dict: keys, and indices of lists.
Place = tuple[str | int, ...]

_NOTHING = memoryview(b"")


def name_of(key: str, places: Mapping[str, Place]) -> str:
    """Our name of the tensor that DCP calls `key`."""
    return "/".join(map(str, places.get(key, (key,))))


def check_names(keys: Iterable[str], places: Mapping[str, Place]) -> None:
    """UsageError when two of DCP's keys come to one name of ours."""
    owners = dict[str, str]()
    for key in keys:
        name = name_of(key, places)
        if owners.setdefault(name, key) != key:
            raise UsageError(
                f"tensors {owners[name]!r} and {key!r} both come to the name {name!r}: a key has "
                "'/' in it. Rename one"
            )


def tensor_data(item: WriteItem) -> TensorWriteData:
    """What DCP's plan says of a tensor to write."""
    assert item.tensor_data is not None, "asked of tensors alone"
    return item.tensor_data


def box_of(name: str, about: TensorWriteData) -> Piece:
    """A box of a tensor as planned, without its bytes. UsageError for a dtype we lack."""
    return _piece(name, about.properties.dtype, about.size, about.chunk.offsets, about.chunk.sizes)


def boxes(metadata: Metadata, places: Mapping[str, Place]) -> Iterator[Piece]:
    """The same of all tensors and all ranks, as DCP's coordinator knows them."""
    for key, about in metadata.state_dict_metadata.items():
        if isinstance(about, TensorStorageMetadata):
            for chunk in about.chunks:
                yield _piece(
                    name_of(key, places), about.properties.dtype, about.size, chunk.offsets,
                    chunk.sizes,
                )  # fmt: skip


def _piece(
    name: str, dtype: torch.dtype, whole: torch.Size, offsets: torch.Size, sizes: torch.Size
) -> Piece:
    kind = str(dtype).removeprefix("torch.")
    if kind not in ITEM_BYTES:
        raise UsageError(f"{name} has dtype {dtype}, which cannot be stored")
    return Piece(name, kind, tuple(whole), tuple(offsets), tuple(sizes), _NOTHING)


def skeleton_of(
    metadata: Metadata, places: Mapping[str, Place], values: Mapping[str, object]
) -> dict[str, Any]:
    """The state dict as it was given to DCP, as a skeleton.

    Args:
      metadata: of all ranks.
      places: where each key stands.
      values: what is no tensor, encoded, by DCP's keys.
    """
    nested = dict[str, Any]()
    nothing = torch.empty(0)
    for key, about in metadata.state_dict_metadata.items():
        tensor = isinstance(about, TensorStorageMetadata)
        leaf = nothing if tensor else decode(values[key], _no_tensor)
        put(nested, places.get(key, (key,)), leaf)
    return flatten(nested, "the state dict")[0]


def _no_tensor(name: str) -> torch.Tensor:
    raise AssertionError(f"{name}: tensors inside values are refused when they are written")


def put(nested: dict[str, Any], place: Place, leaf: object) -> None:
    """Put a leaf where it belongs, making dicts and lists on the way.

    Args:
      nested: the state dict so far.
      place: where; an int is the index in a list.
      leaf: what.
    """
    at: Any = nested
    for key, following in pairwise(place):
        if isinstance(at, list):
            at.extend([None] * (int(key) + 1 - len(at)))
        else:
            at.setdefault(key, None)
        if at[key] is None:
            at[key] = [] if isinstance(following, int) else {}
        at = at[key]
    if isinstance(at, list):
        at.extend([None] * (int(place[-1]) + 1 - len(at)))
    at[place[-1]] = leaf
