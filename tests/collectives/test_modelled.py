"""The modelled network: the right bytes, at the time that the formula says."""

from typing import Any

import pytest
import torch

from ftkit.collectives.modelled import Duplex, ModelledGroup, Network
from ftkit.core.errors import GenerationAborted

from .ranks import everywhere, on, timed

MB = 1 << 20


def to_the_next(group: ModelledGroup) -> None:
    rank, size = group.rank(), group.size()
    out = torch.empty(MB, dtype=torch.uint8)
    came = group.recv([out], (rank - 1) % size, 7)
    sent = group.send([torch.full((MB,), rank, dtype=torch.uint8)], (rank + 1) % size, 7)
    came.wait()
    sent.wait()
    assert (out == (rank - 1) % size).all()


@pytest.mark.parametrize(
    ("duplex", "seconds"), [(Duplex.WIRES, 0.1), (Duplex.FULL, 0.1), (Duplex.HALF, 0.2)]
)
def test_a_message_waits_for_what_it_shares(duplex: Duplex, seconds: float) -> None:
    # Three ranks in a ring: a half-duplex port sends one message and then receives one.
    took = timed(3, to_the_next, rate=10 * MB, duplex=duplex, latency_s=0.01)
    assert took == pytest.approx(seconds + 0.01)


def test_latency_is_paid_once_by_messages_in_flight_together() -> None:
    def many(group: ModelledGroup) -> None:
        if group.rank():
            outs = [torch.empty(1) for _ in range(20)]
            for work in [group.recv([out], 0, tag) for tag, out in enumerate(outs)]:
                work.wait()
            assert torch.cat(outs).tolist() == list(range(20))
        else:
            for tag in range(20):
                group.send([torch.tensor([float(tag)])], 1, tag)

    assert timed(2, many, rate=MB, latency_s=0.05) == pytest.approx(0.05 + 80 / MB)


def test_computing_and_a_message_take_as_long_as_the_longer() -> None:
    def rank(group: ModelledGroup) -> None:
        if group.rank():
            came = group.recv([torch.empty(MB, dtype=torch.uint8)], 0)
            group.network.sleep(0.07)
            came.wait()
        else:
            group.send([torch.zeros(MB, dtype=torch.uint8)], 1).wait()

    assert timed(2, rank, rate=10 * MB) == pytest.approx(0.1)


def test_a_buffered_send_ends_before_its_bytes_arrive() -> None:
    def one(group: ModelledGroup) -> float:
        if group.rank():
            group.recv([torch.empty(MB, dtype=torch.uint8)], 0).wait()
        else:
            group.send([torch.zeros(MB, dtype=torch.uint8)], 1).wait()
        return group.network.now()

    sent, came = everywhere(2, one, rate=10 * MB, buffer_bytes=MB)
    assert (sent, came) == (pytest.approx(0), pytest.approx(0.1))


def test_collectives_compute_and_take_the_bytes_of_the_best_algorithm() -> None:
    def rank(group: ModelledGroup) -> Any:
        whole, part = torch.arange(6.0) + group.rank(), torch.empty(2)
        group._reduce_scatter_base(part, whole).wait()
        gathered = torch.empty(6)
        group._allgather_base(gathered, part).wait()
        group.allreduce([whole]).wait()
        group.barrier().wait()
        return gathered.tolist(), whole.tolist()

    summed = [float(3 * i + 3) for i in range(6)]
    assert everywhere(3, rank) == [(summed, summed)] * 3
    elements = 5 * MB // 4
    slow = timed(2, lambda g: g.allreduce([torch.zeros(elements)]).wait(), rate=10 * MB)
    assert slow == pytest.approx(0.5)


def test_breaking_off_ends_all_that_is_pending_and_nothing_later() -> None:
    network = Network(2, rate=MB)
    groups = [network.group(r) for r in range(2)]
    pending = [
        groups[0].recv([torch.empty(1)], 1),
        groups[0].send([torch.empty(MB)], 1),
        groups[1].allreduce([torch.empty(1)]),
    ]
    network.break_off("member 1 is gone")
    for work in pending:
        with pytest.raises(GenerationAborted, match="member 1 is gone"):
            work.wait()
    on(network, to_the_next)


def test_ranks_that_wait_for_nothing_are_told() -> None:
    with pytest.raises(GenerationAborted, match="nothing is under way"):
        everywhere(2, lambda g: g.recv([torch.empty(1)], 1 - g.rank()).wait())
