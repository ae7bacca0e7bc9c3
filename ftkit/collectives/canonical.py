"""The canonical reduction: the same bits for any number of ranks, over any transport.

Each rank contributes its nodes of the slot tree (`slots`). The vector is cut into one chunk
a rank; the owner of a chunk runs the fold plan on it, segment by segment, scales once, and
hands the result round. A world of one runs the same plan on its own nodes.
"""

from collections.abc import Generator, Mapping, Sequence

import torch

from ftkit.collectives.arithmetic import Bytes, combine, copy, scale
from ftkit.collectives.flows import Handout, Inflow, pieces_of, produce, take_in
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Program, Wait
from ftkit.collectives.reductions import FOLD_BYTES, chunks_of
from ftkit.collectives.slots import Add, Take, fold_plan

_RESULT = 0
_FIRST_NODE = 1


def reduce_slots(
    nodes: Sequence[Bytes], out: Bytes, dtype: torch.dtype, slots: int, factor: float | None
) -> Program:
    """`out` = factor * canonical sum. `out` may be the memory of one of `nodes`."""

    def program(op: Op) -> Generator[Wait, None, None]:
        plan = fold_plan(slots, op.size)
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
        ours = [take for take in takes if take.rank == op.rank]
        flows = {
            take: Inflow(op, take.rank, mine.size, _FIRST_NODE + take.position)
            for take in takes
            if take.rank != op.rank
        }
        for index, target in enumerate(pieces_of(mine, op.piece)):
            start = index * op.piece
            pieces = {}
            for take, flow in flows.items():
                pieces[take] = yield from flow.piece(index)
            views = {take: piece.view for take, piece in pieces.items()}
            for take in ours:
                views[take] = own[take.position][start : start + target.size]
            for at in range(0, target.size, FOLD_BYTES):
                part = slice(at, at + FOLD_BYTES)
                values = {take: view[part] for take, view in views.items()}
                _fold(op, plan, values, target[part], dtype)
                if factor is not None:
                    scale(dtype, target[part], factor)
            for take, flow in flows.items():
                flow.done(pieces[take])
            yield from handout.hand(index, target)
            yield None
        yield [*sent, *came, *handout.in_use]

    return program


def _fold(
    op: Op,
    plan: Sequence[Take | Add],
    values: Mapping[Take, Bytes],
    out: Bytes,
    dtype: torch.dtype,
) -> None:
    """Carry out the plan. Sums live in scratch memory: the values are not ours to change."""
    if len(plan) == 1:
        (value,) = values.values()
        copy(out, value)
        return
    stack: list[tuple[Bytes, Bytes | None]] = []
    for number, step in enumerate(plan, 1):
        if isinstance(step, Take):
            stack.append((values[step], None))
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
