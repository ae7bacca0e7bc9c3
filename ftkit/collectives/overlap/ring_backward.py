"""Backward of context-parallel attention, by each route.

Sums over ranks are added up in float32 (float64 for float64). On the rings they also travel so; what
ALLGATHER and QUERY send back, one term a rank, is rounded to the dtype of the input first.
"""

from collections.abc import Generator, Iterable

import torch

from ftkit.collectives.overlap.attend import attend_backward, sum_dtype
from ftkit.collectives.overlap.flights import Flights
from ftkit.collectives.overlap.lanes import Lane, pack, unpack
from ftkit.collectives.overlap.parts import sources
from ftkit.collectives.overlap.ring_forward import LANE, Plan, Track, gathered, tracks
from ftkit.collectives.overlap.routes import Rotate
from ftkit.collectives.overlap.sequence import Block

Tensor = torch.Tensor
Gradients = tuple[Tensor, Tensor, Tensor]


def backward(
    flights: Flights,
    rotate: Rotate,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
) -> Gradients:
    """Gradients of this rank's q, k and v, in their dtype. Blocks."""
    match rotate:
        case Rotate.QUERY:
            found = _queries_round(flights, grad, q, k, v, out, lse, plan)
        case Rotate.ALLGATHER:
            found = _everybody(flights, grad, q, k, v, out, lse, plan)
        case _:
            found = _keys_round(flights, rotate, grad, q, k, v, out, lse, plan)
    of_q, of_k, of_v = found
    return of_q.to(q.dtype), of_k.to(k.dtype), of_v.to(v.dtype)


def _keys_round(
    flights: Flights,
    rotate: Rotate,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
) -> Gradients:
    made = zeros(q), zeros(k), zeros(v)
    rings = []
    for track in tracks(rotate, q, k):
        some = [t[:, track.heads] for t in (grad, q, out, lse)]
        kv = k[:, track.kv_heads], v[:, track.kv_heads]
        into = made[0][:, track.heads], made[1][:, track.kv_heads], made[2][:, track.kv_heads]
        rings.append(_ring(flights, track, some, kv, plan, into))
    # Turn by turn, so that the messages of all directions are under way together.
    while rings:
        rings = [ring for ring in rings if next(ring, None)]
    return made


def _ring(
    flights: Flights,
    track: Track,
    some: list[Tensor],
    kv: tuple[Tensor, Tensor],
    plan: Plan,
    into: Gradients,
) -> Generator[bool, None, None]:
    """One direction. Keys and values go round, and behind them the sum of their gradients.

    Our own part of the sum stays here until what the others added comes home.
    """
    rank, size, direction = flights.rank, flights.size, track.direction
    (grad, q, out, lse), (k, v) = some, kv
    dtype = sum_dtype(k.dtype)

    def shape(step: int) -> torch.Size:
        origin = (rank - direction * step) % size
        return torch.Size((*k.shape[:2], plan.keys.tokens(origin), k.shape[3]))

    keys_lane = Lane(
        flights,
        lambda step: k.new_empty(2 * shape(step + 1).numel()),
        direction=direction,
        steps=size - 1,
        tag=track.tag,
    )
    sums_lane = Lane(
        flights,
        lambda step: torch.empty(2 * shape(step + 2).numel(), dtype=dtype),
        direction=direction,
        steps=size - 1,
        tag=track.tag + LANE,
    )
    message = pack(k, v)
    for step in range(size):
        if step < size - 1:
            keys_lane.send(message)
        yield True
        keys, values = unpack(message, *[shape(step)] * 2)
        local = zeros(q), zeros(keys), zeros(values)
        _add(
            local,
            grad,
            q,
            keys,
            values,
            out,
            lse,
            plan,
            plan.seen(rank, (rank - direction * step) % size),
        )
        into[0].add_(local[0])
        if step == 0:
            into[1].add_(local[1])
            into[2].add_(local[2])
        else:
            mine = pack(local[1], local[2])
            sums_lane.send(mine if step == 1 else sums_lane.receive().add_(mine))
        if step < size - 1:
            message = keys_lane.receive()
    yield True
    if size > 1:
        of_k, of_v = unpack(sums_lane.receive(), k.shape, v.shape)
        into[1].add_(of_k)
        into[2].add_(of_v)


