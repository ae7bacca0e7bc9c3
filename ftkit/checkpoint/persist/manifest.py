"""Manifest: a parquet table that accounts for every byte of a checkpoint's arrays.

One row for each chunk, shard index and zarr.json: which file, which bytes, which checksum; a
chunk's row also says which box of which tensor it holds. A reader needs nothing else to find
and check what it wants, and whatever no row describes does not belong there.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.persist.boxes import Box, Shape
from ftkit.checkpoint.persist.codecs import Codec
from ftkit.checkpoint.persist.profile import SaveProfile
from ftkit.checkpoint.persist.store import confined
from ftkit.core.errors import IntegrityError, ProtocolError
from ftkit.core.ids import Step


class Kind(StrEnum):
    """What a row describes. Values stand in manifests."""

    CHUNK = "chunk"
    INDEX = "index"
    """The index at the end of a shard."""
    METADATA = "metadata"
    """The zarr.json of an array."""


class Row(NamedTuple):
    """One range of bytes."""

    kind: str
    tensor: str
    dtype: str
    shape: Shape
    """The whole tensor's."""
    offsets: Shape
    """Of a chunk: its first index in the whole tensor. Of other rows: of the array's box."""
    extents: Shape
    """Elements in each dimension that are stored, without padding at the array's edge."""
    chunk: Shape
    """Of a chunk: its padded shape, which is what decoding yields. Of other rows: empty."""
    file: str
    """Relative to the checkpoint."""
    at: int
    bytes: int
    """Checksum included, where the format keeps one beside the data."""
    crc32c: int
    """Of the stored bytes; of chunks and indices, without the four of their own checksum."""
    codec: str

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.extents)


_WORD = pa.dictionary(pa.int32(), pa.string())
_DIMS = pa.list_(pa.int64())
SCHEMA = pa.schema(
    [
        pa.field("kind", _WORD, nullable=False),
        pa.field("tensor", _WORD, nullable=False),
        pa.field("dtype", _WORD, nullable=False),
        pa.field("shape", _DIMS, nullable=False),
        pa.field("offsets", _DIMS, nullable=False),
        pa.field("extents", _DIMS, nullable=False),
        pa.field("chunk", _DIMS, nullable=False),
        pa.field("file", _WORD, nullable=False),
        pa.field("at", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("crc32c", pa.uint32(), nullable=False),
        pa.field("codec", _WORD, nullable=False),
    ]
)

_FRAGMENT = b"ftkit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """What one writer contributes to a checkpoint: durable when this value exists."""

    step: Step
    plan_digest: str
    """Of the plan it wrote by; the committer's must be the same."""
    rows: tuple[Row, ...]
    small: Mapping[str, Any] = field(default_factory=dict)
    """JSON-safe; keys are the writer's own."""
    profile: SaveProfile = field(default_factory=SaveProfile)

    def encode(self) -> bytes:
        """The fragment as an Arrow stream, to be sent to the committer."""
        head = {
            "step": self.step,
            "plan": self.plan_digest,
            "small": self.small,
            "profile": self.profile.to_json(),
        }
        table = _table(self.rows).replace_schema_metadata({_FRAGMENT: json.dumps(head)})
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return sink.getvalue()

    @classmethod
    def decode(cls, data: bytes) -> "Fragment":
        """Read `encode`. ProtocolError when it is something else."""
        try:
            with pa.ipc.open_stream(data) as stream:
                table = stream.read_all()
            head = json.loads(table.schema.metadata[_FRAGMENT])
            return cls(
                step=Step(head["step"]),
                plan_digest=head["plan"],
                rows=_rows(table),
                small=head["small"],
                profile=SaveProfile.of_json(head["profile"]),
            )
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            IntegrityError,
        ) as error:
            raise ProtocolError(f"not a fragment of a manifest: {error}") from error


def encode(rows: Iterable[Row]) -> bytes:
    """A manifest as parquet, in order of file and offset: equal for equal rows."""
    sink = io.BytesIO()
    ordered = sorted(rows, key=lambda r: (r.file, r.at))
    pq.write_table(_table(ordered), sink, compression="zstd", row_group_size=1 << 16)
    return sink.getvalue()


def decode(data: bytes) -> tuple[Row, ...]:
    """Read `encode`.

    Raises:
      IntegrityError: it is not such a table, or a row makes no sense: an unknown dtype or
        codec, a box outside its tensor, a path that leads out of the checkpoint. Or the rows
        of a tensor disagree, or hold more or less than it.
    """
    try:
        # Not `read_table`, which imports datasets, and pandas with them: half a second.
        rows = _rows(pq.ParquetFile(pa.BufferReader(data)).read())
        _check_whole(rows)
        return rows
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"manifest cannot be read: {error}") from error


def _check_whole(rows: Iterable[Row]) -> None:
    """ValueError unless each tensor has one kind, and as many elements as its chunks hold."""
    kinds = dict[str, tuple[str, Shape]]()
    held = Counter[str]()
    for row in rows:
        kind = row.dtype, row.shape
        if kinds.setdefault(row.tensor, kind) != kind:
            raise ValueError(f"{row.tensor!r} is {kinds[row.tensor]} in one row, {kind} in another")
        if row.kind == Kind.CHUNK:
            held[row.tensor] += row.box.size
    for name, (_, shape) in kinds.items():
        if held[name] != Box.whole(shape).size:
            raise ValueError(
                f"{name!r} has {Box.whole(shape).size} elements, its chunks hold {held[name]}"
            )


def _table(rows: Iterable[Row]) -> Any:
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    arrays = [
        pa.array(column, f.type.value_type).dictionary_encode() if f.type == _WORD
        else pa.array(column, f.type)
        for column, f in zip(columns, SCHEMA, strict=True)
    ]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _rows(table: Any) -> tuple[Row, ...]:
    table.validate(full=True)
    found = table.select(SCHEMA.names)
    if found.schema != SCHEMA:  # else it need not import what casts
        found = found.cast(SCHEMA)
    columns = [column.to_pylist() for column in found.columns]
    rows = list[Row]()
    checked = set[str]()
    for values in zip(*columns, strict=True):
        row = Row._make(tuple(v) if isinstance(v, list) else v for v in values)
        if row.file not in checked:
            checked.add(confined(row.file))
        if row.dtype not in ITEM_BYTES:
            raise ValueError(f"{row.tensor!r} has dtype {row.dtype!r}, which is not known")
        Kind(row.kind), Codec(row.codec)
        if not Box.whole(row.shape).contains(row.box) or row.at < 0 or row.bytes < 0:
            raise ValueError(f"{row.tensor!r}: {row.box} of {row.shape}, {row.bytes} bytes")
        if row.kind == Kind.CHUNK and (
            len(row.chunk) != len(row.extents)
            or any(c < e for c, e in zip(row.chunk, row.extents, strict=True))
        ):
            raise ValueError(f"{row.tensor!r}: chunk {row.chunk} does not hold {row.extents}")
        rows.append(row)
    return tuple(rows)
