"""A GF(256) matrix times shards in plain numpy: no tables, only XOR and doubling.

A coefficient is a sum of powers of two, so a row of the product is, by Horner's rule over the
eight bits: double, add the shards whose coefficient has this bit, and so on downwards. That is
at most seven doublings a row, however many shards there are, and none for XOR. Lookup in a
table, the usual way, is eight times slower in numpy. Anvin (2004) doubles many bytes at once
in the same way for RAID-6.

numpy's loops release the GIL and stay on the calling thread.
"""

from collections.abc import Sequence

import numpy as np

from ftkit.checkpoint.galois import Matrix
from ftkit.checkpoint.raw import Bytes

#: The block that is being computed and its carries stay in a second-level cache of 1 MiB.
BLOCK_BYTES = 256 << 10

#: Doubling takes four passes over a block, adding one.
_DOUBLING_COST = 4


class Planes:
    """One matrix, ready to be multiplied. Not for two threads at once: it owns scratch memory."""

    def __init__(self, matrix: Matrix) -> None:
        self._steps = [_Step.cheapest(matrix, row) for row in range(len(matrix))]
        self._carry = np.empty(BLOCK_BYTES, dtype=np.uint8)

    def multiply(self, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        """Set targets = matrix x sources, all of one length; targets overlap nothing."""
        for at in range(0, targets[0].nbytes, BLOCK_BYTES):
            blocks = [s[at : at + BLOCK_BYTES] for s in sources]
            out = [t[at : at + BLOCK_BYTES] for t in targets]
            for step, target in zip(self._steps, out, strict=True):
                step.run(blocks, target, self._carry[: target.nbytes])
                if step.base is not None:
                    np.bitwise_xor(target, out[step.base], out=target)


class _Step:
    """One row: which shards to add before each doubling, and an earlier row to add at the end."""

    def __init__(self, row: Sequence[int], base: int | None) -> None:
        top = max((c.bit_length() for c in row), default=0)
        self.base = base
        self.planes = [
            [column for column, c in enumerate(row) if c >> bit & 1]
            for bit in range(top - 1, -1, -1)
        ]

    @classmethod
    def cheapest(cls, matrix: Matrix, row: int) -> "_Step":
        """The row from nothing, or from the row before that leaves the least to be done.

        Two shards lost under P and Q differ by P alone: the second one costs no doubling.
        """
        differences = (
            cls([a ^ b for a, b in zip(matrix[row], matrix[base], strict=True)], base)
            for base in range(row)
        )
        return min([cls(matrix[row], None), *differences], key=lambda step: step.cost)

    @property
    def cost(self) -> int:
        return _DOUBLING_COST * len(self.planes) + sum(map(len, self.planes))

    def run(self, sources: Sequence[Bytes], target: Bytes, carry: Bytes) -> None:
        if not self.planes:
            target.fill(0)
        for index, plane in enumerate(self.planes):
            if index:
                # The bytes whose top bit falls out get the polynomial added.
                np.right_shift(target.view(np.int8), 7, out=carry.view(np.int8))
                np.bitwise_and(carry, 0x1D, out=carry)
                np.add(target, target, out=target)
                np.bitwise_xor(target, carry, out=target)
                rest = plane
            elif len(plane) > 1:
                np.bitwise_xor(sources[plane[0]], sources[plane[1]], out=target)
                rest = plane[2:]
            else:
                np.copyto(target, sources[plane[0]])
                rest = []
            for column in rest:
                np.bitwise_xor(target, sources[column], out=target)
