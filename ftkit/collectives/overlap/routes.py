"""Routes: what travels for context-parallel attention, in bytes; and the cheapest way. Pure.

Of a step round the ring, in units of one rank's queries (Hq heads), keys and values Hkv/Hq each:

                        forward                         backward
                 busiest direction     all       busiest direction     all
    kv               2 Hkv/Hq       2 Hkv/Hq         4 Hkv/Hq       4 Hkv/Hq
    bidirectional      Hkv/Hq       2 Hkv/Hq         2 Hkv/Hq       4 Hkv/Hq
    query                 1             2                3              4
    allgather        2 Hkv/Hq       2 Hkv/Hq         4 Hkv/Hq       4 Hkv/Hq
      on a mesh      the same over n-1: every message has a wire of its own

TokenRing (arXiv 2412.20501) is "query": queries go one way, outputs straight back to their owner
the other. With as many key heads as query heads it halves the busiest direction, and so do two
rings of keys and values that turn against each other, each with half of the heads; with grouped
heads the latter moves less by the size of the groups. Queries win where there are few of them.
"""

from dataclasses import dataclass
from enum import StrEnum


class Rotate(StrEnum):
    """What goes round."""

    KV = "kv"
    """Keys and values, one way."""
    BIDIRECTIONAL = "bidirectional"
    """Keys and values, half of the heads each way."""
    QUERY = "query"
    """Queries one way, outputs straight back."""
    ALLGATHER = "allgather"
    """Keys and values, from everybody to everybody at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """What one rank holds, on average."""

    size: int
    """Ranks."""
    queries: int
    """Tokens times batch."""
    keys: int
    heads: int
    kv_heads: int
    width: int
    """Of a head."""
    item: int
    """Bytes of an element."""
    sum_item: int
    """Bytes of an element of a sum over ranks."""
    mesh: bool = False
    """Whether every two ranks have a wire of their own, rather than each rank one port."""


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """Bytes of one step from each rank."""

    busiest: float
    """In the direction that carries more."""
    total: float


def load(rotate: Rotate, shapes: Shapes, *, backward: bool) -> Load:
    """What one step moves."""
    q = shapes.queries * shapes.heads * shapes.width * shapes.item
    lse = shapes.queries * shapes.heads * 4
    kv = 2 * shapes.keys * shapes.kv_heads * shapes.width * shapes.item
    summed = kv * shapes.sum_item // shapes.item
    match rotate:
        case Rotate.KV:
            moved = kv + summed if backward else kv
            return Load(moved, moved)
        case Rotate.ALLGATHER:
            moved = 2 * kv if backward else kv
            return Load(moved / max(1, shapes.size - 1) if shapes.mesh else moved, moved)
        case Rotate.BIDIRECTIONAL:
            moved = kv + summed if backward else kv
            larger = -(-shapes.kv_heads // 2) / shapes.kv_heads
            return Load(moved * larger, moved)
        case Rotate.QUERY:
            out, back = (3 * q + lse, q) if backward else (q, q + lse)
            return Load(max(out, back), out + back)


def cheapest(shapes: Shapes, *, backward: bool) -> Rotate:
    """The route whose busiest direction carries least; of equal ones the one that is simpler.

    A world of two has one neighbour in both directions, and with one port for both directions
    they are no gain, but no loss either.

    ALLGATHER is considered on a mesh, where it uses n-1 wires at once. It holds the keys and values of
    all n ranks (in backward also those gradients of theirs that are on their way), where a ring holds
    those of two or three. On one port its bytes are those of KV, and it would only cost that memory.
    """
    choices = [Rotate.KV, Rotate.QUERY]
    if shapes.size > 2 and shapes.kv_heads > 1:
        choices.insert(1, Rotate.BIDIRECTIONAL)
    if shapes.mesh and shapes.size > 2:
        choices.append(Rotate.ALLGATHER)
    return min(choices, key=lambda rotate: load(rotate, shapes, backward=backward))
