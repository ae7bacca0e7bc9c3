"""Programs that reduce: all-reduce in three forms, reduce-scatter in two, reduce.

Whatever the form, every element is folded by one rank, or by all in the same order, and
copied from there: all ranks end with the same bits. (For bits that do not depend on the
number of ranks, see `canonical`.)

==================== ===========================================================
small                everyone sends all to everyone and folds in rank order: one round
one host             each rank owns a chunk, reads it from everybody segment by
                     segment (flows), folds, and hands the result round
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
from ftkit.collectives.flows import Inflow, produce
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Program, Wait
from ftkit.collectives.planning import look

_FOLD, _RESULT = 0, 1
_RING_AHEAD = 3


def all_reduce(data: Bytes, dtype: torch.dtype, op_name: str) -> Program:
    """Reduce `data` in place on every rank."""

    def program(op: Op) -> Generator[Wait, None, None]:
        if op.size == 1 or not data.size:
            return
        if data.size <= op.engine.config.exchange_bytes_max:
            yield from _one_round(op, data, dtype, op_name)
        elif op.engine.on_one_host:
            yield from _direct(op, data, dtype, op_name)
        else:
            if op.channel.look_due():
                yield from look(op)
            yield from _ring(op, data, dtype, op_name)

    return program


def reduce_scatter(out: Bytes, ins: Sequence[Bytes], dtype: torch.dtype, op_name: str) -> Program:
    """The reduction of all ranks' `ins[r]` into the `out` of rank r. Inputs stay."""

    def program(op: Op) -> Generator[Wait, None, None]:
        mine = ins[op.rank]
        if rings.serve(op, ins):
            yield from rings.reduce_scatter(op, out, ins, dtype, op_name)
            return
        if out.ctypes.data != mine.ctypes.data:
            copy(out, mine)
        sent: list[Ticket] = []
        for rank in op.others():
            sent += produce(op, rank, ins[rank], _FOLD)
        yield from fold_into(op, out, op.others(), dtype, op_name)
        if op_name == "avg":
            average(dtype, out, op.size)
        yield sent

    return program


def reduce(data: Bytes, dtype: torch.dtype, op_name: str, root: int) -> Program:
    """The reduction of all `data` into the root's, in place; the others' stay."""

    def program(op: Op) -> Generator[Wait, None, None]:
        if op.rank == root:
            yield from fold_into(op, data, op.others(), dtype, op_name)
            if op_name == "avg":
                average(dtype, data, op.size)
        else:
            yield produce(op, root, data, _FOLD)

    return program


def fold_into(
    op: Op, acc: Bytes, sources: Sequence[int], dtype: torch.dtype, op_name: str
) -> Generator[Wait, None, None]:
    """Fold: acc = acc op source op source ...: each sends a chunk as long as `acc`."""
    flows = [Inflow(op, source, acc.size, _FOLD) for source in sources]
    step = op.segment
    for index in range(-(-acc.size // step)):
        target = acc[index * step : (index + 1) * step]
        for flow in flows:
            buffer = yield from flow.segment(index)
            combine(op_name, dtype, target, target, buffer[: target.size])
            flow.done(buffer)
        # Others' sockets, and an abort, get their turn between segments.
        yield None
    for flow in flows:
        flow.finish()


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


def _direct(op: Op, data: Bytes, dtype: torch.dtype, op_name: str) -> Generator[Wait, None, None]:
    chunks = chunks_of(data, dtype, op.size)
    mine = chunks[op.rank]
    sent: list[Ticket] = []
    for rank in op.others():
        sent += produce(op, rank, chunks[rank], _FOLD)
    yield from fold_into(op, mine, op.others(), dtype, op_name)
    if op_name == "avg":
        average(dtype, mine, op.size)
    yield sent
    # A chunk is overwritten only by its owner's result, which the owner sends after it has
    # read the chunk from everybody: nothing that is still wanted is lost.
    yield from share(op, chunks, _RESULT)


def share(op: Op, chunks: Sequence[Bytes], tag: int) -> Generator[Wait, None, None]:
    """Everybody's own chunk to all: `chunks[r]` is final at rank r, and becomes so here."""
    came = [op.recv(rank, chunks[rank], tag=tag) for rank in op.others() if chunks[rank].size]
    mine = chunks[op.rank]
    sent = [op.send(rank, mine, tag=tag) for rank in op.others() if mine.size]
    yield came + sent


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
        whole = chunks[chunk % op.size]
        return [whole[at : at + step] for at in range(0, whole.size, step)]

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
