"""Members that die, stop, lie or stay silent; and the world after them."""

# mypy: allow-untyped-calls

import functools
import os
import signal
import socket
import threading
import time
import zlib

import pytest
import torch

from ftkit.collectives.slot_tree import SlotTree
from ftkit.collectives.slots import assign
from ftkit.core import lifeline
from ftkit.core.errors import GenerationAborted, WireError
from ftkit.core.ids import Generation, MemberId

from .crew import Crew
from .worlds import Faults, config, join, make_group, world

pytestmark = pytest.mark.multiproc

BIG = 3_000_000


def failed_quickly(group, n=BIG):
    """Reduce until it fails; seconds from the last issue to the error."""
    while True:
        t = torch.ones(n)
        begin = time.monotonic()
        try:
            group.all_reduce(t).wait(20)
        except GenerationAborted as error:
            return str(error), time.monotonic() - begin


def canonical_sum(group, slots=8, n=200_003):
    tree = SlotTree(slots)
    for slot in assign(slots, group.size)[group.rank]:
        tree.push(slot, slot_value(slot, n, torch.float32))
    result = torch.empty(n)
    group.reduce_slots(tree.nodes, result, slots=slots).wait(20)
    return zlib.crc32(result.numpy().tobytes())


def survive(rank, size, talk, transport):
    group, faults, _ = join(rank, talk, transport)
    bits = canonical_sum(group)
    t = torch.ones(BIG)
    group.all_reduce(t).wait(20)
    talk.say("training")
    _, took_s = failed_quickly(group)
    generation, lost, _, _ = faults.wait()
    assert generation == 1
    assert group.aborted
    with pytest.raises(GenerationAborted):
        group.exchange(b"too late").wait(5)

    plan = talk.hear()  # {"generation", "addresses"}: the smaller world
    group.edit(world(plan["generation"], plan["addresses"]), timeout_s=20)
    t = torch.ones(BIG)
    group.all_reduce(t).wait(20)
    assert t.eq(size - 1).all(), "the smaller world reduces, and nothing stale is in the sum"
    assert canonical_sum(group) == bits, "fewer ranks, same bits"
    votes = group.exchange(b"%d" % rank).wait(5)
    talk.say("smaller")

    plan = talk.hear()  # the bigger world, with the newcomer
    group.edit(world(plan["generation"], plan["addresses"]), timeout_s=20)
    t = torch.ones(BIG)
    group.all_reduce(t).wait(20)
    assert t.eq(size).all()
    assert canonical_sum(group) == bits
    group.close()
    return {"took_s": took_s, "lost": lost, "faults": len(faults), "votes": len(votes)}


def newcomer(rank, size, talk, transport, id_, addresses):
    group, _ = make_group(id_, transport)
    group.connect(list(world(9, addresses).members), timeout_s=20)
    talk.say(group.address)
    plan = talk.hear()
    group.edit(world(plan["generation"], plan["addresses"]), timeout_s=20)
    t = torch.ones(BIG)
    group.all_reduce(t).wait(20)
    assert t.eq(size).all()
    canonical_sum(group)
    group.close()
    return "joined"


@pytest.mark.parametrize("transport", ["tcp", "auto"])
def test_a_killed_member_ends_every_survivors_operation_and_a_newcomer_takes_its_place(transport):
    with Crew(survive, 4, transport) as crew:
        addresses = dict(crew.swap())
        assert [crew.hear(r) for r in range(4)] == ["training"] * 4
        time.sleep(0.15)  # let them be somewhere in the middle of a reduction
        crew.kill(2)
        left = [0, 1, 3]
        del addresses[2]
        for r in left:
            crew.say(r, {"generation": 2, "addresses": addresses})
        assert [crew.hear(r) for r in left] == ["smaller"] * 3
        crew.add(4, 7, addresses, function=newcomer)
        addresses[7] = crew.hear(4)
        for r in (*left, 4):
            crew.say(r, {"generation": 3, "addresses": addresses})
        *reports, joined = crew.results([*left, 4])
        assert joined == "joined"
        for report in reports:
            assert report["took_s"] < 5
            assert report["lost"] == {2}
            assert report["faults"] == 1
            assert report["votes"] == 3


def stopped_peer(rank, size, talk, transport):
    group, faults, _ = join(rank, talk, transport)
    talk.say(os.getpid())
    talk.hear()  # rank 2 is stopped by now
    errors = []

    def wait():
        try:
            group.all_reduce(torch.ones(BIG)).wait(30)
        except GenerationAborted as error:
            errors.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    if rank == 0:
        time.sleep(0.2)
        assert thread.is_alive(), "a stopped member should hold the operation up"
        for _ in range(3):
            group.abort(Generation(1), "member 2 is stopped")
    thread.join(10)
    assert not thread.is_alive()
    faults.wait()
    begin = time.monotonic()
    group.close()
    return errors, len(faults), time.monotonic() - begin


