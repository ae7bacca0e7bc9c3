"""One slab of an arena while it is written: from live tensors, or as a copy of another."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.slabs import PAGE, Geometry, Sealed
from ftkit.core.errors import CapacityError
from ftkit.core.ids import Generation, Step


class SlabWriter:
    """One slab until it is sealed. Parts of it may be written by several threads."""

    def __init__(
        self,
        file: NDArray[np.uint8],
        geometry: Geometry,
        slab: int,
        step: Step,
        generation: Generation,
        layout: StateLayout,
        chunks: range,
        layouts: int,
        *,
        reserve: Callable[[int, int], None],
        sealed: Callable[[int, Sealed], None],
    ) -> None:
        """From here on the old snapshot of the slab is gone.

        Args:
          file: the arena.
          geometry: the arena's.
          slab: which slab.
          step: of the snapshot.
          generation: in which it is captured.
          layout: of the state.
          chunks: the part, as chunks of the layout.
          layouts: how many different layouts make up the job's state.
          reserve: gives the slab pages for so many bytes of data.
          sealed: told the slab and its page once it is sealed.
        """
        at = geometry.slab_at(slab)
        self._page = file[at : at + PAGE]
        self._meta = file[at + PAGE : at + PAGE + geometry.meta_bytes]
        self._chunk_bytes = geometry.chunk_bytes
        self._layout = layout
        self._reserve = reserve
        self._tell = sealed
        first = chunks.start * geometry.chunk_bytes
        end = min(chunks.stop * geometry.chunk_bytes, layout.total_bytes)
        self._sealed = Sealed(
            generation=generation,
            step=step,
            data_bytes=end - first,
            chunk_bytes=geometry.chunk_bytes,
            first_byte=first,
            total_bytes=layout.total_bytes,
            layout_digest=int(layout.digest, 16),
            layouts=layouts,
        )
        self._page[:] = 0
        self.slab = slab
        self.step = step
        self.generation = generation
        self.data = file[at + geometry.data_at : at + geometry.data_at + end - first]
        """uint8, shape (bytes of the part,): where the tensors go. Shared memory."""
        table_at = at + geometry.table_at
        self.table = file[table_at : table_at + self._sealed.table_bytes].view("<u8")
        """uint64, shape (chunks of the part,): the digests. Shared memory."""

    def reserve(self) -> None:
        """Have pages for the part; call it before the first byte is written. Any thread.

        Blocks for about a second a gigabyte the first time a part is as large as this one.

        Raises:
          CapacityError: there is no memory for them.
        """
        self._reserve(self.slab, self.data.nbytes)

    def digest(self, chunks: range) -> None:
        """Enter the digests of these chunks of the part, whose data is complete."""
        for chunk in chunks:
            at = chunk * self._chunk_bytes
            self.table[chunk] = xxhash.xxh3_64_intdigest(
                self.data[at : at + self._chunk_bytes].data
            )

    def seal(self, small: bytes) -> Sealed:
        """Write layout and small state, then declare the snapshot whole: the last store.

        Raises:
          CapacityError: the small state is larger than the layout allows; not sealed.
        """
        if len(small) > self._layout.small_bytes:
            raise CapacityError(
                f"small state of step {self._sealed.step} is {len(small)} bytes of JSON, the "
                f"layout has room for {self._layout.small_bytes}: protect with a larger small_bytes"
            )
        meta = self._layout.encoded + small
        self._meta[: len(meta)] = np.frombuffer(meta, dtype=np.uint8)
        sealed = replace(
            self._sealed,
            layout_bytes=len(self._layout.encoded),
            small_bytes=len(small),
            meta_digest=xxhash.xxh3_64_intdigest(meta),
            table_digest=xxhash.xxh3_64_intdigest(self.table.data),
        )
        self._page[:] = np.frombuffer(sealed.to_page(), dtype=np.uint8)
        self._tell(self.slab, sealed)
        return sealed


class SlabMirror:
    """One slab that becomes an exact copy of a part whose head is known, until it is sealed."""

    def __init__(
        self,
        file: NDArray[np.uint8],
        geometry: Geometry,
        slab: int,
        head: bytes,
        *,
        reserve: Callable[[int, int], None],
        sealed: Callable[[int, Sealed], None],
    ) -> None:
        """From here on the old snapshot of the slab is gone.

        Args:
          file: the arena.
          geometry: the arena's; the part fits.
          slab: which slab.
          head: of the part, checked (`Arena.head_bytes`).
          reserve: gives the slab pages for so many bytes of data.
          sealed: told the slab and its page once it is sealed.
        """
        known = Sealed.from_page(head[:PAGE])
        assert known is not None, "the head was checked"
        self._sealed = known
        self._head = np.frombuffer(head, dtype=np.uint8)
        self._file = file
        self._geometry = geometry
        self._slab = slab
        self._reserve = reserve
        self._tell = sealed
        at = geometry.slab_at(slab)
        file[at : at + PAGE] = 0
        self.data = file[at + geometry.data_at : at + geometry.data_at + known.data_bytes]
        """uint8, shape (bytes of the part,): where the data goes. Shared memory."""

    def reserve(self) -> None:
        """As `SlabWriter.reserve`."""
        self._reserve(self._slab, self.data.nbytes)

    def seal(self) -> Sealed:
        """Write the head, the page as the last store. The data must be whole."""
        sealed, at = self._sealed, self._geometry.slab_at(self._slab)
        meta_end = sealed.head_bytes - sealed.table_bytes
        self._file[at + PAGE : at + meta_end] = self._head[PAGE:meta_end]
        table_at = at + self._geometry.table_at
        self._file[table_at : table_at + sealed.table_bytes] = self._head[meta_end:]
        self._file[at : at + PAGE] = self._head[:PAGE]
        self._tell(self._slab, sealed)
        return sealed
