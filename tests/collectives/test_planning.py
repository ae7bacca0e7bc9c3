"""The ring in use: measured, agreed by all, changed between two operations."""

import signal
import socket
import time

import pytest
import torch

from ftkit.collectives.meter import WINDOW_BYTES, Pace
from ftkit.core.errors import GenerationAborted
from tests.collectives.crew import Crew
from tests.collectives.worlds import join, world

SO_MAX_PACING_RATE = 47
SLOW = 8e6

pytestmark = pytest.mark.multiproc


def cap(group, peer, rate=SLOW):
    """Let each connection to `peer` send at most `rate` bytes a second."""
    for lane in group._engine.net.links[peer].lanes:
        lane.sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, int(rate))


def hosts_of_their_own(rank, talk, **more):
    group, faults, _ = join(rank, talk, transport="tcp", host=f"127.0.0.{rank + 1}", **more)
    return group, faults


def reduced(group, megabytes):
    data = torch.full((megabytes << 18,), float(group.rank + 1))
    group.all_reduce(data).wait(30)
    return bool((data == sum(range(1, group.size + 1))).all())


def plan_and_plan_again(rank, size, talk):
    group, faults = hosts_of_their_own(rank, talk, plan_every=0)
    wanted = [group.wants_plan]
    if rank < 2:
        cap(group, 1 - rank)
    first = group.plan_ring().wait(30)
    right = [reduced(group, 2)]
    # What the plan chose becomes slow; one member sees it, and all plan again.
    before = group.ring.index(rank) - 1
    victim, after = first.order[0], first.order[1]
    if rank == victim:
        cap(group, after)
    limit = time.monotonic() + 20
    while not any(talk.everyone(group.wants_plan)):
        assert time.monotonic() < limit, "nobody noticed the slow edge"
        right.append(reduced(group, 2))
    second = group.plan_ring().wait(30)
    # Different forms of the same bytes: around the new ring, by chain, and from a subset.
    right.append(reduced(group, 2))
    data = torch.full((1 << 20,), float(rank))
    group.broadcast(data, 2).wait(30)
    right.append(bool((data == 2).all()))
    sent = {peer: traffic.sent for peer, traffic in group.traffic.items()}
    talk.everyone("done")
    group.close()
    return {
        "wanted": wanted[0],
        "first": first,
        "second": second,
        "right": right,
        "before": before,
        "sent": sent,
        "faults": list(faults),
    }


def test_the_ring_avoids_a_slow_link_and_is_planned_again_when_an_edge_becomes_slow():
    with Crew(plan_and_plan_again, 4) as crew:
        results = crew.results()
    for key in ("first", "second"):
        assert len({r[key] for r in results}) == 1
    first, second = results[0]["first"], results[0]["second"]
    slow = {(0, 1), (1, 0)}
    assert not slow & edges(first)
    assert first.slowest > 2 * SLOW
    assert not (slow | {first.order[:2]}) & edges(second)
    assert all(r["wanted"] and all(r["right"]) and not r["faults"] for r in results)
    # Probes and passive counts saw the cap as what it is.
    rate = results[0]["sent"][1].rate
    assert rate is not None
    assert 0.5 * SLOW < rate < 1.5 * SLOW
    assert results[0]["sent"][1].nbytes > 1 << 20


def edges(ring):
    return set(zip(ring.order, (*ring.order[1:], ring.order[0]), strict=True))


def rings_of_themselves(rank, size, talk):
    group, faults = hosts_of_their_own(rank, talk, plan_every=2, probe_s=0.1)
    if rank < 2:
        cap(group, 1 - rank)
    rings, right = [group.ring], []
    for _ in range(4):
        right.append(reduced(group, 2))
        rings.append(group.ring)
    talk.everyone("done")
    group.close()
    return rings, right, list(faults)


def test_a_ring_plans_itself_with_its_first_operation_and_the_same_on_all_members():
    with Crew(rings_of_themselves, 4) as crew:
        results = crew.results()
    assert all(results[0][0] == r[0] and all(r[1]) and not r[2] for r in results)
    rings = results[0][0]
    assert rings[0] == (0, 1, 2, 3)
    for order in rings[1:]:
        assert not {(0, 1), (1, 0)} & set(zip(order, (*order[1:], order[0]), strict=True))


def killed_in_a_plan(rank, size, talk):
    group, faults, addresses = join(
        rank, talk, transport="tcp", host=f"127.0.0.{rank + 1}", probe_s=5.0
    )
    handle = group.plan_ring()
    talk.say("planning")
    with pytest.raises(GenerationAborted):
        handle.wait(30)
    lost = sorted(faults.wait()[1])
    survivors = {r: addresses[r] for r in (0, 1, 2)}
    group.edit(world(2, survivors), timeout_s=20)
    ring, wants = group.ring, group.wants_plan
    right = group.broadcast(torch.zeros(1 << 20), 1).wait(30) is None
    talk.everyone("done")
    group.close()
    return lost, ring, wants, right


def test_a_member_killed_in_a_plan_ends_it_and_the_next_generation_begins_in_natural_order():
    with Crew(killed_in_a_plan, 4) as crew:
        crew.swap()
        for rank in range(4):
            assert crew.hear(rank) == "planning"
        crew.kill(3, signal.SIGKILL)  # probes take 15 s
        results = crew.results([0, 1, 2])
    assert results == [([3], (0, 1, 2), True, True)] * 3


def one_host(rank, size, talk):
    group, _, _ = join(rank, talk)
    wants, ring = group.wants_plan, group.plan_ring().wait(30)
    right = reduced(group, 4)
    group.broadcast(torch.zeros(1 << 20), 0).wait(30)
    read = {peer: traffic.read for peer, traffic in group.traffic.items()}
    talk.everyone("done")
    group.close()
    return wants, ring.order, right, read


def test_on_one_host_there_is_nothing_to_plan_and_memory_reads_are_counted():
    with Crew(one_host, 3) as crew:
        results = crew.results()
    assert [(r[0], r[1], r[2]) for r in results] == [(False, (0, 1, 2), True)] * 3
    for rank, (_, _, _, read) in enumerate(results):
        assert set(read) == {0, 1, 2} - {rank}
        if rank and read[0] is not None:  # else memory cannot be read here
            assert read[0].nbytes >= 4 << 20
            assert read[0].rate > 1e8


def test_a_pace_tells_its_last_windows():
    pace = Pace()
    assert pace.flow.rate is None
    pace.add(2 << 20, 0.01)
    assert pace.flow.rate == pytest.approx((2 << 20) / 0.01)
    assert pace.windows == ()
    pace.add(1 << 20, 0.19)
    assert list(pace.windows) == pytest.approx([(3 << 20) / 0.2])
    pace.add(WINDOW_BYTES, 0.05)
    assert list(pace.windows) == pytest.approx([WINDOW_BYTES / 0.05, (3 << 20) / 0.2])
    pace.add(1, 1.0)
    assert list(pace.windows) == pytest.approx([1, WINDOW_BYTES / 0.05])
    assert pace.flow.nbytes == (3 << 20) + WINDOW_BYTES + 1
