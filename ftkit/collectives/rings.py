"""Programs that run round the ring: reduce-scatter and all-gather between several hosts.

Every rank speaks with its two neighbours alone, so with the ranks of a host side by side each
byte leaves a host once; sent directly, a piece would leave it once for every rank elsewhere.
A segment goes on as soon as it came in: in turn t we pass on what we received in turn t - 1.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import torch

from ftkit.collectives.arithmetic import Bytes, average, combine
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Wait

_AHEAD = 3


def serve(op: Op, pieces: Sequence[Bytes]) -> bool:
    """Whether pieces, one a rank, go round the ring: between hosts, when they are not small."""
    nbytes = sum(piece.size for piece in pieces)
    between_hosts = op.size > 2 and not op.engine.on_one_host
    return between_hosts and nbytes > op.engine.config.exchange_bytes_max


def reduce_scatter(
    op: Op, out: Bytes, ins: Sequence[Bytes], dtype: torch.dtype, op_name: str
) -> Generator[Wait, None, None]:
    """The reduction of all ranks' `ins[r]` into the `out` of rank r.

    A piece starts at the rank after its owner, and gathers a term at each until it is home.
    What is on its way lives in scratch memory, at most about one piece of it.
    """
    before, after = op.neighbours
    final = op.size - 2
    sent = [op.send(after, s.of(ins), part=i) for i, s in enumerate(_cut(op, ins, -1))]
    coming = deque(s for turn in range(op.size - 1) for s in _cut(op, ins, -2 - turn, turn))
    posted: deque[tuple[Ticket, Bytes, _Segment]] = deque()
    count = 0
    while coming or posted:
        while coming and len(posted) < _AHEAD:
            segment, buffer = coming.popleft(), op.scratch()
            ticket = op.recv(before, buffer[: segment.size], part=count)
            posted.append((ticket, buffer, segment))
            count += 1
        ticket, buffer, segment = posted.popleft()
        if not ticket.done:
            yield ticket
        came, own = buffer[: segment.size], segment.of(ins)
        if segment.turn < final:
            combine(op_name, dtype, came, came, own)
            # The buffer is the message's until it was taken; it does not come back.
            sent.append(op.send(after, came, part=len(sent)))
            continue
        target = out[segment.at : segment.at + segment.size]
        combine(op_name, dtype, target, came, own)
        if op_name == "avg":
            average(dtype, target, op.size)
        op.release(buffer)
    yield sent


def all_gather(op: Op, outs: Sequence[Bytes]) -> Generator[Wait, None, None]:
    """Everybody's `outs[rank]` to all; ours is there already. Sizes may differ."""
    before, after = op.neighbours
    coming = [s for turn in range(op.size - 1) for s in _cut(op, outs, -1 - turn, turn)]
    came = [op.recv(before, s.of(outs), part=i) for i, s in enumerate(coming)]
    sent = [op.send(after, s.of(outs), part=i) for i, s in enumerate(_cut(op, outs, 0))]
    for ticket, segment in zip(came, coming, strict=True):
        if not ticket.done:
            yield ticket
        if segment.turn < op.size - 2:  # what came last, began at the one after us
            sent.append(op.send(after, segment.of(outs), part=len(sent)))
    yield sent


class _Segment(NamedTuple):
    piece: int
    at: int
    size: int
    turn: int

    def of(self, pieces: Sequence[Bytes]) -> Bytes:
        return pieces[self.piece][self.at : self.at + self.size]


def _cut(op: Op, pieces: Sequence[Bytes], offset: int, turn: int = 0) -> Iterator[_Segment]:
    """The segments of the piece whose owner is `offset` places round the ring from us."""
    ring = op.channel.ring
    piece = ring[(ring.index(op.rank) + offset) % op.size]
    whole = pieces[piece].size
    for at in range(0, whole, op.segment):
        yield _Segment(piece, at, min(op.segment, whole - at), turn)
