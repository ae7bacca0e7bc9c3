"""Chunks: a layout cut into the pieces that are copied and checksummed as one (pure)."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ftkit.checkpoint.layout import StateLayout
from ftkit.core.errors import IntegrityError

#: 1 MiB fits the second-level cache, so the digest reads what the copy has just written.
CHUNK_BYTES = 1 << 20

#: The index of a `Piece` that is padding between tensors and is written as zeros.
PADDING = -1


@dataclass(frozen=True, slots=True)
class Share:
    """One replica's share of the chunks of a layout that `count` replicas hold alike."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"there is no share {self.index} of {self.count}")

    def chunks(self, chunks: int) -> range:
        """Which of so many chunks: shares differ by one chunk at most, and cover all."""
        return range(self.index * chunks // self.count, (self.index + 1) * chunks // self.count)

    def bytes_max(self, data_bytes: int, chunk_bytes: int) -> int:
        """The most bytes that any share of this size can have."""
        return min(data_bytes, -(-chunk_count(data_bytes, chunk_bytes) // self.count) * chunk_bytes)


#: The only share of a state that nobody else holds.
WHOLE = Share()


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one entry: `count` of them from `offset`, to byte `at` of the part's data."""

    entry: int
    offset: int
    at: int
    count: int


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker copies and then digests: usually one chunk.

    A `whole` entry cannot be cut (its memory is strided), so all chunks it touches are one
    unit: otherwise one worker could digest a chunk that another is still writing. Only the
    bounds of the part cut it.
    """

    pieces: tuple[Piece, ...]
    chunks: range
    """Counted from the part's first."""


def chunk_count(data_bytes: int, chunk_bytes: int) -> int:
    """Chunks in so many bytes, the last one possibly shorter."""
    return -(-data_bytes // chunk_bytes)


def units(
    layout: StateLayout,
    chunk_bytes: int,
    whole: Collection[int] = (),
    chunks: range | None = None,
) -> tuple[Unit, ...]:
    """Cut a part of a layout into units that together write each of its bytes exactly once.

    Args:
      layout: what to cut.
      chunk_bytes: bytes of each chunk; the layout's last may be shorter.
      whole: indices of entries that must be copied in one piece.
      chunks: the part, as chunks of the layout; None for all of it.
    """
    if chunks is None:
        chunks = range(chunk_count(layout.total_bytes, chunk_bytes))
    count = len(chunks)
    first_byte = chunks.start * chunk_bytes
    end_byte = min(chunks.stop * chunk_bytes, layout.total_bytes)
    pieces: list[list[Piece]] = [[] for _ in range(count)]
    joined = [False] * (count + 1)  # chunk i belongs to the same unit as chunk i - 1

    def cut(entry: int, at: int, size: int, *, in_one: bool = False) -> None:
        """Bytes `at` to `at + size` of the layout come from `entry`, as far as they are here."""
        start, end = max(at, first_byte), min(at + size, end_byte)
        if in_one and start < end:
            low, high = (start - first_byte) // chunk_bytes, (end - 1 - first_byte) // chunk_bytes
            joined[low + 1 : high + 1] = [True] * (high - low)
            pieces[low].append(Piece(entry, start - at, start - first_byte, end - start))
            return
        while start < end:
            chunk = (start - first_byte) // chunk_bytes
            length = min(end, first_byte + (chunk + 1) * chunk_bytes) - start
            pieces[chunk].append(Piece(entry, start - at, start - first_byte, length))
            start += length

    end = 0
    for index, entry in enumerate(layout.entries):
        cut(PADDING, end, entry.at - end)
        end = entry.at + entry.bytes
        cut(index, entry.at, entry.bytes, in_one=index in whole)
    cut(PADDING, end, layout.total_bytes - end)

    found, first = list[Unit](), 0
    for chunk in range(1, count + 1):
        if not joined[chunk]:
            members = (p for c in range(first, chunk) for p in pieces[c])
            found.append(Unit(tuple(members), range(first, chunk)))
            first = chunk
    return tuple(found)


def scatter(
    layout: StateLayout,
    blocks: Iterable[memoryview | bytes],
    targets: Sequence[memoryview],
    start: int = 0,
    stop: int | None = None,
) -> None:
    """Distribute the data of a snapshot, or a range of it, over its entries.

    Args:
      layout: how the data is laid out.
      blocks: the data in order, cut anywhere; each is read before the next is asked for.
      targets: one writable buffer of bytes (format "B") per entry, of the entry's size.
      start: the byte of the data that the blocks begin with.
      stop: the byte that they end before; None for the last.

    Raises:
      IntegrityError: the blocks hold more or fewer bytes than that; the targets have been
        partly written.
      ValueError: the targets do not match the layout; nothing was written.
    """
    entries = layout.entries
    if [t.nbytes for t in targets] != [e.bytes for e in entries]:
        raise ValueError(f"{len(targets)} targets do not match the layout's {len(entries)} entries")
    stop = layout.total_bytes if stop is None else stop
    at, first = start, 0
    for block in blocks:
        view = memoryview(block)
        end = at + len(view)
        index = first
        while index < len(entries) and entries[index].at < end:
            entry = entries[index]
            low, high = max(entry.at, at), min(entry.at + entry.bytes, end)
            if low < high:
                targets[index][low - entry.at : high - entry.at] = view[low - at : high - at]
            if entry.at + entry.bytes <= end:
                first = index + 1
            index += 1
        at = end
    if at != stop:
        raise IntegrityError(f"there are {at - start} bytes of data where {stop - start} should be")
