"""Several losses, close together: members of one process are cut off from all others."""

# mypy: allow-untyped-calls

import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ftkit.collectives.calls import Calls
from ftkit.collectives.config import OnLoss
from ftkit.collectives.group import Group
from ftkit.collectives.mending import Mender
from ftkit.core.errors import GenerationAborted
from ftkit.core.ids import MemberId

from .worlds import SECRET, config, world


class Ensemble:
    """Members of one world, in this process, whose groups mend themselves."""

    def __init__(self, size, mode):
        self.menders = [Mender() for _ in range(size)]
        self.groups = [
            Group(
                member=MemberId(id_),
                secret=SECRET,
                config=config("tcp", on_loss=mode),
                on_fault=mender.take_fault,
                on_tell=mender.take_statement,
            )
            for id_, mender in enumerate(self.menders)
        ]
        whole = world(1, {id_: group.address for id_, group in enumerate(self.groups)})
        with ThreadPoolExecutor(size) as threads:
            list(threads.map(lambda g: g.edit(whole, timeout_s=20), self.groups))
        for group, mender in zip(self.groups, self.menders, strict=True):
            mender.watch(group)
        self.calls = [
            Calls(group.channel, mender, mode)
            for group, mender in zip(self.groups, self.menders, strict=True)
        ]
        self.sums: list[list[float]] = [[] for _ in range(size)]

    def cut_off(self, id_):
        engine = self.groups[id_]._engine

        def cut():
            # It is alive, and may be dialling for the loss before: it is to stay out of reach.
            engine._add_link = lambda greeted: greeted.close()
            for link in engine.net.links.values():
                with contextlib.suppress(OSError):  # the other end may be gone already
                    link.sock.shutdown(socket.SHUT_RDWR)

        # All at once, on its own thread: one by one, it would tell those whom it still reaches
        # that the others are lost, and be believed.
        engine.call(cut)
        engine.barrier()

    def play(self, id_, enough):
        """Sum 2**id of everybody until `enough` of the sums, a large and a small at a time."""
        mine = self.sums[id_]
        while not enough(mine):
            pair = [torch.full((n,), 2.0**id_) for n in (40_000, 3)]
            for handle in [self.calls[id_].all_reduce(t, None, 20.0)() for t in pair]:
                handle.wait(20)
            assert all(t.min() == t.max() for t in pair), "one operation, one set of ranks"
            mine += [t[0].item() for t in pair]

    def close(self):
        for group in self.groups:
            group.close()
        for mender in self.menders:
            mender.close()


@pytest.mark.parametrize("apart_s", [0.0, 0.001, 0.004, 0.015, 0.05])
def test_two_losses_however_close_leave_the_survivors_with_the_same_sums(apart_s):
    size, lost = 5, (0, 3)
    ensemble = Ensemble(size, OnLoss.RETRY)
    survivors = [id_ for id_ in range(size) if id_ not in lost]
    last = sum(2.0**id_ for id_ in survivors)
    try:
        with ThreadPoolExecutor(size) as threads:
            playing = {
                id_: threads.submit(ensemble.play, id_, lambda sums: sums[-6:] == [last] * 6)
                for id_ in range(size)
            }
            while min(map(len, ensemble.sums)) < 4:
                time.sleep(0.001)
            for id_ in lost:
                ensemble.cut_off(id_)
                time.sleep(apart_s)
            for id_ in survivors:
                playing[id_].result(20)
            for id_ in lost:
                with pytest.raises(GenerationAborted, match=r"no majority|went on without"):
                    playing[id_].result(20)
        first = sum(2.0**id_ for id_ in range(size))
        allowed = [{first}, {first - 2.0 ** lost[0], first - 2.0 ** lost[1]}, {last}]
        for id_ in survivors:
            sums = ensemble.sums[id_]
            assert sums == ensemble.sums[survivors[0]]
            stages = [next(i for i, stage in enumerate(allowed) if s in stage) for s in sums]
            assert stages == sorted(stages), "a world only gets smaller"
    finally:
        ensemble.close()


def test_an_abort_without_a_loss_is_raised():
    ensemble = Ensemble(3, OnLoss.RETRY)
    try:
        handle = ensemble.calls[0].all_reduce(torch.ones(3), None, 20.0)()
        group = ensemble.groups[1]
        group.abort(group.world.generation, "drill")
        with pytest.raises(GenerationAborted, match="drill"):
            handle.wait(10)
        with pytest.raises(GenerationAborted, match="drill"):
            ensemble.calls[0].barrier(20.0)().wait(10)
    finally:
        ensemble.close()


def test_closing_ends_what_is_pending():
    ensemble = Ensemble(2, OnLoss.RETRY)
    handle = ensemble.calls[0].all_reduce(torch.ones(3), None, 20.0)()
    ensemble.close()
    with pytest.raises(GenerationAborted):
        handle.wait(10)


def mended(group, size):
    """Return once `group` has begun a world of `size`."""
    limit = time.monotonic() + 10
    while group.world.size != size or group.aborted:
        assert time.monotonic() < limit, "nothing was mended"
        time.sleep(0.001)


@pytest.fixture
def one_ahead():
    """Four members, of whom 0 has issued what the others issue when 3 is lost; its handles."""
    ensemble = Ensemble(4, OnLoss.LEAVE_OUT)
    handles = []

    def play(*calls):
        handles.append([call(0) for call in calls])
        ensemble.cut_off(3)
        for id_ in (0, 1, 2):
            mended(ensemble.groups[id_], 3)
        handles.extend([call(id_) for call in calls] for id_ in (1, 2))
        return handles

    yield ensemble, play
    ensemble.close()


def test_sums_are_scaled_alike_though_only_one_was_issued_before_the_loss(one_ahead):
    ensemble, play = one_ahead
    tensors = [torch.ones(3) for _ in range(4)]
    for (handle,) in play(lambda id_: ensemble.calls[id_].all_reduce(tensors[id_], None, 20.0)()):
        handle.wait(10)
    assert [t.tolist() for t in tensors[:3]] == [[4.0] * 3] * 3, "3 of 4 terms, times 4 / 3"


def test_what_one_cannot_run_again_the_others_do_not_run_either(one_ahead):
    ensemble, play = one_ahead
    tensors = [torch.ones(3) for _ in range(4)]

    def gathered(id_):
        size = ensemble.groups[id_].size
        outs = [torch.zeros(2) for _ in range(size)]
        return ensemble.calls[id_].all_gather(outs, torch.ones(2), None, 20.0)()

    def sent_round(id_):  # rank 1 is another member afterwards; 3 is lost
        root = 3 if id_ == 0 else 1
        return ensemble.calls[id_].broadcast(torch.ones(2), root, 20.0)()

    def summed(id_):
        return ensemble.calls[id_].all_reduce(tensors[id_], None, 20.0)()

    for gather, broadcast, total in play(gathered, sent_round, summed):
        with pytest.raises(GenerationAborted, match="place for every rank"):
            gather.wait(10)
        with pytest.raises(GenerationAborted, match="root of broadcast"):
            broadcast.wait(10)
        total.wait(10)
    assert len({tuple(t.tolist()) for t in tensors[:3]}) == 1
