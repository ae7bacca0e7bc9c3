"""SlotWriter: one slot of an arena while it is written."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.slots import PAGE, Geometry, Sealed
from ftkit.core.errors import CapacityError
from ftkit.core.ids import Generation, Step


class SlotWriter:
    """One slot until it is sealed. Parts of it may be written by several threads."""

    def __init__(
        self,
        file: NDArray[np.uint8],
        geometry: Geometry,
        slot: int,
        step: Step,
        generation: Generation,
        layout: StateLayout,
        chunks: range,
        layouts: int,
        *,
        reserve: Callable[[int, int], None],
        sealed: Callable[[int, Sealed], None],
    ) -> None:
        """From here on the old snapshot of the slot is gone.

        Args:
          file: the arena.
          geometry: the arena's.
          slot: which slot.
          step: of the snapshot.
          generation: in which it is captured.
          layout: of the state.
          chunks: the part, as chunks of the layout.
          layouts: how many different layouts make up the job's state.
          reserve: gives the slot pages for so many bytes of data.
          sealed: told the slot and its page once it is sealed.
        """
        at = geometry.slot_at(slot)
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
        self.slot = slot
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
        self._reserve(self.slot, self.data.nbytes)

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
        self._tell(self.slot, sealed)
        return sealed
