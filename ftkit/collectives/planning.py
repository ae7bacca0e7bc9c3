"""Planning: the operation by which the members of a channel agree on their ring.

    tell all what this member measured         (one round of small messages)
    try the pairs of hosts nobody knows        (a tournament, `probe_s` a round)
    tell all what came of it                   (one more round, if anything was tried)
    compute the ring                           (everybody the same, from the same matrix)

It is an operation like any other, or the beginning of one: it has a number, all members run
it between the same two operations, and what follows uses the new ring on all of them. If it
is cut in half the generation is over, and the next one begins with the natural order on
every member.
"""

import logging
import time
from collections.abc import Generator, Sequence

import numpy as np

from ftkit.collectives import rates as matrices
from ftkit.collectives.moves import exchange
from ftkit.collectives.op import Op, Program, Wait
from ftkit.collectives.rates import Matrix
from ftkit.collectives.ring_order import Ring, plan
from ftkit.collectives.tournament import rounds

logger = logging.getLogger(__name__)

#: Probes begin with this much and double, so that a slow pair is not kept for long.
_PROBE_BYTES_MIN = 256 << 10
_PROBE_BYTES_MAX = 8 << 20
#: The first ones only open the connection's window.
_PROBES_MIN = 3
#: Rounds of probes in one plan: training waits meanwhile. What is left is guessed.
_ROUNDS_MAX = 8
#: Tags apart from those of the operation that begins with a plan.
_LOOK = 1 << 16
_BEFORE, _AFTER, _FIRST_ROUND = _LOOK + 1, _LOOK + 2, _LOOK + 3


def plan_ring() -> Program:
    """Plan the channel's ring anew; value: the `Ring`, which is in use from here on."""
    return _plan


def look(op: Op) -> Generator[Wait, None, None]:
    """Plan the ring if any member has a reason to: all ask each other, and all do the same."""
    asks = np.array([op.channel.wants_plan], dtype=np.uint8)
    answers = yield from exchange(asks, tag=_LOOK)(op)
    if any(answer != b"\0" for answer in answers):
        yield from _plan(op)


def _plan(op: Op) -> Generator[Wait, None, Ring]:
    hosts = op.channel.hosts
    rates = yield from _gather(op, _BEFORE)
    schedule = _unknown(rates, hosts) if op.engine.config.probe_s else []
    for number, pairs in enumerate(schedule):
        for pair in pairs:
            if op.rank in pair:
                partner = pair[0] if pair[1] == op.rank else pair[1]
                yield from _try_out(op, partner, _FIRST_ROUND + number)
    if schedule:
        rates = yield from _gather(op, _AFTER)
    ring = plan(matrices.filled(rates, hosts), hosts, op.channel.ring)
    op.channel.adopt(ring, rates)
    logger.info("group %s: ring %s, slowest %.3g B/s", op.channel.id, ring.order, ring.slowest)
    return ring


def probe(partner: int) -> Program:
    """Load the path to rank `partner`, which must do the same."""

    def program(op: Op) -> Generator[Wait, None, None]:
        yield from _try_out(op, partner, _FIRST_ROUND)
        _measured(op)

    return program


def _gather(op: Op, tag: int) -> Generator[Wait, None, Matrix]:
    """What all members measured, as one matrix."""
    row = _measured(op)
    rows = yield from exchange(row.reshape(-1).view(np.uint8), tag=tag)(op)
    out, read = matrices.unknown(op.size), matrices.unknown(op.size)
    for rank, data in enumerate(rows):
        if len(data) != row.nbytes:
            raise ValueError(f"rank {rank} sent {len(data)} bytes of rates, not {row.nbytes}")
        out[rank], read[:, rank] = np.frombuffer(data).reshape(2, op.size)
    rates = np.where(np.isnan(out), read, out)
    # What a peer says is not trusted to be a rate.
    return np.where(np.isfinite(rates) & (rates >= 0), rates, np.nan)


def _measured(op: Op) -> Matrix:
    """This member's row: float64, shape (2, size): to each rank by TCP, from each by memory."""
    row = np.full((2, op.size), np.nan)
    for rank, member in enumerate(op.members):
        link = op.engine.net.links.get(member)
        if link is None:
            continue
        link.settle()
        flows = (link.flow, link.cma.pace.flow if link.cma is not None else None)
        row[:, rank] = [np.nan if f is None or f.rate is None else f.rate for f in flows]
    return row


def _unknown(rates: Matrix, hosts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of ranks to try: one rank a host, only hosts whose rate is unknown."""
    names, between = matrices.pooled(rates, hosts)
    speaker = [list(hosts).index(name) for name in names]
    schedule = [
        [
            (speaker[a], speaker[b])
            for a, b in pairs
            if np.isnan(between[a, b]) or np.isnan(between[b, a])
        ]
        for pairs in rounds(len(names))
    ]
    return [pairs for pairs in schedule if pairs][:_ROUNDS_MAX]


def _try_out(op: Op, partner: int, tag: int) -> Generator[Wait, None, None]:
    """Load the path to `partner` both ways; the links' meters see how fast it is.

    Either side may end it, with a word in the message that both have then seen.
    """
    deadline = time.monotonic() + op.engine.config.probe_s
    least = max(_PROBE_BYTES_MIN, 2 * op.engine.config.exchange_bytes_max)
    most = max(least, _PROBE_BYTES_MAX)
    # Written once: the kernel finding pages for us is not the network's pace.
    mine, theirs = np.ones(most, dtype=np.uint8), np.ones(most, dtype=np.uint8)
    size, part = least, 0
    while True:
        mine[0] = time.monotonic() >= deadline and part >= _PROBES_MIN - 1
        came = op.recv(partner, theirs[:size], tag=tag, part=part)
        yield [came, op.send(partner, mine[:size], tag=tag, part=part)]
        if mine[0] or theirs[0]:
            return
        size, part = min(2 * size, most), part + 1
