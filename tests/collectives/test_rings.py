"""Reduce-scatter and all-gather round the ring, as between hosts, against plain arithmetic."""

# mypy: allow-untyped-calls

import contextlib

import pytest
import torch

from ftkit.collectives.op import Op

from .worlds import in_one_process


@contextlib.contextmanager
def groups(size, segment_bytes=4096):
    made = in_one_process(size, exchange_bytes_max=0, segment_bytes=segment_bytes)
    try:
        yield made
    finally:
        for group in made:
            group.close()


def whole_numbers(n, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 9, (n,), generator=generator).to(dtype)


# Nothing, less than a segment, exactly one, and several; alike or of another length each.
LENGTHS = [[0] * 4, [5] * 4, [1024] * 4, [3000] * 4, [0, 1, 1025, 9000], [9000, 0, 0, 7]]


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize(("dtype", "op"), [(torch.float32, "sum"), (torch.int64, "max")])
def test_reduce_scatter_reduces_each_piece_to_its_owner(size, dtype, op):
    with groups(size) as members:
        for lengths in LENGTHS:
            ins = [
                [whole_numbers(lengths[piece], 10 * r + piece, dtype) for piece in range(size)]
                for r in range(size)
            ]
            kept = [[t.clone() for t in row] for row in ins]
            outs = [torch.zeros(lengths[r], dtype=dtype) for r in range(size)]
            handles = [g.reduce_scatter(outs[r], ins[r], op) for r, g in enumerate(members)]
            for handle in handles:
                handle.wait(10)
            for r in range(size):
                terms = torch.stack([kept[source][r] for source in range(size)])
                expected = terms.sum(0) if op == "sum" else terms.amax(0)
                assert torch.equal(outs[r], expected.to(dtype))
                assert all(map(torch.equal, ins[r], kept[r])), "inputs stay"


def test_an_average_may_go_where_an_input_was():
    with groups(3) as members:
        ins = [[torch.full((5000,), float(r + piece)) for piece in range(3)] for r in range(3)]
        handles = [g.reduce_scatter(ins[r][r], ins[r], "avg") for r, g in enumerate(members)]
        for handle in handles:
            handle.wait(10)
        assert all(ins[r][r].eq(r + 1).all() for r in range(3))


@pytest.mark.parametrize("size", [3, 4])
def test_all_gather_brings_every_piece_to_all(size):
    with groups(size) as members:
        for lengths in LENGTHS:
            pieces = [whole_numbers(lengths[r], r, torch.int32) for r in range(size)]
            outs = [[torch.zeros_like(p) for p in pieces] for _ in range(size)]
            handles = [g.all_gather(outs[r], pieces[r]) for r, g in enumerate(members)]
            for handle in handles:
                handle.wait(10)
            for row in outs:
                assert all(map(torch.equal, row, pieces))


@pytest.mark.parametrize("ring", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_every_byte_goes_to_the_next_rank_and_no_more_than_needed(monkeypatch, ring):
    sent = []
    send = Op.send

    def note(op, target, data, **more):
        sent.append((op.name, op.rank, target, data.size))
        return send(op, target, data, **more)

    monkeypatch.setattr(Op, "send", note)
    n, size = 20_000, 4
    with groups(size) as members:
        for group in members:
            group.channel.ring = ring
        for name in ("all_gather", "reduce_scatter"):
            many = [[torch.zeros(n) for _ in range(size)] for _ in range(size)]
            for handle in [getattr(g, name)(*args(name, many[r])) for r, g in enumerate(members)]:
                handle.wait(10)
            mine = [s for s in sent if s[0].split()[0] == name]
            assert {(rank, target) for _, rank, target, _ in mine} == {
                (ring[place], ring[(place + 1) % size]) for place in range(size)
            }
            if name == "all_gather":
                assert all(t.eq(1).all() for row in many for t in row)
            assert sum(nbytes for *_, nbytes in mine) == size * (size - 1) * 4 * n


def args(name, pieces):
    return (pieces, torch.ones(20_000)) if name == "all_gather" else (pieces[0].clone(), pieces)
