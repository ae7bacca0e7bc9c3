"""Programs that move bytes without arithmetic: exchange, broadcast, gather, all-to-all, p2p."""

from collections.abc import Generator, Sequence
from typing import cast

from ftkit.collectives import rings
from ftkit.collectives.arithmetic import Bytes, copy
from ftkit.collectives.flows import pieces_of
from ftkit.collectives.op import Op, Program, Wait


def exchange(payload: Bytes, tag: int = 0) -> Program:
    """Everybody's bytes, in rank order, in one round. Sizes may differ."""

    def program(op: Op) -> Generator[Wait, None, list[bytes]]:
        others = op.others()
        sent = [op.send(rank, payload, tag=tag) for rank in others]
        tickets = {rank: op.recv(rank, None, tag=tag) for rank in others}
        yield [*tickets.values(), *sent]
        mine = payload.tobytes()
        return [
            mine if rank == op.rank else cast("Bytes", tickets[rank].data).tobytes()
            for rank in range(op.size)
        ]

    return program


def broadcast(data: Bytes, root: int) -> Program:
    """The root's bytes to all, in place.

    Within a host the root offers its memory and all read at once. Between hosts the bytes
    run along the ring in segments, so that no member sends them more than once.
    """

    def program(op: Op) -> Generator[Wait, None, None]:
        if op.size == 1 or not data.size:
            return
        if op.size == 2 or data.size <= op.segment or op.engine.on_one_host:
            if op.rank == root:
                yield [op.send(rank, data) for rank in op.others()]
            else:
                yield op.recv(root, data)
            return
        before, after = op.neighbours
        ring = op.channel.ring
        place = (ring.index(op.rank) - ring.index(root)) % op.size
        parts = pieces_of(data, op.segment)
        came = []
        if place:
            came = [op.recv(before, p, part=i) for i, p in enumerate(parts)]
        sent = []
        for i, part in enumerate(parts):
            if place:
                yield came[i]
            if place < op.size - 1:
                sent.append(op.send(after, part, part=i))
        yield sent

    return program


def all_gather(outs: Sequence[Bytes], mine: Bytes) -> Program:
    """Rank r's bytes into `outs[r]` everywhere. Sizes may differ between ranks."""

    def program(op: Op) -> Generator[Wait, None, None]:
        if outs[op.rank].ctypes.data != mine.ctypes.data:
            copy(outs[op.rank], mine)
        if rings.serve(op, outs):
            yield from rings.all_gather(op, outs)
            return
        others = op.others()
        came = [op.recv(rank, outs[rank]) for rank in others]
        yield came + [op.send(rank, mine) for rank in others]

    return program


def all_to_all(outs: Sequence[Bytes], ins: Sequence[Bytes]) -> Program:
    """`ins[r]` to rank r, whose bytes come into `outs[r]`. Empty ones are not sent."""

    def program(op: Op) -> Generator[Wait, None, None]:
        copy(outs[op.rank], ins[op.rank])
        others = op.others()
        tickets = [op.recv(rank, outs[rank]) for rank in others if outs[rank].size]
        tickets += [op.send(rank, ins[rank]) for rank in others if ins[rank].size]
        yield tickets

    return program


def gather(outs: Sequence[Bytes], mine: Bytes, root: int) -> Program:
    """Everybody's bytes into the root's `outs`; others pass none."""

    def program(op: Op) -> Generator[Wait, None, None]:
        if op.rank == root:
            copy(outs[root], mine)
            yield [op.recv(rank, outs[rank]) for rank in op.others()]
        else:
            yield op.send(root, mine)

    return program


def scatter(out: Bytes, ins: Sequence[Bytes], root: int) -> Program:
    """The root's `ins[r]` into the `out` of rank r; others pass none."""

    def program(op: Op) -> Generator[Wait, None, None]:
        if op.rank == root:
            copy(out, ins[root])
            yield [op.send(rank, ins[rank]) for rank in op.others()]
        else:
            yield op.recv(root, out)

    return program


def send(data: Bytes, target: int) -> Program:
    """One message to `target`; it may be ourselves."""

    def program(op: Op) -> Generator[Wait, None, None]:
        yield op.send(target, data, tag=op.tag)

    return program


def recv(into: Bytes, source: int) -> Program:
    """One message from `source`, or from anybody when it is -1; value: the source."""

    def program(op: Op) -> Generator[Wait, None, int]:
        rank = source
        if rank < 0:
            yield op.engine.transfers.from_anybody(op)
            assert op.handle.source is not None, "a claimed message has a source"
            rank = op.handle.source
        op.handle.source = rank
        yield op.recv(rank, into, tag=op.tag)
        return rank

    return program