def _queries_round(
    flights: Flights,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
) -> Gradients:
    """Keys stay, and so do their gradients; those of queries go straight back to their owner."""
    rank, size = flights.rank, flights.size

    def shape(origin: int) -> torch.Size:
        return torch.Size((*q.shape[:2], plan.queries.tokens(origin), q.shape[3]))

    lane = Lane(
        flights,
        lambda step: q.new_empty(3 * shape((rank - step - 1) % size).numel()),
        direction=1,
        steps=size - 1,
        tag=0,
    )
    lse_lane = Lane(
        flights,
        lambda step: lse.new_empty(shape((rank - step - 1) % size)[:3]),
        direction=1,
        steps=size - 1,
        tag=LANE,
    )
    back = [
        flights.recv(torch.empty_like(q), (rank + step) % size, 2 * LANE + step)
        for step in range(1, size if q.numel() else 1)
    ]
    made = zeros(q), zeros(k), zeros(v)
    message, theirs = pack(q, grad, out), lse.contiguous()
    for step in range(size):
        if step < size - 1:
            lane.send(message)
            lse_lane.send(theirs)
        origin = (rank - step) % size
        some_q, some_grad, some_out = unpack(message, *[shape(origin)] * 3)
        of_q = made[0] if origin == rank else zeros(some_q)
        seen = plan.seen(origin, rank)
        _add((of_q, made[1], made[2]), some_grad, some_q, k, v, some_out, theirs, plan, seen)
        if origin != rank and of_q.numel():
            flights.send(of_q.to(q.dtype), origin, 2 * LANE + step)
        if step < size - 1:
            message, theirs = lane.receive(), lse_lane.receive()
    for flight in back:
        made[0].add_(flight.wait())
    return made


def _everybody(
    flights: Flights,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
) -> Gradients:
    """Keys and values from everybody; their gradients back to each, who adds them up."""
    rank, size = flights.rank, flights.size
    mine = k.new_empty(0)
    back = {
        source: flights.recv(k.new_empty(2 * k.numel()), source, LANE)
        for source in (sources(size, rank) if k.numel() else ())
    }
    of_q = zeros(q)
    for source, keys, values in gathered(flights, k, v, plan):
        local = of_q, zeros(keys), zeros(values)
        _add(local, grad, q, keys, values, out, lse, plan, plan.seen(rank, source))
        sums = pack(local[1], local[2])
        if source == rank:
            mine = sums
        elif sums.numel():
            flights.send(sums.to(k.dtype), source, LANE)
    # In the order of ranks, whoever is first.
    total = torch.zeros_like(mine)
    for source in range(size):
        if source == rank:
            total += mine
        elif source in back:
            total += back[source].wait()
    of_k, of_v = unpack(total, k.shape, v.shape)
    return of_q, of_k, of_v


def _add(
    into: Gradients,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    seen: Iterable[Block],
) -> None:
    for block in seen:
        rows, columns = block.queries, block.keys
        parts = attend_backward(
            grad[:, :, rows],
            q[:, :, rows],
            k[:, :, columns],
            v[:, :, columns],
            out[:, :, rows],
            lse[:, :, rows],
            diagonal=block.diagonal,
            scale=plan.scale,
        )
        for whole, where, part in zip(into, (rows, columns, columns), parts, strict=True):
            whole[:, :, where].add_(part)


def zeros(like: Tensor) -> Tensor:
    """A sum of nothing yet."""
    return torch.zeros(like.shape, dtype=sum_dtype(like.dtype))
