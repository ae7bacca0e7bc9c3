"""zarr v3 by hand: the metadata, names and shard index that any zarr library reads (pure).

Written without zarr-python, which reaches less than half the speed of a disk. What is used of
the format: regular chunk grids, the default chunk keys with "." (so that an array is one flat
folder), and the codecs `bytes`, `blosc`, `crc32c` and `sharding_indexed`, index at the end.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xxhash

from ftkit.checkpoint.crc import crc32c
from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.persist.boxes import Shape
from ftkit.checkpoint.persist.codecs import Codec
from ftkit.checkpoint.persist.grid import Grid

METADATA = "zarr.json"
CRC_BYTES = 4

#: In a shard's index: the chunk is not stored, for it lies wholly outside the array.
_ABSENT = 2**64 - 1

#: zarr's core data types. Every other dtype is stored as the unsigned integer of its size, and
#: the attributes say which it is: bfloat16 as uint16, float8 as uint8, complex32 as uint32.
_CORE = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128",
}  # fmt: skip

_LONG = 120


def stored_dtype(dtype: str) -> str:
    """The zarr data type that holds a torch dtype."""
    return dtype if dtype in _CORE else f"uint{8 * ITEM_BYTES[dtype]}"


def array_metadata(grid: Grid, *, name: str, dtype: str, whole: Shape, codec: Codec) -> bytes:
    """The zarr.json of one array.

    Args:
      grid: the box it holds and how it is cut.
      name: the tensor's name, kept in the attributes with its dtype, shape and offsets.
      dtype: torch's name of the element type.
      whole: the whole tensor's shape.
      codec: what its chunks go through.
    """
    kind, item = stored_dtype(dtype), ITEM_BYTES[dtype]
    in_order = [{"name": "bytes", "configuration": {"endian": "little"}}]
    codecs: list[object] = [*in_order, *codec.metadata(item), {"name": "crc32c"}]
    if grid.sharded:
        configuration = {
            "chunk_shape": grid.chunk,
            "codecs": codecs,
            "index_codecs": [*in_order, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    fill: object = 0
    if kind.startswith("complex"):
        fill = [0.0, 0.0]
    elif kind.startswith("float"):
        fill = 0.0
    elif kind == "bool":
        fill = False
    value = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": grid.box.shape,
        "data_type": kind,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid.shard}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": {
            "name": name, "dtype": dtype, "shape": whole, "offsets": grid.box.offsets,
        },
    }  # fmt: skip
    return json.dumps(value).encode()


def group_metadata(attributes: Mapping[str, object]) -> bytes:
    """The zarr.json of a group."""
    value = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    return json.dumps(value).encode()


def chunk_key(index: Shape) -> str:
    """The file of a shard, inside its array's folder."""
    return ".".join(["c", *map(str, index)])


def trailer(payload: memoryview) -> bytes:
    """What the crc32c codec appends."""
    return crc32c(payload).to_bytes(CRC_BYTES, "little")


def shard_index(chunks: Sequence[tuple[int, int] | None]) -> bytes:
    """The end of a shard: where each chunk lies, in C order, and the checksum of that.

    Args:
      chunks: byte offset and size of each, checksum included; None for one that is not stored.
    """
    table = np.full((len(chunks), 2), _ABSENT, dtype="<u8")
    for row, chunk in enumerate(chunks):
        if chunk is not None:
            table[row] = chunk
    data = table.tobytes()
    return data + trailer(memoryview(data))


def array_paths(names: Iterable[str]) -> dict[str, str]:
    """A folder for each tensor: flat, safe in any store, the same whoever works it out.

    "/" becomes ".", and whatever may not stand in file names "_". A name that would then
    collide (also where case is not told apart), begin with a dot or be too long gets a hash of
    the original: nothing that a tensor can be called leads out of the checkpoint.
    """
    wanted = {name: re.sub(r"[^A-Za-z0-9_.-]", "_", name.replace("/", ".")) for name in names}
    seen = Counter(path.casefold() for path in wanted.values())
    found = dict[str, str]()
    for name, path in wanted.items():
        bad = path[:1] in ("", ".", "-") or path.startswith("__") or path.casefold() == METADATA
        if bad or len(path) > _LONG or seen[path.casefold()] > 1:
            path = f"t-{path.lstrip('.-_')[:_LONG]}-{xxhash.xxh3_64_hexdigest(name.encode())}"
        found[name] = path
    return found
