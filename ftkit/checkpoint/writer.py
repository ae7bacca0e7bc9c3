"""SlotWriter: one slot of an arena on its way from "writing" to "sealed"."""

import numpy as np
import xxhash
from numpy.typing import NDArray

from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.slots import PAGE, Geometry, Sealed, SlotState
from ftkit.core.errors import CapacityError
from ftkit.core.ids import Generation, Step


class SlotWriter:
    """One slot between "writing" and "sealed". Parts may be written by several threads."""

    def __init__(
        self,
        file: NDArray[np.uint8],
        geometry: Geometry,
        slot: int,
        step: Step,
        generation: Generation,
        layout: StateLayout,
    ) -> None:
        """Mark the slot as being written: from here on its old snapshot is gone."""
        at = geometry.slot_at(slot)
        self._page = file[at : at + PAGE]
        self._meta = file[at + PAGE : at + PAGE + geometry.meta_bytes]
        self._chunk_bytes = geometry.chunk_bytes
        self._layout = layout
        self._sealed = Sealed(
            state=SlotState.WRITING,
            generation=generation,
            step=step,
            data_bytes=layout.total_bytes,
            chunk_bytes=geometry.chunk_bytes,
        )
        self._put_page(self._sealed)
        self.slot = slot
        self.step = step
        self.generation = generation
        self.data = file[at + geometry.data_at : at + geometry.data_at + layout.total_bytes]
        """uint8, shape (total bytes,): where the tensors go. Shared memory."""
        table_at = at + geometry.table_at
        self.table = file[table_at : table_at + self._sealed.table_bytes].view("<u8")
        """uint64, shape (chunks,): the digests. Shared memory."""

    def digest(self, chunks: range) -> None:
        """Enter the digests of these chunks, whose data is complete."""
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
        sealed = Sealed(
            generation=self._sealed.generation,
            step=self._sealed.step,
            layout_bytes=len(self._layout.encoded),
            small_bytes=len(small),
            data_bytes=self._sealed.data_bytes,
            chunk_bytes=self._sealed.chunk_bytes,
            meta_digest=xxhash.xxh3_64_intdigest(meta),
            table_digest=xxhash.xxh3_64_intdigest(self.table.data),
        )
        self._put_page(sealed)
        return sealed

    def _put_page(self, sealed: Sealed) -> None:
        self._page[:] = np.frombuffer(sealed.to_page(), dtype=np.uint8)
