"""What a group meets that nobody means well by: odd arguments, impostors, bad moments."""

# mypy: allow-untyped-calls

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch

from ftkit.collectives.calls import Calls
from ftkit.collectives.group import Group
from ftkit.collectives.process_group import FtkitProcessGroup
from ftkit.core.errors import GenerationAborted, Refused, Unreachable
from ftkit.core.ids import MemberId
from ftkit.core.world import World

from .crew import Crew
from .ranks import play
from .worlds import in_one_process, join, make_group, world


@contextmanager
def together(size: int, transport: str = "tcp", **more: Any) -> Iterator[list[Group]]:
    groups = in_one_process(size, transport, **more)
    try:
        yield groups
    finally:
        # At once: each waits for the others' goodbyes.
        closing = [threading.Thread(target=group.close) for group in groups]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(20)


def edited(groups: list[Group], generation: int) -> None:
    whole = world(generation, {id_: group.address for id_, group in enumerate(groups)})
    threads = [
        threading.Thread(target=group.edit, args=(whole,), kwargs={"timeout_s": 10})
        for group in groups
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


def works(groups: list[Group]) -> bool:
    """Whether a sum over all of them is right."""
    tensors = [torch.full((1000,), 2.0**rank) for rank in range(len(groups))]
    handles = [group.all_reduce(t) for group, t in zip(groups, tensors, strict=True)]
    for handle in handles:
        handle.wait(10)
    return all(bool(t.eq(2.0 ** len(groups) - 1).all()) for t in tensors)


def begin_and_meet(group: Group, whole: World, timeout_s: float = 10) -> None:
    group.edit(whole, timeout_s=timeout_s)
    group.barrier().wait(5)


def cut(group: Group, peer: int) -> None:
    """Break the connection to `peer`, as a network does."""
    link = group._engine.net.links[MemberId(peer)]
    for lane in link.lanes:
        lane.sock.shutdown(socket.SHUT_RDWR)


def missing(group: Group, peer: int) -> None:
    """Return once the link to `peer` is gone here."""
    with group._engine.net.news:
        assert group._engine.net.news.wait_for(lambda: peer in group.unlinked, 10)


@pytest.mark.parametrize("tag", [0, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_message_may_have_any_tag_that_is_allowed(tag):
    with together(2) as (one, other):
        got = torch.zeros(3)
        received = Calls(other.channel).recv(got, 0, tag, 5.0)()
        Calls(one.channel).send(torch.ones(3), 1, tag, 5.0)().wait(5)
        received.wait(5)
        assert got.eq(1).all()


def test_a_program_that_cannot_even_begin_ends_the_generation_not_the_thread():
    def nonsense(op):
        raise ArithmeticError("no such thing")

    with together(2) as groups:
        with pytest.raises(ArithmeticError):
            groups[0].channel.issue("nonsense", nonsense, nbytes=0).wait(5)
        with pytest.raises(GenerationAborted, match="no such thing"):
            groups[1].barrier().wait(5)
        edited(groups, 2)
        assert works(groups)


def test_one_id_is_one_channel():
    with together(3) as groups:
        members = tuple(m.member for m in groups[0].world.members)
        first = groups[0].subset(7, members[:2])
        assert groups[0].subset(7, members[:2]) is first
        with pytest.raises(ValueError, match="channel 7"):
            groups[0].subset(7, (members[0], members[2]))


def test_a_second_process_with_a_members_number_is_refused_and_harms_nobody():
    with together(3) as groups:
        impostor, _ = make_group(2, "tcp")
        with impostor:
            whole = world(1, {id_: group.address for id_, group in enumerate(groups)})
            # It may believe for a moment that it was let in.
            with pytest.raises((Unreachable, GenerationAborted)):
                begin_and_meet(impostor, whole, timeout_s=0.5)
        assert works(groups)
        assert not any(group.aborted for group in groups)


def test_a_member_that_comes_back_after_a_broken_connection_is_let_in():
    with together(2) as groups:
        cut(groups[1], 0)
        missing(groups[0], 1)
        missing(groups[1], 0)
        edited(groups, 2)
        assert works(groups)


def test_links_ask_a_silent_peer_whether_it_is_there():
    with together(2, connections=2) as groups:
        for group in groups:
            for lane in next(iter(group._engine.net.links.values())).lanes:
                options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
                idle, again, times = (lane.sock.getsockopt(socket.IPPROTO_TCP, o) for o in options)
                assert lane.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert idle + again * times <= 30


def test_who_comes_late_to_a_generation_that_has_ended_is_told_so():
    """Member 0 has begun generation 2 and lost it, when no link could carry the news."""
    with together(2) as groups:
        whole = world(2, {id_: group.address for id_, group in enumerate(groups)})
        groups[0].edit(whole, timeout_s=10)
        cut(groups[0], 1)
        missing(groups[0], 1)
        missing(groups[1], 0)
        assert groups[0].aborted
        with pytest.raises(GenerationAborted, match="gone"):
            begin_and_meet(groups[1], whole)
        edited(groups, 3)
        assert works(groups)


def test_receives_from_anybody_take_a_senders_messages_in_order_whatever_overtakes():
    with together(2, segment_bytes=64 << 10) as (one, other):
        large, small = torch.zeros(3_000_000), torch.zeros(3)
        calls = Calls(other.channel)
        received = [calls.recv(large, None, 5, 20.0)(), calls.recv(small, None, 5, 20.0)()]
        one._engine.call(partial(time.sleep, 0.1))  # both are queued when it wakes
        for value in (torch.ones(3_000_000), torch.full((3,), 2.0)):
            Calls(one.channel).send(value, 1, 5, 20.0)()
        for handle in received:
            handle.wait(10)
        assert large.eq(1).all()
        assert small.eq(2).all()


def test_a_rank_far_ahead_with_many_small_messages_is_held_back_too():
    count = 400
    with together(2, segment_bytes=4096, early_bytes_max=8192) as (ahead, behind):
        handles = [ahead.broadcast(torch.tensor([float(i)]), 0) for i in range(count)]
        transfers = behind._engine.transfers
        handles[-1].wait(10)
        behind._engine.barrier()
        assert len(transfers._mail.early) <= 16
        for i in range(count):
            value = torch.zeros(1)
            behind.broadcast(value, 0).wait(10)
            assert value.item() == i


def test_of_several_tensors_in_one_call_none_is_reduced_when_one_is_refused():
    with together(1) as (group,):
        pg = FtkitProcessGroup(
            group, group.channel, timeout=timedelta(seconds=5), on_shutdown=group.close
        )
        shared = torch.ones(1).expand(3)
        with pytest.raises(Refused, match="share their memory"):
            pg.allreduce_coalesced([torch.ones(3), shared])
        assert group.channel._seq == 0
        pg.allreduce_coalesced([torch.ones(3), torch.ones(2)]).wait()
        assert group.channel._seq == 2


def sleeps_through_an_edit(rank, size, talk):
    group, faults, addresses = join(rank, talk, "auto")
    if rank == 2:
        talk.say("here")
        with pytest.raises(GenerationAborted):
            group.all_reduce(torch.ones(300_000)).wait(20)  # it wakes in the middle of this
        with pytest.raises(TimeoutError):  # linked, and in no world of theirs
            begin_and_meet(group, world(3, addresses), timeout_s=0.5)
        group.close()
        return "alone"
    talk.hear()  # rank 2 is stopped
    handle = group.all_reduce(torch.ones(300_000))
    group.abort(group.world.generation, "member 2 is stopped")
    with pytest.raises(GenerationAborted):
        handle.wait(10)
    del addresses[2]
    group.edit(world(2, addresses), timeout_s=10)
    talk.say("in 2")
    talk.hear()  # it has woken up, and tried
    data = torch.ones(300_000)
    group.all_reduce(data).wait(10)
    group.close()
    return data.eq(2).all().item(), len(faults)


@pytest.mark.multiproc
def test_a_member_that_wakes_up_after_the_world_moved_on_takes_part_in_nothing():
    with Crew(sleeps_through_an_edit, 3) as crew:
        crew.swap()
        assert crew.hear(2) == "here"
        crew.kill(2, signal.SIGSTOP)
        for rank in (0, 1):
            crew.say(rank, "go")
        assert [crew.hear(rank) for rank in (0, 1)] == ["in 2"] * 2
        crew.kill(2, signal.SIGCONT)
        assert crew.results([2]) == ["alone"]
        for rank in (0, 1):
            crew.say(rank, "go")
        assert crew.results([0, 1]) == [(True, 1)] * 2


def link(spare: Group, to: World) -> None:
    """Connect to all of `to`, anew where they let go of it only afterwards."""
    spare.connect(to.members, timeout_s=10)
    parts_by = time.monotonic() + 0.5
    while time.monotonic() < parts_by:
        if spare.parted(to):
            spare.connect(to.members, timeout_s=10)
        time.sleep(0.005)


@pytest.mark.parametrize("stands_by", [0, 1, 2])
def test_who_stands_by_is_linked_to_all_and_let_in_again(stands_by):
    """Whatever its number is, and though it took part before."""
    with together(3) as groups:
        told = threading.Event()
        spare = groups[stands_by]
        spare._engine._on_tell = lambda member, payload: told.set()
        others = {r: g.address for r, g in enumerate(groups) if r != stands_by}
        smaller = world(2, others)
        play([groups[r] for r in others], lambda group: group.edit(smaller, timeout_s=10))
        link(spare, smaller)
        assert not spare._engine.net.missing(smaller.member_ids)
        for r in others:
            told.clear()
            groups[r].tell(MemberId(stands_by), b"come")
            assert told.wait(10)
        assert not any(groups[r].aborted for r in others), "they train meanwhile"
        edited(groups, 3)
        assert works(groups)


def test_two_that_dial_each_other_at_once_keep_one_link():
    groups = [make_group(id_, "tcp")[0] for id_ in (0, 1)]
    try:
        dialled = play(groups, lambda g: dial(g, groups[1 - int(g.member)]))
        for group, greeted in zip(groups, dialled, strict=True):
            group._engine.add_link(greeted)
        edited(groups, 1)
        assert works(groups)
        assert not any(group.aborted for group in groups)
        (one, other) = (g._engine.net.links[MemberId(1 - int(g.member))] for g in groups)
        assert (one.dialled, other.dialled) == (False, True), "the higher number's"
    finally:
        play(groups, lambda group: group.close())


def dial(group: Group, other: Group) -> Any:
    return group._mesh.dial(other.member, other.address, timeout_s=10)
