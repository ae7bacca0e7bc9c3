"""The canonical reduction: the same bits for any number of ranks, over any transport.

Each rank contributes its nodes of the slot tree (`slots`). The vector is cut into one chunk
a rank; the owner of a chunk runs the fold plan on it, segment by segment, scales once, and
hands the result round. A world of one runs the same plan on its own nodes.
"""

from collections.abc import Generator, Sequence

import torch

from ftkit.collectives.arithmetic import Bytes, combine, copy, scale
from ftkit.collectives.flows import Handout, Inflow, Piece, pieces_of, produce, take_in
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Program, Wait
from ftkit.collectives.reductions import FOLD_BYTES, chunks_of
from ftkit.collectives.slots import Add, Held, Take, fold_plan

_RESULT = 0
_FIRST_NODE = 1


def reduce_slots(
    nodes: Sequence[Bytes],
    out: Bytes,
    dtype: torch.dtype,
    slots: int,
    factor: float | None,
    division: Held | None = None,
) -> Program:
    """`out` = factor * canonical sum. `out` may be the memory of one of `nodes`."""

    def program(op: Op) -> Generator[Wait, None, None]:
        plan = fold_plan(slots, op.size, division)
        chunks = chunks_of(out, dtype, op.size)
        cut = [chunks_of(node, dtype, op.size) for node in nodes]
        mine, own = chunks[op.rank], [node[op.rank] for node in cut]
        came = take_in(op, chunks, _RESULT)
        sent: list[Ticket] = []
        for rank in op.others():
            for position, node in enumerate(cut):
                tag = _FIRST_NODE + position
                sent += produce(op, rank, node[rank], tag, answered=True)
        handout = Handout(op, mine, _RESULT)
        takes = [step for step in plan if isinstance(step, Take)]
        flows = [
            None
            if take.rank == op.rank
            else Inflow(op, take.rank, mine.size, _FIRST_NODE + take.position)
            for take in takes
        ]
        for index, target in enumerate(pieces_of(mine, op.piece)):
            start = index * op.piece
            pieces, views = list[tuple[Inflow, Piece]](), list[Bytes]()
            for take, flow in zip(takes, flows, strict=True):
                if flow is None:
                    views.append(own[take.position][start : start + target.size])
                else:
                    piece = yield from flow.piece(index)
                    pieces.append((flow, piece))
                    views.append(piece.view)
            for at in range(0, target.size, FOLD_BYTES):
                part = slice(at, at + FOLD_BYTES)
                _fold(op, plan, [view[part] for view in views], target[part], dtype)
                if factor is not None:
                    scale(dtype, target[part], factor)
            for flow, piece in pieces:
                flow.done(piece)
            yield from handout.hand(index, target)
            yield None
        yield [*sent, *came, *handout.in_use]

    return program


def _fold(
    op: Op, plan: Sequence[Take | Add], values: Sequence[Bytes], out: Bytes, dtype: torch.dtype
) -> None:
    """Carry out the plan on `values`, one a Take, in its order; they are not ours to change."""
    if len(values) == 1:
        copy(out, values[0])
        return
    taken = iter(values)
    # A value, and the scratch memory that it is in, if it is a sum.
    stack: list[tuple[Bytes, Bytes | None]] = []
    for number, step in enumerate(plan, 1):
        if isinstance(step, Take):
            stack.append((next(taken), None))
            continue
        (right, used_right), (left, used_left) = stack.pop(), stack.pop()
        if number == len(plan):
            # The last sum goes where the result belongs: one pass over memory less.
            target, buffer = out, None
        else:
            buffer = used_left if used_left is not None else used_right
            if buffer is None:
                buffer = op.scratch()
            target = buffer[: out.size]
        combine("sum", dtype, target, left, right)
        op.release(*(b for b in (used_left, used_right) if b is not None and b is not buffer))
        stack.append((target, buffer))
