"""Programs that reduce: all-reduce in three forms, reduce-scatter in two, reduce.

Whatever the form, every element is folded by one rank, or by all in the same order, and
copied from there: all ranks end with the same bits. (For bits that do not depend on the
number of ranks, see `canonical`.)

==================== ===========================================================
small                everyone sends all to everyone and folds in rank order: one round
one host, not large  the same, but shown in staging memory: moves more bytes than the next
                     form, and needs one round of messages less
one host             each rank owns a chunk, folds everybody's piece by piece, and
                     hands each folded piece round (flows)
several hosts        the pipelined ring, in the order that was planned: every byte
                     crosses each edge about twice, and nobody talks to more than two
==================== ===========================================================
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import cast

import torch

from ftkit.collectives import rings
from ftkit.collectives.arithmetic import Bytes, average, bounds, combine, copy
from ftkit.collectives.flows import Handout, Inflow, pieces_of, produce, take_in
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Program, Wait
from ftkit.collectives.planning import look

_FOLD, _RESULT = 0, 1
#: A fold works on this much at a time, so that what it writes again is still in the cache.
FOLD_BYTES = 256 << 10
#: One more round of messages takes as long as moving so many bytes. To show all to all moves, in
#: copies and folds, n + 3 times the data through memory; by chunks it is 5 - 2 / n times.
_HOP_BYTES = 6 << 20
#: A neighbour sends as fast as it can; what comes before it is awaited is copied once more.
_RING_AHEAD = 8


def all_reduce(data: Bytes, dtype: torch.dtype, op_name: str) -> Program:
    """Reduce `data` in place on every rank."""

    def program(op: Op) -> Generator[Wait, None, None]:
        if op.size == 1 or not data.size:
            return
        if op.engine.on_one_host:
            if data.size < op.engine.config.cma_bytes_min:
                yield from _one_round(op, data, dtype, op_name)
            elif data.size * (op.size - 2 + 2 / op.size) <= _HOP_BYTES:
                yield from _shown_to_all(op, data, dtype, op_name)
            else:
                yield from _direct(op, data, dtype, op_name)
        elif data.size <= op.engine.config.exchange_bytes_max:
            yield from _one_round(op, data, dtype, op_name)
        else:
            if op.channel.look_due():
                yield from look(op)
            yield from _ring(op, data, dtype, op_name)

    return program


def reduce_scatter(out: Bytes, ins: Sequence[Bytes], dtype: torch.dtype, op_name: str) -> Program:
    """The reduction of all ranks' `ins[r]` into the `out` of rank r. Inputs stay."""

    def program(op: Op) -> Generator[Wait, None, None]:
        if rings.serve(op, ins):
            yield from rings.reduce_scatter(op, out, ins, dtype, op_name)
            return
        sent: list[Ticket] = []
        for rank in op.others():
            sent += produce(op, rank, ins[rank], _FOLD)
        yield from fold_into(op, out, ins[op.rank], op.others(), dtype, op_name)
        yield sent

    return program


def reduce(data: Bytes, dtype: torch.dtype, op_name: str, root: int) -> Program:
    """The reduction of all `data` into the root's, in place; the others' stay."""

    def program(op: Op) -> Generator[Wait, None, None]:
        if op.rank == root:
            yield from fold_into(op, data, data, op.others(), dtype, op_name)
        else:
            yield produce(op, root, data, _FOLD)

    return program


def fold_into(
    op: Op,
    out: Bytes,
    own: Bytes,
    sources: Sequence[int],
    dtype: torch.dtype,
    op_name: str,
    handout: Handout | None = None,
) -> Generator[Wait, None, None]:
    """Fold: out = own op source op source ...: each sends a chunk as long as `out`.

    `own` may be `out`. With `avg` the sum is divided by the number of ranks. Pieces go to
    `handout` when they are final.
    """
    if not sources and own is not out:
        copy(out, own)
    flows = [Inflow(op, source, out.size, _FOLD) for source in sources]
    for index, target in enumerate(pieces_of(out, op.piece)):
        pieces = {}
        for flow in flows:
            pieces[flow] = yield from flow.piece(index)
        start = index * op.piece
        for at in range(0, target.size, FOLD_BYTES):
            part = target[at : at + FOLD_BYTES]
            value = own[start + at : start + at + part.size]
            for piece in pieces.values():
                combine(op_name, dtype, part, value, piece.view[at : at + FOLD_BYTES])
                value = part
            if op_name == "avg":
                average(dtype, part, op.size)
        for flow, piece in pieces.items():
            flow.done(piece)
        if handout is not None:
            yield from handout.hand(index, target)
        # Others' sockets, and an abort, get their turn between pieces.
        yield None


