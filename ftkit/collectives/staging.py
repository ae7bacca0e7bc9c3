"""Staging: blocks of resident memory through which private memory is shown to peers.

A copy into a block and a fold straight out of it cost less than one read of private memory by
the kernel. A block is lent to one or more readers. Each writes the loan's number into a place of
its own in our memory when it is through: a receipt, which costs no message, and which is looked
at when a block is needed. A reader that is late, from an aborted generation even, writes an old
number. All blocks come back when the generation ends: who reads on finds the valid word gone.
"""

from collections import deque
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ftkit.collectives.arithmetic import Bytes
from ftkit.collectives.resident import allocate

#: Blocks taken from the system at a time.
_SLAB_BLOCKS = 4
#: Readers of one block, at most; more are served without a copy.
READERS_MAX = 64
_RECEIPT_BYTES = 8


class _Block(NamedTuple):
    memory: Bytes
    receipts: npt.NDArray[np.uint64]
    """READERS_MAX numbers, in the segment of `memory`."""
    receipts_offset: int
    """Bytes from the start of `memory` to them."""


class Loan(NamedTuple):
    """One block, lent to `readers` peers."""

    number: int
    block: _Block
    readers: int

    def receipt_offset(self, reader: int) -> int:
        """Bytes from the start of the block to the receipt of a reader; may be negative."""
        return self.block.receipts_offset + reader * _RECEIPT_BYTES


class Staging:
    """Owned by the communication thread."""

    def __init__(self, block_bytes: int, blocks_max: int) -> None:
        """Up to `blocks_max` blocks, made as they are needed and kept."""
        self.block_bytes = block_bytes
        self._left = blocks_max
        self._free: list[_Block] = []
        self._lent: deque[Loan] = deque()
        self._number = 0

    @property
    def lent(self) -> bool:
        """Whether a peer may still be reading a block."""
        self._collect()
        return bool(self._lent)

    def lend(self, readers: int) -> Loan | None:
        """A block for so many peers; None when all are lent."""
        if readers > READERS_MAX:
            return None
        # Always, so that the block is one that was used a moment ago and is in the caches.
        self._collect()
        if not self._free:
            self._grow()
        if not self._free:
            return None
        self._number += 1
        loan = Loan(self._number, self._free.pop(), readers)
        self._lent.append(loan)
        return loan

    def recall(self) -> None:
        """Take every block back: the generation is over."""
        self._free += [loan.block for loan in self._lent]
        self._lent.clear()

    def close(self) -> None:
        """Give all memory back to the system."""
        self._lent.clear()
        self._free.clear()
        self._left = 0

    def _collect(self) -> None:
        """Take back what was read, up to the first loan that was not: they end about in order."""
        while self._lent:
            loan = self._lent[0]
            if any(
                number != loan.number for number in loan.block.receipts[: loan.readers].tolist()
            ):
                return
            self._free.append(loan.block)
            self._lent.popleft()

    def _grow(self) -> None:
        count = min(_SLAB_BLOCKS, self._left)
        if not count:
            return
        self._left -= count
        table_bytes = READERS_MAX * _RECEIPT_BYTES
        slab = allocate(count * (self.block_bytes + table_bytes))
        for i in range(count):
            at, table = i * self.block_bytes, count * self.block_bytes + i * table_bytes
            receipts = slab[table : table + table_bytes].view(np.uint64)
            self._free.append(_Block(slab[at : at + self.block_bytes], receipts, table - at))
