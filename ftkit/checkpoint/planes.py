"""A GF(256) matrix times shards in plain numpy: no tables, only passes over bytes.

Lookup in a table, the usual way, is eight times slower in numpy than doubling all bytes of a
block at once, as Anvin (2004) does for RAID-6. `horner` says what to double, halve and add;
this is how, on blocks that stay in a second-level cache.

Passes differ in speed: numpy shifts 16-bit lanes at the speed of that cache and bytes at a
third of it, so bytes are shifted two at a time and the bits that crossed over are masked out.
Operands in arrays without dimensions spare numpy from looking at a Python number each time.

numpy's loops release the GIL and stay on the calling thread.
"""

from collections.abc import Sequence

import numpy as np

from ftkit.checkpoint.galois import Matrix, inverse, multiply
from ftkit.checkpoint.horner import Row, scheme, shifts
from ftkit.checkpoint.raw import Bytes, address

#: A block and what it is computed from stays in a second-level cache of 1 MiB.
BLOCK_BYTES = 256 << 10

#: x^8 in the field: what a bit adds that is doubled out of its byte.
_CARRY = 0x1D
#: 1 / 2: what a bit adds that is halved out of its byte.
_BORROW = inverse(2)

_LANES = [np.array(n, dtype=np.uint16) for n in range(256)]
_BYTES = [np.array(n, dtype=np.uint8) for n in range(256)]
_ZERO = np.array(0, dtype=np.int8)


class Planes:
    """One matrix, ready to be multiplied. Not for two threads at once: it owns scratch memory."""

    def __init__(self, matrix: Matrix) -> None:
        self._scheme = scheme(matrix)
        self._scratch = np.empty((3, BLOCK_BYTES), dtype=np.uint8)

    def multiply(self, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
        """Set targets = matrix x sources, all of one length; targets overlap nothing."""
        # Lanes are whole pairs of bytes, at an even address.
        even = [address(targets[t]) % 2 == 0 for t in self._scheme.order]
        for at in range(0, targets[0].nbytes, BLOCK_BYTES):
            blocks = [s[at : at + BLOCK_BYTES] for s in sources]
            out = [targets[t][at : at + BLOCK_BYTES] for t in self._scheme.order]
            for row, target, fits in zip(self._scheme.rows, out, even, strict=True):
                self._run(row, [*blocks, *out], target, fits=fits and target.nbytes % 2 == 0)
            if self._scheme.paired:
                np.bitwise_xor(out[0], out[1], out[0])

    def _run(self, row: Row, sources: Sequence[Bytes], target: Bytes, *, fits: bool) -> None:
        aside, carry, spare = self._scratch[:, : target.nbytes + target.nbytes % 2]
        found = _Sum(target if fits else spare, target.nbytes, carry, aside)
        for columns in row.down:
            found.add([sources[c] for c in columns])
            found.halve()
        level = [sources[c] for c in row.level]
        if row.up and row.down:
            level.append(found.put_aside())
        for columns in row.up:
            found.add([sources[c] for c in columns])
            found.double()
        found.add(level)
        if row.divisor:
            found.divide(row.divisor)
        if not fits:
            np.copyto(target, spare[: target.nbytes])


class _Sum:
    """A block that is being computed, from nothing: one field element a byte."""

    def __init__(self, memory: Bytes, count: int, carry: Bytes, aside: Bytes) -> None:
        """Compute the first `count` bytes of `memory`. All are of the same whole lanes."""
        self._bytes, self._signed = memory, memory.view(np.int8)
        self._lanes, self._count = memory.view(np.uint16), count
        self._carry, self._carry_lanes = carry, carry.view(np.uint16)
        self._aside = aside
        self._empty = True

    def add(self, sources: Sequence[Bytes]) -> None:
        """Add shards, byte by byte."""
        out = self._bytes[: self._count]
        if self._empty and sources:
            self._empty = False
            if len(sources) > 1:
                np.bitwise_xor(sources[0], sources[1], out)
            else:
                np.copyto(out, sources[0])
            sources = sources[2:]
        elif self._empty:
            out.fill(0)
        for source in sources:
            np.bitwise_xor(out, source, out)

    def put_aside(self) -> Bytes:
        """What has been computed, valid until `divide`; then begin anew."""
        self._empty = True
        np.copyto(self._aside, self._bytes)
        return self._aside[: self._count]

    def double(self) -> None:
        """Multiply by 2."""
        self._carry_negative(_CARRY)
        np.add(self._bytes, self._bytes, self._bytes)
        np.bitwise_xor(self._bytes, self._carry, self._bytes)

    def halve(self) -> None:
        """Divide by 2."""
        self._carry_bit(self._bytes, 0, _BORROW)
        np.right_shift(self._lanes, _LANES[1], self._lanes)
        np.bitwise_and(self._bytes, _BYTES[0x7F], self._bytes)
        np.bitwise_xor(self._bytes, self._carry, self._bytes)

    def divide(self, divisor: int) -> None:
        """Divide by 1 + x^d.

        With t = v (1 + x^d + x^2d + ...) less what leaves the byte, t (1 + x^d) is v and the
        highest d bits of t, moved up by d. So t with that divided, a constant for each bit, is
        what is wanted.
        """
        for shift in shifts(divisor):
            self._carry_shifted(shift)
            np.bitwise_xor(self._bytes, self._carry, self._bytes)
        value = multiply(_CARRY, inverse(1 ^ 1 << divisor))
        if divisor > 1:
            np.copyto(self._aside, self._bytes)
        for bit in range(8 - divisor, 8):
            if divisor > 1:
                self._carry_bit(self._aside, bit, value)
            else:
                self._carry_negative(value)
            np.bitwise_xor(self._bytes, self._carry, self._bytes)
            value = multiply(value, 2)

    def _carry_shifted(self, shift: int) -> None:
        """Carry each byte moved up, less what leaves it."""
        np.add(self._bytes, self._bytes, self._carry)
        if shift < 4:
            for _ in range(shift - 1):
                np.add(self._carry, self._carry, self._carry)
        else:
            np.left_shift(self._carry_lanes, _LANES[shift - 1], self._carry_lanes)
            np.bitwise_and(self._carry, _BYTES[0xFF << shift & 0xFF], self._carry)

    def _carry_negative(self, value: int) -> None:
        """Carry `value` wherever the highest bit is set."""
        np.less(self._signed, _ZERO, self._carry.view(np.bool_))
        np.multiply(self._carry_lanes, _LANES[value], self._carry_lanes)

    def _carry_bit(self, memory: Bytes, bit: int, value: int) -> None:
        """Carry `value` wherever a bit of `memory` is set."""
        np.bitwise_and(memory, _BYTES[1 << bit], self._carry)
        if bit:
            np.right_shift(self._carry_lanes, _LANES[bit], self._carry_lanes)
        np.multiply(self._carry_lanes, _LANES[value], self._carry_lanes)
