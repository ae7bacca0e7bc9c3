"""The canonical reduction: the same bits for any number of ranks, over any transport.

Each rank contributes its nodes of the slot tree (`slots`). The vector is cut into one chunk
a rank; the owner of a chunk runs the fold plan on it, segment by segment, scales once, and
hands the result round. A world of one runs the same plan on its own nodes.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch

from ftkit.collectives.arithmetic import Bytes, combine, copy, scale
from ftkit.collectives.flows import Inflow, produce
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Program, Wait
from ftkit.collectives.reductions import chunks_of, share
from ftkit.collectives.slots import Take, fold_plan

_RESULT = 0
_FIRST_NODE = 1


def reduce_slots(
    nodes: Sequence[Bytes], out: Bytes, dtype: torch.dtype, slots: int, factor: float | None
) -> Program:
    """`out` = factor * canonical sum. `out` may be the memory of one of `nodes`."""

    def program(op: Op) -> Generator[Wait, None, None]:
        plan = fold_plan(slots, op.size)
        chunks = chunks_of(out, dtype, op.size)
        pieces = [chunks_of(node, dtype, op.size) for node in nodes]
        sent: list[Ticket] = []
        for rank in op.others():
            for position, piece in enumerate(pieces):
                sent += produce(op, rank, piece[rank], _FIRST_NODE + position)
        mine = chunks[op.rank]
        flows = {
            (step.rank, step.position): Inflow(
                op, step.rank, mine.size, _FIRST_NODE + step.position
            )
            for step in plan
            if isinstance(step, Take) and step.rank != op.rank
        }
        for index in range(-(-mine.size // op.segment)):
            at = index * op.segment
            target = mine[at : at + op.segment]
            stack: list[_Value] = []
            for number, step in enumerate(plan):
                if isinstance(step, Take):
                    flow = flows.get((step.rank, step.position))
                    if flow is None:
                        own = pieces[step.position][op.rank]
                        stack.append(_Value(own[at : at + op.segment], None, None))
                    else:
                        buffer = yield from flow.segment(index)
                        stack.append(_Value(buffer[: target.size], buffer, flow))
                else:
                    right, left = stack.pop(), stack.pop()
                    # The last sum goes where the result belongs: one pass over memory less.
                    into = target if number == len(plan) - 1 else None
                    stack.append(_add(op, dtype, left, right, into))
            value = stack.pop()
            if value.view.ctypes.data != target.ctypes.data:
                copy(target, value.view)
            _free(op, value)
            if factor is not None:
                scale(dtype, target, factor)
            yield None
        for flow in flows.values():
            flow.finish()
        yield sent
        yield from share(op, chunks, _RESULT)

    return program


class _Value(NamedTuple):
    """A value on the fold's stack. Without a `buffer` it is the caller's: read only."""

    view: Bytes
    buffer: Bytes | None
    flow: Inflow | None


def _add(op: Op, dtype: torch.dtype, left: _Value, right: _Value, into: Bytes | None) -> _Value:
    if into is not None:
        combine("sum", dtype, into, left.view, right.view)
        _free(op, left)
        _free(op, right)
        return _Value(into, None, None)
    # Sums live in scratch memory: the nodes are not ours to change.
    if left.buffer is not None:
        result, other = left, right
    elif right.buffer is not None:
        result, other = right, left
    else:
        buffer = op.scratch()
        result, other = _Value(buffer[: left.view.size], buffer, None), right
    combine("sum", dtype, result.view, left.view, right.view)
    _free(op, other)
    return result


def _free(op: Op, value: _Value) -> None:
    if value.flow is not None and value.buffer is not None:
        value.flow.done(value.buffer)
    elif value.buffer is not None:
        op.release(value.buffer)
