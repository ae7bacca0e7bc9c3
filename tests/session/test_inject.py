"""A rank that a drill kills in mid-collective dies at the byte that was planned."""

# mypy: allow-untyped-calls

import os
import signal
from functools import partial

import pytest
import torch

from ftkit.collectives.frames import HEADER_BYTES
from ftkit.core.errors import GenerationAborted
from tests.collectives.crew import Crew
from tests.collectives.worlds import join

pytestmark = pytest.mark.multiproc


def dies_at_a_byte(rank, size, talk, transport, byte):
    group, faults, _ = join(rank, talk, transport)
    group.all_reduce(torch.ones(200_000)).wait(20)
    if rank == 1:
        group.light_fuse(byte, lambda: os.kill(os.getpid(), signal.SIGKILL))
    talk.everyone("lit")
    handles = [group.all_reduce(torch.ones(200_000)) for _ in range(5)]
    with pytest.raises(GenerationAborted):
        handles[-1].wait(20)
    _, lost, _, _ = faults.wait()
    group.close()
    return lost


# The first byte, inside a header, after one, and in the middle of the payload.
@pytest.mark.parametrize("transport", ["tcp", "auto"])
def test_it_dies_at_that_byte_and_the_others_are_told(transport):
    for byte in (1, 30, 77, 123_457):
        with Crew(dies_at_a_byte, 3, transport, byte) as crew:
            assert crew.swap() is not None
            assert crew.swap() is not None
            assert crew.results([0, 2]) == [{1}, {1}]


def counts(rank, size, talk):
    """What burns is what is moved: a fuse of exactly that length goes off at its end."""
    group, _, _ = join(rank, talk, "tcp")
    struck: list[int] = []
    moved = HEADER_BYTES + 40_000
    if rank == 0:
        for short in (moved - 1, moved, moved + 1):
            group.light_fuse(short, partial(struck.append, short))
            group.broadcast(torch.ones(10_000), 0).wait(10)
            group.light_fuse(1 << 40, lambda: None)
    else:
        for _ in range(3):
            group.broadcast(torch.ones(10_000), 0).wait(10)
    group.barrier().wait(10)
    group.close()
    return struck


def test_every_byte_of_headers_and_payload_burns():
    with Crew(counts, 2) as crew:
        struck = crew.results()[0]
    assert struck == [HEADER_BYTES + 39_999, HEADER_BYTES + 40_000]
