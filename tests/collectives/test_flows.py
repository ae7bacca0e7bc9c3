"""Flows on one host: staged, staged to the last block, read in place, and read by the kernel."""

# mypy: allow-untyped-calls

import pytest
import torch

from ftkit.collectives import reductions
from ftkit.collectives.resident import resident
from ftkit.collectives.slot_tree import SlotTree
from ftkit.collectives.slots import assign

from .crew import Crew
from .worlds import join

pytestmark = pytest.mark.multiproc

#: Many small pieces, so that blocks are used again and again.
PIECE = 4096
SIZES = (9_000, 300_001)


def private(*shape):
    return torch.zeros(*shape)


def scenario(rank, size, talk, staging_bytes, hop_bytes):
    # Which of the two forms for one host an all-reduce takes.
    reductions._HOP_BYTES = hop_bytes
    group, faults, _ = join(rank, talk, "auto", piece_bytes=PIECE, staging_bytes_max=staging_bytes)
    other = group.subset(7, tuple(m.member for m in group.world.members))
    wrong = []

    def check(what, got, wanted):
        if not torch.equal(got, wanted):
            wrong.append(what)

    for n in SIZES:
        # Small integers: every order of adding gives the same bits.
        everybody = [torch.arange(n, dtype=torch.float32) % 97 + r for r in range(size)]
        total = sum(everybody)
        for make in (private, resident):
            data = [make(n) for _ in range(3)]
            for one in data:
                one.copy_(everybody[rank])
            # Three at once, on two channels: they share the staging blocks.
            handles = [
                group.all_reduce(data[0]),
                other.issue(
                    "all_reduce",
                    reductions.all_reduce(data[1].view(torch.uint8).numpy(), torch.float32, "max"),
                    nbytes=4 * n,
                ),
                group.all_reduce(data[2], "avg"),
            ]
            for handle in handles:
                handle.wait(20)
            check(f"sum {n} {make.__name__}", data[0], total)
            check(f"max {n} {make.__name__}", data[1], everybody[-1])
            check(f"avg {n} {make.__name__}", data[2], total / size)

            parts = [make(n) for _ in range(size)]
            for r, part in enumerate(parts):
                part.copy_(everybody[rank] * (r + 1))
            out = make(n)
            group.reduce_scatter(out, parts).wait(20)
            check(f"scattered {n} {make.__name__}", out, total * (rank + 1))
            check(f"inputs {n} {make.__name__}", parts[0], everybody[rank])

            tree = SlotTree(2 * size + 1)
            for slot in assign(2 * size + 1, size)[rank]:
                leaf = make(n)
                tree.push(slot, leaf.fill_(slot))
            group.reduce_slots(tree.nodes, out, slots=2 * size + 1, scale=0.5).wait(20)
            check(f"slots {n} {make.__name__}", out, torch.full((n,), size * (2 * size + 1) / 2.0))
    group.close()
    return wrong, faults


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("staging_bytes", [0, 12 * PIECE, 64 << 20])
@pytest.mark.parametrize("hop_bytes", [-1, 1 << 40])
def test_every_way_of_showing_memory_gives_the_same_sums(size, staging_bytes, hop_bytes):
    with Crew(scenario, size, staging_bytes, hop_bytes) as crew:
        assert crew.results() == [([], [])] * size
