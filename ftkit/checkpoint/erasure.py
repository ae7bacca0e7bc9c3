"""Erasure coding: m parity shards for k data shards; any k of the k + m give all the others.

The arithmetic is done in place on whatever memory the shards lie in, by ISA-L where one is
found and computes rightly, else by numpy. Both write the same bytes (`galois` says which), so
nodes of a job may differ.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import cache, partial
from itertools import pairwise
from typing import Protocol

import numpy as np

from ftkit.checkpoint.galois import Matrix, generator, recipe
from ftkit.checkpoint.isal import Tables, load
from ftkit.checkpoint.planes import Planes
from ftkit.checkpoint.raw import Bytes, Memory, flat
from ftkit.core.errors import IntegrityError, UsageError

logger = logging.getLogger(__name__)


class Engine(StrEnum):
    """Who does the arithmetic."""

    ISAL = "isa-l"
    NUMPY = "numpy"


class Codec:
    """The code k + m. Shards 0 to k - 1 are data, k to k + m - 1 parity.

    Shards are contiguous memory of any kind and alignment. Parity shards are all of one length,
    the stripe's; a data shard may be shorter and counts as if zeros followed. Immutable: any
    thread may call, the calls block for the time of the arithmetic and release the GIL.
    """

    def __init__(self, k: int, m: int, engine: Engine | None = None) -> None:
        """Choose the code; `engine` forces one.

        Raises:
          ValueError: no such code (`galois.generator`).
          UsageError: ISA-L was asked for, and there is none that works.
        """
        self._code = generator(k, m)
        self.k = k
        self.m = m
        self.engine = best_engine() if engine is None else engine
        """Who does the arithmetic."""
        if engine is Engine.ISAL and best_engine() is not Engine.ISAL:
            raise UsageError(
                "no working ISA-L on this machine: install pyeclib (Linux), or leave the engine "
                "to ftkit"
            )
        self._ready = _engines()[self.engine]

    def encode(self, data: Sequence[Memory], parity: Sequence[Memory]) -> None:
        """Compute all parity shards.

        Args:
          data: k buffers, read and not kept.
          parity: m writable buffers of one length, no shorter than any of `data`, overlapping
            nothing. Whatever they held is overwritten.

        Raises:
          ValueError: numbers or lengths are wrong, or a buffer is not contiguous or read-only;
            nothing was written.
        """
        if len(data) != self.k or len(parity) != self.m:
            raise ValueError(
                f"code {self.k}+{self.m} takes {self.k} data and {self.m} parity shards, not "
                f"{len(data)} and {len(parity)}"
            )
        sources, targets = [flat(d) for d in data], _writable(dict(enumerate(parity, self.k)))
        self._check_lengths(dict(enumerate(sources)), targets)
        _multiply(self._ready, self._code, sources, [*targets.values()])

    def rebuild(self, shards: Mapping[int, Memory], lost: Mapping[int, Memory]) -> None:
        """Compute lost shards, data or parity, from any k others.

        Args:
          shards: what is left, by number; read and not kept. Their bytes must have been
            checked: a wrong one makes all results wrong.
          lost: writable buffers of the true lengths, by number, overlapping nothing.

        Raises:
          IntegrityError: fewer than k shards are left; nothing was written.
          ValueError: a number or length is wrong, or a buffer is not contiguous or read-only;
            nothing was written.
        """
        total = self.k + self.m
        for shard in (*shards, *lost):
            if not 0 <= shard < total:
                raise ValueError(f"code {self.k}+{self.m} has no shard {shard}")
        if both := shards.keys() & lost.keys():
            raise ValueError(f"shards {sorted(both)} are given, and to be computed")
        if len(shards) < self.k:
            raise IntegrityError(
                f"{len(shards)} shards of a stripe {self.k}+{self.m} are left and {self.k} are "
                f"needed: lost are {[i for i in range(total) if i not in shards]}; fall back to "
                "an older step or to disk"
            )
        sources, targets = {i: flat(s) for i, s in shards.items()}, _writable(lost)
        self._check_lengths(sources, targets)
        if targets:
            read, matrix = recipe(self.k, self.m, sources, [*targets])
            _multiply(self._ready, matrix, [sources[i] for i in read], [*targets.values()])

    def _check_lengths(self, sources: Mapping[int, Bytes], targets: Mapping[int, Bytes]) -> None:
        every = {**sources, **targets}
        lengths = {i: s.nbytes for i, s in every.items() if i >= self.k}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"parity shards of one stripe differ in length: {lengths} bytes")
        # Without parity all data is at hand, and nothing is computed from its length.
        stripe = max(lengths.values(), default=None)
        for shard, memory in every.items():
            if shard < self.k and stripe is not None and memory.nbytes > stripe:
                raise ValueError(
                    f"data shard {shard} has {memory.nbytes} bytes, the stripe's parity {stripe}"
                )


@cache
def best_engine() -> Engine:
    """The fastest engine that computes rightly here; says once when that is not ISA-L."""
    if Engine.ISAL not in _engines():
        logger.warning("no ISA-L on this machine, parity is computed by numpy: install pyeclib")
        return Engine.NUMPY
    if not _computes_rightly(_engines()[Engine.ISAL]):
        logger.warning("ISA-L computes wrong parity on this machine; numpy does it instead")
        return Engine.NUMPY
    return Engine.ISAL


class _Multiplier(Protocol):
    def multiply(self, sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None: ...


_Ready = Callable[[Matrix], _Multiplier]


@cache
def _engines() -> dict[Engine, _Ready]:
    library = load()
    isal: dict[Engine, _Ready] = {Engine.ISAL: partial(Tables, library)} if library else {}
    return {Engine.NUMPY: Planes, **isal}


def _computes_rightly(ready: _Ready) -> bool:
    """Whether an engine encodes and rebuilds 4 KiB as numpy does, for each kind of matrix."""
    for k, m in ((3, 1), (4, 2), (5, 3)):
        # Odd length and address: the ends of vector loops are where code differs.
        data = [np.arange(i, i + 4095, dtype=np.uint32).astype(np.uint8)[i:] for i in range(k)]
        code, stripe = generator(k, m), 4095
        found, right = (np.zeros((m, stripe), dtype=np.uint8) for _ in range(2))
        _multiply(ready, code, data, [*found])
        _multiply(Planes, code, data, [*right])
        read, matrix = recipe(k, m, range(m, k + m), range(m))
        back = [np.empty_like(d) for d in data[:m]]
        _multiply(ready, matrix, [[*data, *found][i] for i in read], back)
        if not np.array_equal(found, right):
            return False
        if not all(np.array_equal(b, d) for b, d in zip(back, data[:m], strict=True)):
            return False
    return True


def _multiply(
    ready: _Ready, matrix: Matrix, sources: Sequence[Bytes], targets: Sequence[Bytes]
) -> None:
    """Set targets = matrix x sources, where what is shorter counts as followed by zeros."""
    ends = sorted({memory.nbytes for memory in (*sources, *targets)})
    for low, high in pairwise([0, *ends]):
        # In each stretch the same shards have bytes: those that ended add nothing.
        rows = [row for row, target in enumerate(targets) if target.nbytes > low]
        columns = [column for column, source in enumerate(sources) if source.nbytes > low]
        out = [targets[row][low:high] for row in rows]
        if rows and columns:
            part = tuple(tuple(matrix[row][column] for column in columns) for row in rows)
            ready(part).multiply([sources[column][low:high] for column in columns], out)
        else:
            for target in out:
                target.fill(0)


def _writable(buffers: Mapping[int, Memory]) -> dict[int, Bytes]:
    found = {shard: flat(memory) for shard, memory in buffers.items()}
    for shard, memory in found.items():
        if not memory.flags.writeable:
            raise ValueError(f"shard {shard} is to be computed into memory that is read-only")
    return found