def test_an_abort_from_another_thread_frees_those_who_wait_for_a_stopped_peer():
    with Crew(stopped_peer, 3, "auto") as crew:
        crew.swap()
        for r in range(3):
            crew.hear(r)
        crew.kill(2, signal.SIGSTOP)
        crew.say(0, "go")
        crew.say(1, "go")
        for errors, faults, close_s in crew.results([0, 1]):
            assert errors == ["member 2 is stopped"]
            assert faults == 1
            assert close_s < 5


def slot_value(slot, n, dtype):
    g = torch.Generator().manual_seed(slot)
    return (torch.randn(n, generator=g) * 10 ** (slot % 4)).to(dtype)


def canonical(rank, size, talk, transport, dtype):
    group, _, _ = join(rank, talk, transport)
    out = {}
    for n in (3, 300_001):
        for slots in (4, 7, 8):
            tree = SlotTree(slots)
            for slot in assign(slots, size)[rank]:
                tree.push(slot, slot_value(slot, n, dtype))
            result = torch.empty(n, dtype=dtype)
            group.reduce_slots(tree.nodes, result, slots=slots, scale=1 / slots).wait(20)
            out[n, slots] = zlib.crc32(result.view(torch.uint8).numpy().tobytes())
            # in place: the result may go where a node lies
            first = tree.nodes[0].value
            group.reduce_slots(tree.nodes, first, slots=slots, scale=1 / slots).wait(20)
            assert torch.equal(first, result)
    group.barrier().wait(10)
    group.close()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_canonical_sum_has_the_same_bits_for_any_world_and_transport(dtype):
    results = []
    for transport, size in [("auto", 1), ("auto", 2), ("tcp", 3), ("auto", 4), ("tcp", 4)]:
        with Crew(canonical, size, transport, dtype) as crew:
            results += crew.results()
    reference = results[0]
    for n, slots in reference:
        exact = sum(slot_value(s, n, dtype).double() for s in range(slots)) / slots
        assert exact.isfinite().all()
    assert all(result == reference for result in results)


def strangers(rank, size, talk):
    group, faults, _ = join(rank, talk, "auto", greeting_timeout_s=1.0)
    if rank == 0:
        talk.say(group.address)
        talk.hear()
    for _ in range(20):
        group.all_reduce(torch.ones(1000)).wait(10)
    talk.everyone("done")
    threads = threading.active_count()
    group.close()
    return len(faults), threads


def test_strangers_neither_get_in_nor_hold_anybody_up():
    with Crew(strangers, 2) as crew:
        crew.swap()
        address = tuple(crew.hear(0))
        silent = socket.create_connection(address)
        garbage = socket.create_connection(address)
        garbage.sendall(os.urandom(500))
        impostor_faults = Faults()
        from ftkit.collectives.group import Group

        impostor = Group(
            member=MemberId(5),
            secret=b"not the job's secret",
            on_fault=impostor_faults,
            config=config(),
        )
        with pytest.raises(WireError):
            impostor.connect(list(world(1, {0: address}).members), timeout_s=5)
        impostor.close()
        silent.settimeout(10)
        silent.recv(100)  # the greeting of the other side
        assert silent.recv(100) == b"", "the silent stranger was not put out"
        crew.say(0, "go")
        crew.swap()
        for faults, _ in crew.results():
            assert faults == 0
        silent.close()
        garbage.close()


def fds():
    return set(os.listdir("/proc/self/fd"))


def leaves_nothing(rank, size, talk):
    lifeline.own()  # stays as long as the process
    before_fds, before_threads = fds(), threading.active_count()
    for turn in range(3):
        group, faults, _ = join(rank, talk, "auto")
        group.all_reduce(torch.ones(100_000)).wait(10)
        handle = group.exchange(b"x") if rank == 0 and turn == 2 else None
        group.close()
        group.close()
        if handle is not None:
            with pytest.raises(GenerationAborted):
                handle.wait(5)
        with pytest.raises(GenerationAborted):
            group.exchange(b"after").wait(5)
        assert not [f for f in faults if "left" not in f[2]], faults
        talk.everyone("closed")
    return len(fds() - before_fds), threading.active_count() - before_threads


def test_close_leaves_neither_threads_nor_descriptors():
    with Crew(leaves_nothing, 3) as crew:
        assert crew.results() == [(0, 0)] * 3


