"""Sequence: which tokens each rank holds, and which of them may see which. Pure.

Under a causal mask the last tokens see everything and the first nothing: cut in order, the last
rank would do twice the mean. In *zigzag* order rank r holds the r-th of 2n pieces from the front
and the r-th from the back, and all ranks do the same (Llama 3; zhuzilin/ring-flash-attention).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ftkit.collectives.overlap.parts import bounds

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a sequence of any length is divided; pieces may be uneven, and empty."""

    length: int
    size: int
    """Ranks."""
    zigzag: bool = False

    def spans(self, rank: int) -> Spans:
        """The tokens of a rank: start and end of one run or two, in order."""
        if not self.zigzag:
            return (bounds(self.length, self.size, rank),)
        return tuple(
            bounds(self.length, 2 * self.size, i) for i in (rank, 2 * self.size - 1 - rank)
        )

    def tokens(self, rank: int) -> int:
        """How many they are."""
        return sum(end - start for start, end in self.spans(rank))

    def take(self, whole: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
        """A rank's part of a tensor that has the whole sequence in `dim`; contiguous."""
        if whole.shape[dim] != self.length:
            raise ValueError(f"dimension {dim} has {whole.shape[dim]} tokens, not {self.length}")
        runs = [whole.narrow(dim, start, end - start) for start, end in self.spans(rank)]
        return torch.cat(runs, dim).contiguous()

    def join(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """The inverse: the whole, from the parts of all ranks in order."""
        runs = dict[int, torch.Tensor]()
        for rank, part in enumerate(parts):
            at = 0
            for start, end in self.spans(rank):
                if start < end:
                    runs[start] = part.narrow(dim, at, end - start)
                at += end - start
        ordered = [runs[start] for start in sorted(runs)]
        return torch.cat(ordered, dim) if ordered else parts[0]


@dataclass(frozen=True, slots=True)
class Block:
    """Queries that see keys: all of them, or, on the diagonal, those not after themselves."""

    queries: slice
    keys: slice
    diagonal: bool = False


def blocks(queries: Spans, keys: Spans, *, causal: bool) -> Iterator[Block]:
    """What the queries of one rank see of another's keys, in as few blocks as there are.

    Args:
      queries: spans of tokens.
      keys: spans of tokens; the same as `queries`, or none of them in common.
      causal: whether a query sees only what is not after it.

    Yields:
      Places in the parts of the ranks; together they are the last of the queries, or none.
    """
    rows, columns = (sum(end - start for start, end in spans) for spans in (queries, keys))
    if not rows or not columns:
        return
    if not causal:
        yield Block(slice(0, rows), slice(0, columns))
        return
    if queries == keys:
        yield Block(slice(0, rows), slice(0, columns), diagonal=True)
        return
    at, begun, seen = 0, 0, 0
    for start, end in queries:
        before = sum(e - s for s, e in keys if s < start)
        if start == end:
            continue
        if before != seen:
            if seen and at > begun:
                yield Block(slice(begun, at), slice(0, seen))
            begun, seen = at, before
        at += end - start
    if seen and at > begun:
        yield Block(slice(begun, at), slice(0, seen))
