"""Arena: the shared-memory file in which one seat's snapshots outlive its process.

An agent makes the file (`provision`) before training needs it. The seat's process opens it for
writing; anybody of the same user may map it read-only meanwhile. One writer at a time is the
caller's duty: generations see to it. The file and its pages are `pages`, what the bytes mean is
`slabs`.
"""

import re
import socket
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ftkit.checkpoint.chunks import WHOLE, Share, chunk_count
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.pages import ArenaFile
from ftkit.checkpoint.slabs import (
    PAGE,
    Head,
    Pin,
    Sealed,
    choose_slab,
)
from ftkit.checkpoint.writer import SlabMirror, SlabWriter
from ftkit.core.errors import AllPinned, CapacityError, IntegrityError, UsageError
from ftkit.core.ids import Generation, JobId, Seat, Step

SHM = Path("/dev/shm")


def arena_path(job: JobId, seat: Seat, directory: Path = SHM) -> Path:
    """Where the arena of a seat lies. UsageError when `job` cannot be part of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", job):
        raise UsageError(f"job id {job!r} may have letters, digits, '.', '_' and '-' only")
    return directory / f"ftkit-{job}-{seat}.arena"


class Arena:
    """An open arena file. Not thread-safe, except that reading never disturbs writing."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Map the file at `path`; prefer `open`."""
        self._file = ArenaFile(path, writable=writable)
        self.geometry = self._file.geometry
        self.path = path
        self.writable = writable
        self._pages: dict[int, tuple[bytes, Sealed | None]] = {}
        """Of each slab, the page that was read last, and what it says."""
        # A writer is alone: what it has sealed since is what there is.
        self._held = list(self.slabs()) if writable else []

    @classmethod
    def open(cls, path: Path, *, writable: bool = False) -> "Arena":
        """Open an existing arena.

        Raises:
          OSError: there is no such file, or it may not be opened. A symbolic link is refused.
          IntegrityError: it is not an arena, or its first page is damaged.
        """
        return cls(path, writable=writable)

    def fits(self, layout: StateLayout) -> bool:
        """Whether a snapshot of this layout has room in a slab."""
        return (
            layout.total_bytes <= self.geometry.data_bytes
            and layout.meta_bytes <= self.geometry.meta_bytes
        )

    def slabs(self) -> tuple[Sealed | None, ...]:
        """What each slab's page says, by slab; None for one without a sealed page."""
        found = list[Sealed | None]()
        for slab in range(self.geometry.slabs):
            at = self.geometry.slab_at(slab)
            page = self._file.map[at : at + PAGE]
            known = self._pages.get(slab)
            if known is None or known[0] != page:
                sealed = Sealed.from_page(page)
                known = page, sealed if sealed is not None and self._holds(sealed) else None
                self._pages[slab] = known
            found.append(known[1])
        return tuple(found)

    def snapshots(self) -> tuple[Sealed, ...]:
        """The sealed snapshots, oldest first. Their data has not been checked."""
        return tuple(sorted((s for s in self.slabs() if s), key=lambda s: s.version))

    def sealed_steps(self) -> tuple[Step, ...]:
        """The steps of `snapshots`, in the same order."""
        return tuple(s.step for s in self.snapshots())

    def newest(self) -> Sealed | None:
        """The newest sealed snapshot, its data not checked."""
        return max(self.snapshots(), key=lambda s: s.version, default=None)

    def newest_good(self) -> Sealed | None:
        """The newest snapshot whose every byte matches its digest. Reads all of it."""
        for sealed in reversed(self.snapshots()):
            try:
                self.verify(sealed)
            except IntegrityError:
                continue
            return sealed
        return None

    def pins(self, slab: int) -> tuple[bool, ...]:
        """Which tiers have pinned a slab, in the order of `Pin`."""
        at = self.geometry.pin_at(slab, Pin(0))
        return tuple(map(bool, self._file.map[at : at + len(Pin)]))

    def pin(self, sealed: Sealed, pin: Pin, *, on: bool = True) -> bool:
        """Keep a snapshot from being overwritten, or (`on=False`) let go of it.

        For the agent and the writing process alike; the arena must be writable. A writer that
        has just chosen the slab takes it nevertheless: readers check what they read.

        Returns:
          Whether the snapshot is there.
        """
        for slab, held in enumerate(self.slabs()):
            if held == sealed:
                self._file.map[self.geometry.pin_at(slab, pin)] = on
                return True
        return False

    def find(self, step: Step, generation: Generation | None = None) -> Sealed:
        """The snapshot of a step, of its newest generation unless one is named.

        Raises:
          IntegrityError: it is not here, or no longer.
        """
        for sealed in reversed(self.snapshots()):
            if sealed.step == step and generation in (None, sealed.generation):
                return sealed
        named = "" if generation is None else f" of generation {generation}"
        raise IntegrityError(
            f"{self.path.name} has no sealed snapshot of step {step}{named}; it has steps "
            f"{list(self.sealed_steps())}"
        )

    def head_bytes(self, sealed: Sealed) -> bytes:
        """The head of a snapshot as `Head.parse` wants it. IntegrityError when overwritten."""
        at = self.geometry.slab_at(self._slab_of(sealed))
        table_at = at + self.geometry.table_at
        meta = sealed.layout_bytes + sealed.small_bytes
        return (
            self._file.map[at : at + PAGE + meta]
            + self._file.map[table_at : table_at + sealed.table_bytes]
        )

    def head(self, sealed: Sealed) -> Head:
        """Layout, small state and digests of a snapshot. IntegrityError when damaged."""
        return Head.parse(self.head_bytes(sealed))

    def data(self, sealed: Sealed) -> memoryview:
        """The part's data, unchecked and read-only; it may change under the reader.

        The view must be released before `close`. IntegrityError when overwritten.
        """
        at = self.geometry.slab_at(self._slab_of(sealed)) + self.geometry.data_at
        return self._file.bytes[at : at + sealed.data_bytes].data.toreadonly()

    def send(self, sock: socket.socket, at: int, count: int) -> None:
        """Send bytes of the file (`data_offset`), unchecked, straight from its pages. Blocks.

        Raises:
          OSError: the socket failed, or its timeout is over.
        """
        self._file.send(sock, at, count)

    def read(self, at: int, into: Sequence[memoryview]) -> None:
        """Fill buffers one after another with bytes of the file (`data_offset`). Any thread.

        Raises:
          IntegrityError: the file ends before they do.
        """
        self._file.read(at, into)

    def data_offset(self, sealed: Sealed) -> int:
        """Where the part's data begins in the file. IntegrityError when overwritten."""
        return self.geometry.slab_at(self._slab_of(sealed)) + self.geometry.data_at

    def blocks(self, head: Head, chunks: range | None = None) -> Iterator[memoryview]:
        """The data of a part, a chunk at a time, each checked before it is handed out.

        The views are read-only and valid until `close`.

        Args:
          head: of the part.
          chunks: which chunks, counted from the part's first (`Head.span`); None for all.

        Raises:
          IntegrityError: a chunk fails, or the slab was overwritten meanwhile: what was
            read before is not to be used either.
        """
        data = self.data(head.sealed)
        size = head.sealed.chunk_bytes
        for chunk in chunks if chunks is not None else range(len(head.digests)):
            block = data[chunk * size : (chunk + 1) * size]
            head.check(chunk, block)
            yield block
        self._slab_of(head.sealed)

    def verify(self, sealed: Sealed) -> None:
        """Read the whole part; IntegrityError unless every byte is what was captured."""
        for _ in self.blocks(self.head(sealed)):
            pass

    def start(
        self,
        step: Step,
        generation: Generation,
        layout: StateLayout,
        *,
        share: Share = WHOLE,
        layouts: int = 1,
        complete: Step | None = None,
        pins: Collection[Pin] = (),
    ) -> SlabWriter:
        """Begin to overwrite the slab that can best be spared (`choose_slab`).

        Args:
          step: of the snapshot.
          generation: in which it is captured.
          layout: of the state.
          share: the part to be written.
          layouts: how many different layouts make up the job's state.
          complete: the newest step complete on every rank; its slab is kept where possible.
          pins: the tiers for which the new snapshot is pinned from the start.

        Raises:
          CapacityError: the part does not fit; call `ensure_arena` first.
          AllPinned: no slab can be spared.
        """
        if not self.writable:
            raise UsageError(f"{self.path.name} was opened read-only")
        size = self.geometry.chunk_bytes
        chunks = share.chunks(chunk_count(layout.total_bytes, size))
        if not self.fits(layout):
            raise CapacityError(
                f"a snapshot needs {layout.total_bytes} bytes of data and {layout.meta_bytes} of "
                f"meta; {self.path.name} has {self.geometry.data_bytes} and "
                f"{self.geometry.meta_bytes}: its agent must make it larger (ensure_arena)"
            )
        return SlabWriter(
            self._file.bytes,
            self.geometry,
            self._spare(step, complete, pins),
            step,
            generation,
            layout,
            chunks,
            layouts,
            reserve=self._file.reserve,
            sealed=self._seal,
        )

    def adopt(self, head: bytes, *, pins: Collection[Pin] = ()) -> SlabMirror:
        """Begin to make an exact copy of a part of which only the head is at hand.

        Args:
          head: of the part, checked.
          pins: the tiers for which it is pinned from the start.

        Raises:
          CapacityError: the part does not fit (`ensure_arena`).
          AllPinned: no slab can be spared.
        """
        if not self.writable:
            raise UsageError(f"{self.path.name} was opened read-only")
        sealed = Sealed.from_page(head[:PAGE])
        assert sealed is not None, "the head was checked"
        if not self._holds(sealed):
            raise CapacityError(
                f"a part of {sealed.data_bytes} bytes does not fit into {self.path.name}, which "
                f"has slabs of {self.geometry.data_bytes}"
            )
        slab = self._spare(sealed.step, None, pins)
        return SlabMirror(
            self._file.bytes,
            self.geometry,
            slab,
            head,
            reserve=self._file.reserve,
            sealed=self._seal,
        )

    def data_to_mend(self, sealed: Sealed) -> memoryview:
        """The part's data, writable, to put back bytes that rotted; as `data`."""
        if not self.writable:
            raise UsageError(f"{self.path.name} was opened read-only")
        at = self.data_offset(sealed)
        return self._file.bytes[at : at + sealed.data_bytes].data

    def _spare(self, step: Step, complete: Step | None, pins: Collection[Pin]) -> int:
        """Take the slab that can best be spared, and pin it. AllPinned when there is none."""
        pinned = [slab for slab in range(self.geometry.slabs) if any(self.pins(slab))]
        slab = choose_slab(self._held, complete, pinned)
        if slab is None:
            raise AllPinned(
                f"{self.path.name} has no slab to spare for step {step}: {len(pinned)} of "
                f"{self.geometry.slabs} are being read by the tiers below"
            )
        self._held[slab] = None
        for pin in Pin:
            self._file.map[self.geometry.pin_at(slab, pin)] = pin in pins
        return slab

    def reserve(self, part_bytes: int) -> None:
        """Have pages for parts of this size in every slab, and map them.

        Blocks for about a tenth of a second a gigabyte where the file has them already.

        Raises:
          CapacityError: there is no memory for them.
        """
        for slab in range(self.geometry.slabs):
            self._file.reserve(slab, part_bytes)

    def drop(self, sealed: Sealed) -> None:
        """Forget a snapshot that turned out to be damaged; nothing when it is overwritten."""
        for slab, held in enumerate(self.slabs()):
            if held == sealed:
                at = self.geometry.slab_at(slab)
                self._file.bytes[at : at + PAGE] = 0

    def _seal(self, slab: int, sealed: Sealed) -> None:
        self._held[slab] = sealed

    def close(self) -> None:
        """Unmap the file. Views handed out keep the memory until they are gone."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _holds(self, sealed: Sealed) -> bool:
        geometry = self.geometry
        return (
            sealed.data_bytes <= geometry.data_bytes
            and sealed.layout_bytes + sealed.small_bytes <= geometry.meta_bytes
            and sealed.table_bytes <= geometry.data_at - geometry.table_at
        )

    def _slab_of(self, sealed: Sealed) -> int:
        for slab, held in enumerate(self.slabs()):
            if held == sealed:
                return slab
        raise IntegrityError(
            f"the slab of step {sealed.step} in {self.path.name} was overwritten; it now has "
            f"steps {list(self.sealed_steps())}"
        )
