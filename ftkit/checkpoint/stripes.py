"""Stripes: which node keeps which parity of whose data (pure).

RAIM5, from REFT (arXiv 2310.12670), with m parity shards in place of one. The nodes of a group
of k + m cut their data into k pieces each, and there are k + m stripes; in each stripe other m
nodes keep parity, and each of the rest gives a piece::

    2+1         node 0   node 1   node 2        a, b, c: data of nodes 0, 1, 2
    stripe 0    P        b0       c0
    stripe 1    a0       P        c1
    stripe 2    a1       b1       P

So no node is special: each keeps and computes m parity shards, and any m nodes may vanish.
Pieces of unequal length count as followed by zeros (`erasure.Codec`), which are neither stored
nor sent. How the lost is computed from the rest: `rebuild`.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from ftkit.checkpoint.chunks import CHUNK_BYTES, chunk_count
from ftkit.core.errors import UsageError
from ftkit.core.ids import NodeId

#: Shards of a stripe: GF(256) has no more points.
SHARDS_MAX = 255


class Code(NamedTuple):
    """What `--parity k+m` says."""

    k: int
    """Data shards of a stripe, at least."""
    m: int
    """Parity shards: the nodes of a group that may vanish together."""

    @classmethod
    def parse(cls, text: str) -> "Code | None":
        """Read "k+m"; None for "", and for m = 0: no parity is kept.

        Raises:
          UsageError: it says something else, or more than there are codes for.
        """
        if not text:
            return None
        match = re.fullmatch(r"(\d{1,3})\+(\d{1,3})", text)
        if match is None:
            raise UsageError(f"--parity is k+m, such as 4+1 or 4+2, not {text!r}")
        code = cls(int(match[1]), int(match[2]))
        if code.m and (code.k < 1 or sum(code) > SHARDS_MAX):
            raise UsageError(f"--parity {text}: k is at least 1, and k + m at most {SHARDS_MAX}")
        return code if code.m else None

    def check_nodes(self, nodes: int) -> None:
        """UsageError, with advice, unless so many nodes suffice."""
        k, m = self
        if nodes >= k + m:
            return
        if nodes < 2:
            advice = "turn parity off or add nodes, for a single node has nobody to keep it"
        else:
            fewer = min(m, nodes - 1)
            advice = f"ask for {nodes - fewer}+{fewer}, or add {k + m - nodes} nodes"
        raise UsageError(f"parity {k}+{m} needs {k + m} nodes and there are {nodes}: {advice}")


class Place(NamedTuple):
    """A shard's place: its stripe's number in the plan, and its own in the stripe."""

    stripe: int
    shard: int


@dataclass(frozen=True, slots=True)
class Span:
    """`count` bytes from byte `at` of one of a node's parts."""

    part: int
    at: int
    count: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One data shard: spans of a node's parts, one after the other. May be empty."""

    node: NodeId
    spans: tuple[Span, ...]

    @property
    def count(self) -> int:
        """Its bytes."""
        return sum(span.count for span in self.spans)


@dataclass(frozen=True, slots=True)
class Stripe:
    """Shards that share parity, each on a node of its own."""

    data: tuple[Piece, ...]
    """Shards 0 to k - 1."""
    parity: tuple[NodeId, ...]
    """Who keeps shards k to k + m - 1, each of them `length` bytes."""

    @property
    def length(self) -> int:
        return max(piece.count for piece in self.data)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        """Who keeps each shard, by its number."""
        return (*(piece.node for piece in self.data), *self.parity)

    def shard_bytes(self, shard: int) -> int:
        return self.data[shard].count if shard < len(self.data) else self.length