def leaves_first(rank, size, talk, how):
    group, faults, addresses = join(rank, talk, "auto")
    data = torch.full((1 << 20,), rank + 1.0)
    if rank == 1:
        handle = group.all_reduce(data)
        time.sleep(0.1)
        # It has shown its data by now, and looks at the other's only after this.
        asleep = threading.Event()
        group._engine.call(asleep.set)
        group._engine.call(functools.partial(time.sleep, 0.3))
        asleep.wait()
        talk.everyone("asleep")
    else:
        talk.everyone("asleep")
        handle = group.all_reduce(data)
    handle.wait(10)
    if how == "edit":
        group.edit(world(2, addresses), timeout_s=10)
        assert not faults
        talk.everyone("edited")
    group.close()
    return data.unique().tolist()


@pytest.mark.parametrize("how", ["close", "edit"])
def test_who_is_through_first_lets_the_others_read_before_it_leaves(how):
    with Crew(leaves_first, 2, how) as crew:
        assert crew.results() == [[3.0], [3.0]]


def goodbye(rank, size, talk):
    group, faults, _ = join(rank, talk, "auto")
    group.barrier().wait(10)
    if rank == 1:
        group.close()
        talk.everyone("left")
        return None
    talk.everyone("left")
    time.sleep(0.1)
    assert not faults, "leaving cleanly is no fault"
    assert not group.aborted
    with pytest.raises(GenerationAborted, match="left"):
        group.barrier().wait(10)
    _, lost, _, _ = faults.wait()
    group.close()
    return lost


def test_a_goodbye_is_a_fault_only_for_those_who_need_the_one_who_left():
    with Crew(goodbye, 2) as crew:
        assert crew.results()[0] == {1}


def disagree(rank, size, talk):
    group, faults, _ = join(rank, talk, "tcp")
    group.broadcast(torch.zeros(100 + rank), 0)
    with pytest.raises(GenerationAborted) as error:
        group.barrier().wait(10)
    faults.wait()
    group.close()
    return str(error.value)


def test_ranks_that_disagree_about_a_shape_are_told_so():
    with Crew(disagree, 2) as crew:
        assert all("disagree" in r for r in crew.results())


def aborts_of_the_future(rank, size, talk):
    group, _, addresses = join(rank, talk, "auto")
    if rank == 0:
        group.abort(Generation(2), "member 1 will not come")
        with pytest.raises(ValueError, match="already"):
            group.edit(world(1, addresses), timeout_s=1)
    group.barrier().wait(10)  # generation 1 is untouched
    if rank == 0:
        later = dict(addresses) | {3: ("127.0.0.1", 1)}
        with pytest.raises((GenerationAborted, WireError)):
            group.edit(world(2, later), timeout_s=10)
        group.edit(world(3, addresses), timeout_s=10)
    else:
        group.edit(world(3, addresses), timeout_s=10)
    group.barrier().wait(10)
    told = talk.everyone("in 3")
    group.close()
    return len(told)


def test_an_abort_of_a_generation_to_come_ends_the_edit_that_waits_for_it():
    with Crew(aborts_of_the_future, 2) as crew:
        assert crew.results() == [2, 2]


def fast_sender(rank, size, talk):
    """One rank runs far ahead; the other's memory must not fill up with what is early."""
    group, faults, _ = join(rank, talk, "tcp", early_bytes_max=4 << 20)
    n = 3_000_000
    if rank == 0:
        handles = [group.broadcast(torch.full((n,), float(i)), 0) for i in range(8)]
        for h in handles:
            h.wait(20)
    else:
        time.sleep(0.5)
        link = group._engine.net.links[MemberId(0)]
        early = link.early_bytes
        assert early <= 4 << 20 or link.parked
        for i in range(8):
            t = torch.empty(n)
            group.broadcast(t, 0).wait(20)
            assert t.eq(i).all()
    group.barrier().wait(10)
    group.close()
    return len(faults)


def test_a_rank_that_runs_ahead_is_held_back_not_buffered():
    with Crew(fast_sender, 2) as crew:
        assert crew.results() == [0, 0]


def talks(rank, size, talk):
    told = []
    arrived = threading.Event()

    def on_tell(member, payload):
        told.append((member, payload))
        arrived.set()

    from ftkit.collectives.group import Group

    from .worlds import SECRET

    group = Group(
        member=MemberId(rank), secret=SECRET, on_fault=Faults(), on_tell=on_tell, config=config()
    )
    addresses = dict(talk.everyone((rank, group.address)))
    group.edit(world(1, addresses), timeout_s=20)
    group.abort(Generation(1), "told in any generation")
    group.tell(MemberId(1 - rank), b"hello from %d" % rank)
    assert arrived.wait(10)
    with pytest.raises(WireError):
        group.tell(MemberId(42), b"nobody")
    talk.everyone("done")
    group.close()
    return told


def test_what_is_told_arrives_whatever_the_generation():
    with Crew(talks, 2) as crew:
        assert crew.results() == [[(1, b"hello from 1")], [(0, b"hello from 0")]]
