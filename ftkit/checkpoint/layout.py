"""StateLayout: where each tensor of a snapshot lies, the same for every replica.

A layout is fixed by names, dtypes, shapes and the boxes held, so ranks that hold the same part
of the same model agree on it without talking, and its digest says whether they do. A rank may
hold several boxes of a tensor; name and offsets together identify an entry. Bytes lie at
multiples of 64: whole cache lines, and what vectorised parity code wants.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import xxhash

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.core.errors import IntegrityError, ProtocolError

ALIGN = 64
#: Since 2, several entries may share a name: boxes of one tensor.
VERSION = 2
SMALL_BYTES = 1 << 20

#: Bytes per element. Names are torch's, without "torch.".
ITEM_BYTES: Mapping[str, int] = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4,
    "uint64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8,
    "complex32": 4, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor, or one box of a larger one."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """The box held here, in elements; () is a scalar."""
    global_shape: tuple[int, ...]
    """The whole tensor's shape. Equal to `shape` when it is replicated."""
    offsets: tuple[int, ...]
    """The box's first index in each dimension of the whole tensor."""
    at: int
    """Byte offset in the snapshot's data, a multiple of 64."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.shape)

    @property
    def signature(self) -> TensorBox:
        """What live memory must match to be loaded from this entry."""
        return TensorBox(self.name, self.dtype, self.global_shape, self.box)


@dataclass(frozen=True)
class StateLayout:
    """The entries in order of their offsets, and room for the small JSON state beside them.

    Equality, hashing and `digest` cover everything a reader depends on.
    """

    entries: tuple[Entry, ...]
    small_bytes: int = SMALL_BYTES
    """The most the small state may take as JSON, in bytes."""

    def __post_init__(self) -> None:
        end, boxes = 0, set[tuple[str, tuple[int, ...]]]()
        kinds = dict[str, tuple[str, tuple[int, ...]]]()
        for entry in self.entries:
            if entry.dtype not in ITEM_BYTES:
                raise ValueError(f"{entry.name!r} has dtype {entry.dtype!r}, which is not known")
            if (entry.name, entry.offsets) in boxes:
                raise ValueError(f"two entries are named {entry.name!r} at {list(entry.offsets)}")
            boxes.add((entry.name, entry.offsets))
            kind = entry.dtype, entry.global_shape
            if kinds.setdefault(entry.name, kind) != kind:
                raise ValueError(f"the entries of {entry.name!r} differ in dtype or global shape")
            if not len(entry.shape) == len(entry.global_shape) == len(entry.offsets):
                raise ValueError(f"{entry.name!r}: shape, global_shape and offsets differ in rank")
            for size, whole, first in zip(
                entry.shape, entry.global_shape, entry.offsets, strict=True
            ):
                if size < 0 or first < 0 or first + size > whole:
                    raise ValueError(
                        f"{entry.name!r}: box {entry.shape} at {entry.offsets} is not inside "
                        f"{entry.global_shape}"
                    )
            if entry.at % ALIGN or entry.at < end:
                raise ValueError(
                    f"{entry.name!r} is at byte {entry.at}; it must be a multiple of {ALIGN} and "
                    f"not before {end}"
                )
            end = entry.at + entry.bytes
        if self.small_bytes < 2:
            raise ValueError(f"small state needs at least 2 bytes ('{{}}'), not {self.small_bytes}")

    @classmethod
    def of(
        cls,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        *,
        small_bytes: int = SMALL_BYTES,
    ) -> "StateLayout":
        """Lay out whole (replicated) tensors in the order given.

        Args:
          tensors: (name, dtype, shape) of each.
          small_bytes: room for the small state.

        Raises:
          ValueError: a dtype is unknown or a name comes twice.
        """
        return cls.of_boxes(
            (TensorBox(name, dtype, shape, Box.whole(shape)) for name, dtype, shape in tensors),
            small_bytes=small_bytes,
        )

    @classmethod
    def of_boxes(
        cls, boxes: Iterable[TensorBox], *, small_bytes: int = SMALL_BYTES
    ) -> "StateLayout":
        """Lay out boxes of tensors in the order given.

        Raises:
          ValueError: a dtype is unknown, a box comes twice, or is not inside its tensor.
        """
        entries, end = list[Entry](), 0
        for name, dtype, global_shape, box in boxes:
            if dtype not in ITEM_BYTES:
                raise ValueError(f"{name!r} has dtype {dtype!r}, which is not known")
            entry = Entry(
                name=name,
                dtype=dtype,
                shape=box.shape,
                global_shape=global_shape,
                offsets=box.offsets,
                at=end,
            )
            entries.append(entry)
            end = _aligned(end + entry.bytes)
        return cls(entries=tuple(entries), small_bytes=small_bytes)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of tensor data, rounded up to 64."""
        return _aligned(self.entries[-1].at + self.entries[-1].bytes) if self.entries else 0

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that are equal exactly for equal layouts."""
        return xxhash.xxh3_64_hexdigest(_canonical(self._body()))

    @cached_property
    def encoded(self) -> bytes:
        """The layout as UTF-8 JSON; `decode` reads it."""
        return _canonical(self.to_json())

    @property
    def meta_bytes(self) -> int:
        """Bytes of a slab's meta area that this layout needs: itself and the small state."""
        return len(self.encoded) + self.small_bytes

    def _body(self) -> dict[str, object]:
        return {
            "version": VERSION,
            "small_bytes": self.small_bytes,
            "entries": [
                [e.name, e.dtype, list(e.shape), list(e.global_shape), list(e.offsets), e.at]
                for e in self.entries
            ],
        }

    def to_json(self) -> dict[str, object]:
        return self._body() | {"digest": self.digest}

    @classmethod
    def from_json(cls, value: object) -> "StateLayout":
        """Read what `to_json` wrote.

        Raises:
          ProtocolError: it is not a layout, or one of another version.
          IntegrityError: it is one, but its digest is another's.
        """
        if not isinstance(value, Mapping) or not isinstance(value.get("entries"), list):
            raise ProtocolError(f"not a layout: {str(value)[:80]}")
        if value.get("version") != VERSION:
            raise ProtocolError(
                f"layout has version {value.get('version')!r}, this ftkit reads {VERSION}"
            )
        try:
            layout = cls(
                entries=tuple(_entry(row) for row in value["entries"]),
                small_bytes=_natural(value.get("small_bytes")),
            )
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"not a layout: {error}") from error
        if layout.digest != value.get("digest"):
            raise IntegrityError(
                f"layout of {len(layout.entries)} entries has digest {layout.digest}, but says "
                f"{value.get('digest')!r}"
            )
        return layout

    @classmethod
    def decode(cls, data: bytes) -> "StateLayout":
        """Read `encoded`. Raises as `from_json`, and ProtocolError when it is not JSON."""
        try:
            value = json.loads(data)
        except ValueError as error:
            raise ProtocolError(f"layout is not JSON: {error}") from error
        return cls.from_json(value)

    def differences(self, other: "StateLayout", *, limit: int = 5) -> list[str]:
        """What `other` has otherwise, in words, `limit` at most; empty when it is the same."""
        mine = {(e.name, e.offsets): e.signature for e in self.entries}
        theirs = {(e.name, e.offsets): e.signature for e in other.entries}
        found = [
            f"{key[0]}: {mine.get(key, 'nothing')} became {theirs.get(key, 'nothing')}"
            for key in sorted(mine.keys() | theirs.keys())
            if mine.get(key) != theirs.get(key)
        ]
        if len(found) > limit:
            return [*found[:limit], f"and {len(found) - limit} more"]
        return found


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN


def _canonical(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _natural(value: Any) -> int:
    # bool is an int to Python, and int("3") would hide a writer that got the types wrong.
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a natural number")
    return value


def _dims(value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{value!r} is not a list of sizes")
    return tuple(_natural(v) for v in value)


def _entry(row: Any) -> Entry:
    if not isinstance(row, list) or len(row) != 6:
        raise ValueError(f"an entry has 6 fields: {row!r}")
    name, dtype, shape, global_shape, offsets, at = row
    if not isinstance(name, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"entry {name!r} has dtype {dtype!r}, which is not known")
    return Entry(
        name=name,
        dtype=dtype,
        shape=_dims(shape),
        global_shape=_dims(global_shape),
        offsets=_dims(offsets),
        at=_natural(at),
    )