@dataclass(frozen=True, slots=True)
class StripePlan:
    """All stripes of one snapshot. The same wherever it is computed from the same sizes."""

    groups: tuple[tuple[NodeId, ...], ...]
    stripes: tuple[Stripe, ...]
    m: int
    """Nodes of each group that may vanish together."""

    def kept(self, node: NodeId) -> tuple[Place, ...]:
        """The parity shards that a node keeps."""
        return tuple(
            Place(number, shard)
            for number, stripe in enumerate(self.stripes)
            for shard, keeper in enumerate(stripe.parity, len(stripe.data))
            if keeper == node
        )

    def parity_bytes(self, node: NodeId) -> int:
        """Parity of one snapshot on a node: m/k of its data, where all nodes hold as much."""
        return sum(self.stripes[place.stripe].length for place in self.kept(node))

    def holders(
        self, lost: Collection[NodeId] = (), damaged: Collection[Place] = ()
    ) -> dict[Place, NodeId]:
        """Who holds which shard, less nodes that are gone and shards that are corrupt."""
        return {
            place: node
            for number, stripe in enumerate(self.stripes)
            for shard, node in enumerate(stripe.nodes)
            if (place := Place(number, shard)) not in damaged and node not in lost
        }


def plan_stripes(
    parts: Mapping[NodeId, Sequence[int]], k: int, m: int, *, align: int = CHUNK_BYTES
) -> StripePlan:
    """Place the parity of one snapshot.

    Where k + m does not divide the number of nodes, groups are larger, by a larger k and the
    same m. Memory then stays below m/k and every group survives m losses; the price is that a
    group has more nodes of which m + 1 may vanish, and that a rebuild reads more. A smaller k
    for the rest would break the promise on memory instead.

    Args:
      parts: bytes of each sealed part on each node; a node may hold none, and then keeps
        parity only.
      k: data shards of a stripe, at least.
      m: parity shards, which is how many nodes of a group may vanish.
      align: parts are cut at multiples of so many bytes: chunks of the arena, whose digests
        then check a piece by itself.

    Raises:
      UsageError: fewer nodes than k + m.
      ValueError: k, m or align is less than 1, or a size negative.
    """
    if k < 1 or m < 1 or align < 1:
        raise ValueError(f"there are no stripes of {k}+{m} shards of {align} bytes")
    if any(size < 0 for sizes in parts.values() for size in sizes):
        raise ValueError(f"parts of negative size: {dict(parts)}")
    groups = deal(parts, Code(k, m))
    stripes = (s for group in groups for s in _rotate(group, parts, m, align))
    return StripePlan(groups=groups, stripes=tuple(stripes), m=m)


def deal(nodes: Iterable[NodeId], code: Code) -> tuple[tuple[NodeId, ...], ...]:
    """The groups: each of k + m nodes or more, and of fewer than 2 (k + m).

    Nodes are dealt like cards: neighbours in the order of ids, who tend to share a rack, sit in
    different groups. UsageError when there are fewer than k + m.
    """
    ordered = sorted(nodes)
    code.check_nodes(len(ordered))
    count = len(ordered) // sum(code)
    return tuple(tuple(ordered[first::count]) for first in range(count))


def _rotate(
    group: Sequence[NodeId], parts: Mapping[NodeId, Sequence[int]], m: int, align: int
) -> Iterator[Stripe]:
    """The stripes of one group, as many as it has nodes."""
    size = len(group)
    left = {node: iter(_pieces(node, parts[node], size - m, align)) for node in group}
    for number in range(size):
        keepers = tuple(group[(number + i) % size] for i in range(m))
        data = tuple(next(left[node]) for node in group if node not in keepers)
        yield Stripe(data, keepers)


def _pieces(node: NodeId, parts: Sequence[int], k: int, align: int) -> list[Piece]:
    """A node's data in k pieces, as even as whole chunks allow."""
    ends = [0, *accumulate(chunk_count(size, align) for size in parts)]
    bounds = [ends[-1] * i // k for i in range(k + 1)]
    return [Piece(node, tuple(_spans(parts, ends, *cut, align))) for cut in pairwise(bounds)]


def _spans(
    parts: Sequence[int], ends: Sequence[int], first: int, end: int, align: int
) -> Iterator[Span]:
    """Chunks `first` to `end`, counted through all parts, as spans."""
    for part, (start, stop) in enumerate(pairwise(ends)):
        low, high = max(first, start) - start, min(end, stop) - start
        if low < high:
            yield Span(part, low * align, min(high * align, parts[part]) - low * align)
