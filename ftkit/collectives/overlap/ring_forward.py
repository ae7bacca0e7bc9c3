"""Forward of context-parallel attention, by each route: this rank's queries over all keys."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

import torch

from ftkit.collectives.overlap.attend import Merged, attend, sum_dtype
from ftkit.collectives.overlap.flights import Flight, Flights
from ftkit.collectives.overlap.lanes import Lane, pack, unpack
from ftkit.collectives.overlap.parts import sources, targets
from ftkit.collectives.overlap.routes import Rotate
from ftkit.collectives.overlap.sequence import Block, Layout, blocks

Tensor = torch.Tensor

#: Tags of the lanes of one operation lie so far apart: a step each.
LANE = 1 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One attention: who holds what, and what is seen."""

    queries: Layout
    keys: Layout
    causal: bool
    scale: float

    def seen(self, rank: int, other: int) -> Iterable[Block]:
        """What the queries of `rank` see of the keys of `other`."""
        spans = self.queries.spans(rank), self.keys.spans(other)
        return blocks(*spans, causal=self.causal)


@dataclass(frozen=True, slots=True)
class Track:
    """Some heads, and the direction in which their keys and values go round."""

    direction: int
    heads: slice
    kv_heads: slice
    tag: int = field(default=0)


def tracks(rotate: Rotate, q: Tensor, k: Tensor) -> list[Track]:
    """One way with all heads, or both with half of them each."""
    heads, kv_heads = q.shape[1], k.shape[1]
    if rotate is not Rotate.BIDIRECTIONAL or kv_heads < 2:
        return [Track(1, slice(0, heads), slice(0, kv_heads))]
    half, group = -(-kv_heads // 2), heads // kv_heads
    return [
        Track(1, slice(0, half * group), slice(0, half)),
        Track(-1, slice(half * group, heads), slice(half, kv_heads), 4 * LANE),
    ]


def forward(
    flights: Flights, rotate: Rotate, q: Tensor, k: Tensor, v: Tensor, plan: Plan
) -> tuple[Tensor, Tensor]:
    """Output (B, Hq, Sq, D) in the dtype of `q`, and lse (B, Hq, Sq). Blocks."""
    match rotate:
        case Rotate.QUERY:
            merged = _queries_round(flights, q, k, v, plan)
        case Rotate.ALLGATHER:
            merged = Merged.none(q)
            for source, keys, values in gathered(flights, k, v, plan):
                _see(merged, q, keys, values, plan, plan.seen(flights.rank, source))
        case _:
            merged = _keys_round(flights, rotate, q, k, v, plan)
    return merged.out.to(q.dtype), merged.lse


def gathered(
    flights: Flights, k: Tensor, v: Tensor, plan: Plan
) -> Iterable[tuple[int, Tensor, Tensor]]:
    """Everybody's keys and values: ours at once, and those of the others as they come."""
    rank, size = flights.rank, flights.size
    coming: list[tuple[int, Tensor, Flight | None]] = []
    for source in sources(size, rank):
        into = k.new_empty(2 * _shape(k, plan, source).numel())
        coming.append((source, into, flights.recv(into, source, 0) if into.numel() else None))
    mine = pack(k, v)
    for target in targets(size, rank):
        if mine.numel():
            flights.send(mine, target, 0)
    yield rank, k, v
    for source, into, flight in coming:
        if flight is not None:
            flight.wait()
        keys, values = unpack(into, *[_shape(k, plan, source)] * 2)
        yield source, keys, values


def _keys_round(
    flights: Flights, rotate: Rotate, q: Tensor, k: Tensor, v: Tensor, plan: Plan
) -> Merged:
    merged = Merged.none(q)
    rings = [_ring(flights, track, q, k, v, plan, merged) for track in tracks(rotate, q, k)]
    # Turn by turn, so that the messages of all directions are under way together.
    while rings:
        rings = [ring for ring in rings if next(ring, None)]
    return merged


def _ring(
    flights: Flights, track: Track, q: Tensor, k: Tensor, v: Tensor, plan: Plan, merged: Merged
) -> Generator[bool, None, None]:
    """One direction."""
    rank, size, direction = flights.rank, flights.size, track.direction
    q, k, v = q[:, track.heads], k[:, track.kv_heads], v[:, track.kv_heads]
    some = merged.of(track.heads)
    lane = Lane(
        flights,
        lambda step: k.new_empty(
            2 * _shape(k, plan, (rank - direction * (step + 1)) % size).numel()
        ),
        direction=direction,
        steps=size - 1,
        tag=track.tag,
    )
    message = pack(k, v)
    for step in range(size):
        if step < size - 1:
            lane.send(message)
        yield True
        origin = (rank - direction * step) % size
        keys, values = unpack(message, *[_shape(k, plan, origin)] * 2)
        _see(some, q, keys, values, plan, plan.seen(rank, origin))
        yield True
        if step < size - 1:
            message = lane.receive()


def _queries_round(flights: Flights, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Merged:
    """TokenRing: keys stay. What was made of somebody's queries goes straight back to him."""
    rank, size = flights.rank, flights.size

    def shape(origin: int) -> torch.Size:
        return torch.Size((*q.shape[:2], plan.queries.tokens(origin), q.shape[3]))

    lane = Lane(
        flights,
        lambda step: q.new_empty(shape((rank - step - 1) % size)),
        direction=1,
        steps=size - 1,
        tag=0,
    )
    back = []
    for step in range(1, size):
        other = (rank + step) % size
        for rows in _rows(plan.seen(rank, other)):
            count = rows.stop - rows.start
            out = q.new_empty(*q.shape[:2], count, q.shape[3])
            lse = torch.empty(*q.shape[:2], count, dtype=sum_dtype(q.dtype))
            came = [
                flights.recv(out, other, LANE + step),
                flights.recv(lse, other, 2 * LANE + step),
            ]
            back.append((rows, out, lse, came))
    merged, current = Merged.none(q), q.contiguous()
    for step in range(size):
        if step < size - 1:
            lane.send(current)
        origin = (rank - step) % size
        seen = list(plan.seen(origin, rank))
        if origin == rank:
            _see(merged, current, k, v, plan, seen)
        else:
            theirs = Merged.none(current)
            _see(theirs, current, k, v, plan, seen)
            for rows in _rows(seen):
                out = theirs.out[:, :, rows].to(q.dtype).contiguous()
                flights.send(out, origin, LANE + step)
                flights.send(theirs.lse[:, :, rows].contiguous(), origin, 2 * LANE + step)
        if step < size - 1:
            current = lane.receive()
    for rows, out, lse, came in back:
        for flight in came:
            flight.wait()
        merged.add(rows, out, lse)
    return merged


def _see(
    merged: Merged, q: Tensor, k: Tensor, v: Tensor, plan: Plan, seen: Iterable[Block]
) -> None:
    for block in seen:
        merged.add(
            block.queries,
            *attend(
                q[:, :, block.queries],
                k[:, :, block.keys],
                v[:, :, block.keys],
                diagonal=block.diagonal,
                scale=plan.scale,
            ),
        )


def _rows(seen: Iterable[Block]) -> list[slice]:
    """The queries of all blocks, which are one run; none when there is no block."""
    rows = [block.queries for block in seen]
    return [slice(rows[0].start, rows[-1].stop)] if rows else []


def _shape(k: Tensor, plan: Plan, rank: int) -> torch.Size:
    """Of the keys of another rank, with as many heads as these."""
    return torch.Size((*k.shape[:2], plan.keys.tokens(rank), k.shape[3]))