def _one_round(
    op: Op, data: Bytes, dtype: torch.dtype, op_name: str
) -> Generator[Wait, None, None]:
    mine = data.copy()
    others = op.others()
    sent = [op.send(rank, mine) for rank in others]
    came = {rank: op.recv(rank, None) for rank in others}
    yield [*came.values(), *sent]
    parts = [mine if r == op.rank else cast("Bytes", came[r].data) for r in range(op.size)]
    if any(part.size != data.size for part in parts):
        sizes = [part.size for part in parts]
        raise ValueError(f"ranks reduce different sizes: {sizes} bytes in rank order")
    combine(op_name, dtype, data, parts[0], parts[1])
    for part in parts[2:]:
        combine(op_name, dtype, data, data, part)
    if op_name == "avg":
        average(dtype, data, op.size)


def _shown_to_all(
    op: Op, data: Bytes, dtype: torch.dtype, op_name: str
) -> Generator[Wait, None, None]:
    """Everybody shows a copy of all to all, and folds it in rank order."""
    handout = Handout(op, data, _FOLD, copies=True)
    flows = {rank: Inflow(op, rank, data.size, _FOLD) for rank in op.others()}
    pieces = pieces_of(data, op.piece)
    yield from handout.hand(0, pieces[0])
    for index, target in enumerate(pieces):
        if index + 1 < len(pieces):
            yield from handout.hand(index + 1, pieces[index + 1])
        yield None
        came = {}
        for rank, flow in flows.items():
            came[rank] = yield from flow.piece(index)
        prefix = op.scratch()
        for at in range(0, target.size, FOLD_BYTES):
            part = target[at : at + FOLD_BYTES]
            values = [
                part if rank == op.rank else came[rank].view[at : at + FOLD_BYTES]
                for rank in range(op.size)
            ]
            # Our own value must stay until its turn.
            early = part if op.rank < 2 else prefix[: part.size]
            combine(op_name, dtype, early, values[0], values[1])
            for value in values[2:]:
                into = part if value is part else early
                combine(op_name, dtype, into, early, value)
                early = into
            if op_name == "avg":
                average(dtype, part, op.size)
        op.release(prefix)
        for rank, flow in flows.items():
            flow.done(came[rank])
    yield handout.in_use


def _direct(op: Op, data: Bytes, dtype: torch.dtype, op_name: str) -> Generator[Wait, None, None]:
    chunks = chunks_of(data, dtype, op.size)
    mine = chunks[op.rank]
    came = take_in(op, chunks, _RESULT)
    sent: list[Ticket] = []
    for rank in op.others():
        sent += produce(op, rank, chunks[rank], _FOLD, answered=True)
    handout = Handout(op, mine, _RESULT)
    yield from fold_into(op, mine, mine, op.others(), dtype, op_name, handout)
    yield [*sent, *came, *handout.in_use]


def _ring(op: Op, data: Bytes, dtype: torch.dtype, op_name: str) -> Generator[Wait, None, None]:
    """Reduce-scatter and all-gather as one stream of segments round the ring.

    In turn t we send chunk (place - t) and receive chunk (place - t - 1). What we send from
    turn 1 on is what we received the turn before, so segment j goes out as soon as it came
    in; the pipe is never empty.
    """
    chunks = chunks_of(data, dtype, op.size)
    step = op.segment
    before, after = op.neighbours
    place = op.channel.ring.index(op.rank)

    def segments(chunk: int) -> list[Bytes]:
        return pieces_of(chunks[chunk % op.size], step)

    turns = 2 * op.size - 2
    incoming = [
        (part, turn < op.size - 1, turn == op.size - 2)
        for turn in range(turns)
        for part in segments(place - turn - 1)
    ]
    outgoing = sum(len(segments(place - turn)) for turn in range(turns))
    sent = [op.send(after, part, part=i) for i, part in enumerate(segments(place))]
    ahead: deque[tuple[Ticket, Bytes | None]] = deque()
    posted = 0

    def post() -> None:
        nonlocal posted
        if posted < len(incoming):
            part, folds, _ = incoming[posted]
            buffer = op.scratch() if folds else None
            into = part if buffer is None else buffer[: part.size]
            ahead.append((op.recv(before, into, part=posted), buffer))
            posted += 1

    for _ in range(_RING_AHEAD):
        post()
    for part, _, final in incoming:
        ticket, buffer = ahead.popleft()
        if not ticket.done:
            yield ticket
        if buffer is not None:
            combine(op_name, dtype, part, part, buffer[: part.size])
            op.release(buffer)
            if final and op_name == "avg":
                average(dtype, part, op.size)
        post()
        if len(sent) < outgoing:
            sent.append(op.send(after, part, part=len(sent)))
    yield sent


def chunks_of(data: Bytes, dtype: torch.dtype, count: int) -> list[Bytes]:
    """Even pieces of whole elements, one a rank; some are empty when there are few."""
    limits = bounds(data.size // dtype.itemsize, count)
    return [data[limits[i] * dtype.itemsize : limits[i + 1] * dtype.itemsize] for i in range(count)]
