"""Checkpoint: a committed step, opened for reading; every byte is checked before it is given.

Which checkpoint is newest is worked out from the folders each time, never stored: a pointer
could be newer or older than what it points to.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftkit.checkpoint.crc import crc32c
from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.persist import manifest
from ftkit.checkpoint.persist.boxes import Box, Shape, uncovered
from ftkit.checkpoint.persist.codecs import Codec
from ftkit.checkpoint.persist.commit import CommitRecord, digest
from ftkit.checkpoint.persist.folder import COMMIT, MANIFEST, STATE, step_folder, step_of
from ftkit.checkpoint.persist.manifest import Kind, Row
from ftkit.checkpoint.persist.store import Store, confined
from ftkit.checkpoint.persist.zarr_format import CRC_BYTES
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint."""

    name: str
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"{self.name!r} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Checkpoint:
    """A committed step whose record and manifest are whole and whose files are all there."""

    store: Store
    record: CommitRecord
    rows: tuple[Row, ...]
    small: Mapping[str, Any]
    """The small state of all writers together."""
    skipped: Mapping[Step, str] = field(default_factory=dict)
    """Newer checkpoints that were passed over, and what is wrong with each."""

    @property
    def step(self) -> Step:
        return self.record.step

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors, by name."""
        return {r.tensor: Tensor(r.tensor, r.dtype, r.shape) for r in self.rows}

    @cached_property
    def chunks(self) -> Mapping[str, tuple[Row, ...]]:
        """The chunks of each tensor, in order of file and offset."""
        found = defaultdict[str, list[Row]](list)
        for row in self.rows:
            if row.kind == Kind.CHUNK:
                found[row.tensor].append(row)
        return {name: tuple(rows) for name, rows in found.items()}

    def tensor(self, name: str) -> Tensor:
        """What the checkpoint says of a tensor. UsageError, naming close ones, without it."""
        if name not in self.tensors:
            some = ", ".join(sorted(self.tensors)[:5])
            raise UsageError(
                f"step {self.step} in {self.store.url} has no tensor {name!r}; it has "
                f"{len(self.tensors)}: {some}, ..."
            )
        return self.tensors[name]

    def read(self, name: str, box: Box, out: memoryview) -> int:
        """Read a box of a tensor, and only the chunks that it meets.

        Blocks. After an error `out` may be partly written.

        Args:
          name: the tensor.
          box: what to read, in the whole tensor's indices.
          out: writable, contiguous, of the box's size: receives it in C order.

        Returns:
          Bytes read from the store.

        Raises:
          UsageError: no such tensor, the box is not inside it, or `out` has another size.
          IntegrityError: a chunk is missing, short or altered; names the chunk and its file.
        """
        tensor = self.tensor(name)
        item = ITEM_BYTES[tensor.dtype]
        whole = Box.whole(tensor.shape)
        if len(box.shape) != len(tensor.shape) or not whole.contains(box):
            raise UsageError(f"{tensor} has no box {box}")
        if out.nbytes != box.size * item:
            raise UsageError(
                f"{tensor}: box {box} needs {box.size * item} bytes, `out` has {out.nbytes}"
            )
        if not box.size:
            return 0
        target = np.frombuffer(out.cast("B"), dtype=f"V{item}").reshape(box.shape)
        met = [
            (row, part) for row in self.chunks.get(name, ()) if (part := row.box & box) is not None
        ]
        why = uncovered(box, (part for _, part in met))
        if why is not None:
            raise IntegrityError(f"manifest of step {self.step} does not hold {name!r}: {why}")
        for row, part in met:
            self._read_chunk(row, part, target[part.within(box)], item)
        return sum(row.bytes for row, _ in met)

    def verify(self, progress: Callable[[int], None] = lambda _: None) -> int:
        """Read and check everything: each range that the manifest names, and that there is no more.

        Args:
          progress: told the bytes of each range when it has been checked.

        Returns:
          The bytes read.

        Raises:
          IntegrityError: with the first fault found.
        """
        total = 0
        sizes = self._check_sizes()
        for tensor in self.tensors.values():
            boxes = (r.box for r in self.chunks.get(tensor.name, ()))
            why = uncovered(Box.whole(tensor.shape), boxes)
            if why is not None:
                raise IntegrityError(f"manifest of step {self.step}: {tensor}: {why}")
        for row in self.rows:
            self._verify_row(row)
            total += row.bytes
            progress(row.bytes)
        for name, (count, expected) in self.record.files.items():
            if digest(self._get(name)) != expected:
                raise IntegrityError(f"{self._at(name)} is altered: its digest is another")
            total += count
        if CommitRecord.decode(self._get(COMMIT)) != self.record:
            raise IntegrityError(f"{self._at(COMMIT)} has changed since it was opened")
        return total + sizes[COMMIT]

    def _check_sizes(self) -> dict[str, int]:
        """Compare the folder with what the manifest and the record say it holds."""
        wanted = defaultdict[str, int](int)
        for row in self.rows:
            if row.at != wanted[row.file]:
                raise IntegrityError(
                    f"manifest of step {self.step} leaves out or repeats bytes of {row.file} "
                    f"before {row.at}"
                )
            wanted[row.file] += row.bytes
        wanted.update({name: count for name, (count, _) in self.record.files.items()})
        found = self.store.sizes(step_folder(self.step))
        for name, count in wanted.items():
            if name not in found:
                raise IntegrityError(f"{self._at(name)} is missing")
            if found[name] != count:
                raise IntegrityError(
                    f"{self._at(name)} has {found[name]} bytes, the manifest says {count}"
                )
        foreign = found.keys() - wanted.keys() - {COMMIT}
        if foreign:
            raise IntegrityError(f"{self._at(min(foreign))} does not belong there")
        return found

    def _verify_row(self, row: Row) -> None:
        data = memoryview(bytearray(row.bytes))
        self._fill(row, [data])
        if row.kind == Kind.METADATA:
            if crc32c(data) != row.crc32c:
                raise IntegrityError(f"{self._at(row.file)} is altered: its checksum is another")
        else:
            payload = self._checked(row, data[:-CRC_BYTES], data[-CRC_BYTES:])
            if row.kind == Kind.CHUNK:
                self._decoded(row, payload, ITEM_BYTES[row.dtype])

    def _read_chunk(self, row: Row, part: Box, target: NDArray[np.void], item: int) -> None:
        direct = part.shape == row.chunk and target.flags.c_contiguous and row.codec == Codec.RAW
        if direct and row.bytes == target.nbytes + CRC_BYTES:
            # Straight to where it is wanted, and checked there.
            data = target.reshape(-1).view(np.uint8).data
            mark = memoryview(bytearray(CRC_BYTES))
            self._fill(row, [data, mark])
            self._checked(row, data, mark)
            return
        stored = memoryview(bytearray(row.bytes))
        self._fill(row, [stored])
        payload = self._checked(row, stored[:-CRC_BYTES], stored[-CRC_BYTES:])
        chunk = self._decoded(row, payload, item)
        held = Box(row.offsets, row.chunk)
        target[...] = chunk[part.within(held)]

    def _decoded(self, row: Row, payload: memoryview, item: int) -> NDArray[np.void]:
        size = Box(row.offsets, row.chunk).size * item
        try:
            if Codec(row.codec) is Codec.RAW:
                plain = payload
                if plain.nbytes != size:
                    raise IntegrityError(f"holds {plain.nbytes} bytes instead of {size}")
            else:
                plain = memoryview(bytearray(size))
                Codec(row.codec).unpack(payload, plain)
        except IntegrityError as error:
            raise IntegrityError(f"{self._where(row)} {error}") from error
        return np.frombuffer(plain, dtype=f"V{item}").reshape(row.chunk)

    def _fill(self, row: Row, into: list[memoryview]) -> None:
        if row.kind != Kind.METADATA and row.bytes < CRC_BYTES:
            raise IntegrityError(f"{self._where(row)} has no room for its checksum")
        try:
            count = self.store.read(f"{step_folder(self.step)}/{row.file}", row.at, into)
        except FileNotFoundError as error:
            raise IntegrityError(f"{self._where(row)}: the file is missing") from error
        if count != row.bytes:
            raise IntegrityError(
                f"{self._where(row)}: {row.bytes} bytes expected, {count} read: the file is cut "
                "short, or the store gave less than it holds"
            )

    def _checked(self, row: Row, payload: memoryview, mark: memoryview) -> memoryview:
        found = crc32c(payload)
        if found != row.crc32c or mark != found.to_bytes(CRC_BYTES, "little"):
            raise IntegrityError(
                f"{self._where(row)} is altered: CRC-32C {found:08x}, written were "
                f"{row.crc32c:08x} (manifest) and {int.from_bytes(mark, 'little'):08x} (file)"
            )
        return payload

    def _get(self, name: str) -> bytes:
        return _whole(self.store, self.record, name)

    def _where(self, row: Row) -> str:
        return f"{row.kind} {row.box} of {row.tensor!r}, {self._at(row.file)} from byte {row.at}"

    def _at(self, name: str) -> str:
        return f"{self.store.url}/{step_folder(self.step)}/{name}"


def steps(store: Store) -> list[Step]:
    """Steps that have a folder, ascending; whether they are committed and whole is not asked."""
    return sorted(s for s in map(step_of, store.names()) if s is not None)


def open_checkpoint(
    store: Store,
    step: Step | None = None,
    *,
    below: Step | None = None,
    verify: bool = False,
) -> Checkpoint:
    """Open a checkpoint.

    Reads its record and manifest and compares names and sizes of its files; the tensors' bytes
    are checked as they are read, and by `Checkpoint.verify`.

    Args:
      store: the root.
      step: which; None for the newest good one, passing over damaged ones (`skipped`).
      below: only older ones than this, for who found that one damaged while reading it.
      verify: read all of a checkpoint before calling it good.

    Raises:
      UsageError: there is none; or it, or one newer than all good ones, has a format that this
        ftkit does not read: going back silently would lose that work.
      IntegrityError: this step, or every step, is damaged; says in what.
      StoreError: the store failed. No older checkpoint is tried: the newer ones may be whole.
    """
    if step is not None:
        try:
            found = load(store, step)
        except FileNotFoundError:
            there = [s for s in steps(store) if COMMIT in store.sizes(step_folder(s))]
            raise UsageError(
                f"step {step} has no checkpoint in {store.url}; there are {there or 'none'}"
            ) from None
        if verify:
            found.verify()
        return found
    skipped = dict[Step, str]()
    for candidate in reversed(steps(store)):
        if below is not None and candidate >= below:
            continue
        try:
            found = load(store, candidate)
            if verify:
                found.verify()
        except FileNotFoundError:
            continue  # never committed: not a checkpoint
        except IntegrityError as error:
            skipped[candidate] = str(error)
            logger.warning("checkpoint of step %s is passed over: %s", candidate, error)
            continue
        return Checkpoint(found.store, found.record, found.rows, found.small, skipped)
    if skipped:
        raise IntegrityError(
            f"no good checkpoint in {store.url}: "
            + "; ".join(f"step {s}: {why}" for s, why in skipped.items())
        )
    raise UsageError(f"there is no checkpoint in {store.url}")


def load(store: Store, step: Step) -> Checkpoint:
    """Open exactly this step.

    Raises:
      FileNotFoundError: it has no commit record.
      IntegrityError, UsageError, StoreError: as of `open_checkpoint`.
    """
    folder = step_folder(step)
    record = CommitRecord.decode(store.get(f"{folder}/{COMMIT}"))
    if record.step != step:
        raise IntegrityError(f"{folder}/{COMMIT} is that of step {record.step}")
    for name in record.files:
        confined(name)
    rows = manifest.decode(_checked_file(store, record, MANIFEST))
    small = json.loads(_checked_file(store, record, STATE))
    if not isinstance(small, dict):
        raise IntegrityError(f"{folder}/{STATE} holds {type(small).__name__}, no object")
    found = Checkpoint(store, record, rows, small)
    found._check_sizes()
    return found


def _checked_file(store: Store, record: CommitRecord, name: str) -> bytes:
    data = _whole(store, record, name)
    if name not in record.files:
        raise IntegrityError(f"the record of step {record.step} does not name {name}")
    count, expected = record.files[name]
    if len(data) != count or digest(data) != expected:
        raise IntegrityError(
            f"{step_folder(record.step)}/{name} is altered: {len(data)} bytes with digest "
            f"{digest(data)}, the record says {count} with {expected}"
        )
    return data


def _whole(store: Store, record: CommitRecord, name: str) -> bytes:
    path = f"{step_folder(record.step)}/{name}"
    try:
        return store.get(path)
    except FileNotFoundError as error:
        raise IntegrityError(f"{store.url}/{path} is missing") from error
