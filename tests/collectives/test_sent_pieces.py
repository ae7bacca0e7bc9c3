"""What a reduction sends between hosts: pieces, each folded and handed on while others travel."""

# mypy: allow-untyped-calls

import numpy as np
import pytest
import torch

from ftkit.collectives.canonical import reduce_slots
from ftkit.collectives.config import SENT_PIECE_BYTES
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import empty
from ftkit.collectives.slot_tree import SlotTree

from .worlds import in_one_process

NODE, RESULT = 1, 0


class ByHand:
    """Of an Op what programs use; its transfers are done when the test says so. Rank 0 of two."""

    rank, size, piece = 0, 2, 16

    def __init__(self):
        self.sent, self.awaited = [], {}

    def others(self):
        return [1]

    def pushes(self, target, nbytes):
        return True

    def pulls(self, source, nbytes):
        return False

    def send(self, target, data, *, tag=0, part=0):
        self.sent.append((tag, part))
        return Ticket()

    def recv(self, source, into, *, tag=0, part=0):
        self.awaited[tag, part] = into, Ticket()
        return self.awaited[tag, part][1]

    def came(self, tag, part, values):
        into, ticket = self.awaited[tag, part]
        into.view(np.float32)[:] = values
        ticket.complete()

    def scratch(self):
        return empty(self.piece)

    def release(self, *buffers):
        pass


def test_a_sum_goes_out_before_the_other_s_last_piece_has_come():
    op, out = ByHand(), np.zeros(128, np.uint8)
    node = np.arange(32, dtype=np.float32)
    program = reduce_slots([node.view(np.uint8)], out, torch.float32, 2, 0.5)(op)  # type: ignore[arg-type]
    next(program)
    assert op.sent == [(NODE, part) for part in range(4)]
    assert {key for key in op.awaited if key[0] == NODE} == {(NODE, part) for part in range(4)}
    op.came(NODE, 0, [1, 1, 1, 1])
    assert next(program) is None
    assert op.sent[4:] == [(RESULT, 0)]
    assert list(out.view(np.float32)[:4]) == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(("transport", "most"), [("tcp", SENT_PIECE_BYTES), ("auto", 4 << 20)])
def test_pieces_are_smaller_between_hosts(transport, most):
    def look(op):
        yield None
        return op.piece

    groups = in_one_process(2, transport)
    try:
        seen = [group.channel.issue("look", look, nbytes=0) for group in groups]
        assert [one.wait(20) for one in seen] == [most, most]
    finally:
        for group in groups:
            group.close()


@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_many_pieces_are_right(size):
    elements = size * 9 * (SENT_PIECE_BYTES // 8) + 5
    groups = in_one_process(size)
    try:
        values = [torch.arange(elements, dtype=torch.float32) % 97 + rank for rank in range(size)]
        outs = [torch.zeros(elements) for _ in groups]
        handles = []
        for rank, group in enumerate(groups):
            tree = SlotTree(size)
            tree.push(rank, values[rank].clone())
            handles.append(group.reduce_slots(tree.nodes, outs[rank], slots=size, scale=1.0))
        for handle in handles:
            handle.wait(60)
        wanted = torch.stack(values).sum(0)
        assert all(torch.equal(out, wanted) for out in outs)
    finally:
        for group in groups:
            group.close()
