"""Several connections to a member: faster under a cap, and as safe as one."""

import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ftkit.collectives.frames import HEADER_BYTES, Header, Kind, parse
from ftkit.collectives.fuse import Fuse
from ftkit.collectives.lanes import LaneDesk, LaneKey
from ftkit.collectives.link import Link, Ticket
from ftkit.core.errors import GenerationAborted, WireError
from ftkit.core.ids import MemberId
from tests.collectives.crew import Crew
from tests.collectives.test_planning import cap, reduced
from tests.collectives.worlds import join, make_group, world

LANES = 4


def pair(lanes):
    """A link of several lanes, and the far ends of its sockets."""
    root, far = None, []
    for _ in range(lanes):
        a, b = socket.socketpair()
        lane = Link(
            a,
            MemberId(1),
            cma=None,
            can_offer=False,
            segment_bytes=1 << 20,
            fuse=Fuse(),
            root=root,
        )
        root = root or lane
        far.append(b)
    return root, far


def frames_of(sock):
    sock.settimeout(5)
    data, frames = b"", []
    while True:
        chunk = sock.recv(1 << 20)
        if not chunk:
            break
        data += chunk
    while data:
        header = parse(data)
        frames.append((header, data[HEADER_BYTES : HEADER_BYTES + header.length]))
        data = data[HEADER_BYTES + header.length :]
    return frames


def test_a_message_is_cut_over_all_lanes_and_is_done_when_the_last_piece_is_out():
    link, far = pair(3)
    payload = bytes(range(256)) * (3 << 12)  # 3 MiB
    header = Header(Kind.DATA, 0, 0, 1, 7, 0, 0, 0, 0, len(payload), len(payload))
    ticket = Ticket()
    with ThreadPoolExecutor(3) as readers:
        reading = [readers.submit(frames_of, sock) for sock in far]
        link.queue(header, memoryview(payload), ticket, urgent=False)
        link.say_goodbye(Header(Kind.BYE, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0))
        while any(lane.has_output for lane in link.lanes):
            assert not (ticket.done and link.owes)
            for lane in link.lanes:
                lane.flush()
        assert ticket.done
        for lane in link.lanes:
            lane.close()
        received = [future.result() for future in reading]
    for sock in far:
        sock.close()
    # On every lane pieces of the message, then the goodbye, and nothing after it.
    assert all(
        [h.kind for h, _ in frames].index(Kind.BYE) == len(frames) - 1 for frames in received
    )
    pieces = sorted(
        (h.offset, data) for frames in received for h, data in frames if h.kind is Kind.DATA
    )
    assert b"".join(data for _, data in pieces) == payload
    assert all(len(frames) > 1 for frames in received)


def test_lanes_are_handed_over_all_together_or_closed():
    desk, key = LaneDesk(0.05), LaneKey(MemberId(3), "word")
    socks = [socket.socketpair() for _ in range(3)]
    desk.bring(key, socks[0][0])
    desk.bring(key, socks[1][0])
    assert desk.collect(key, 2) == (socks[0][0], socks[1][0])
    desk.bring(key, socks[2][0])
    with pytest.raises(WireError, match="1 of 2"):
        desk.collect(key, 2)
    assert socks[2][0].fileno() == -1
    desk.close()
    with pytest.raises(WireError):
        desk.collect(key, 1)
    for a, b in socks:
        a.close()
        b.close()


def capped(rank, size, talk, connections):
    group, faults, _ = join(rank, talk, transport="tcp", connections=connections)
    cap(group, 1 - rank, 20e6)
    right = [reduced(group, 1)]
    right.append(reduced(group, 4))
    lanes = len(group._engine.net.links[MemberId(1 - rank)].lanes)
    talk.everyone("done")
    group.close()
    return right, lanes, list(faults)


@pytest.mark.multiproc
def test_capped_connections_carry_what_one_carries():
    # How much faster four are is the benchmark's to say.
    for connections in (1, LANES):
        with Crew(capped, 2, connections) as crew:
            assert crew.results() == [([True, True], connections, [])] * 2


def abort_and_go_on(rank, size, talk):
    group, faults, addresses = join(rank, talk, transport="tcp", connections=LANES)
    for peer in {0, 1, 2} - {rank}:
        cap(group, peer, 20e6)
    right = [reduced(group, 1)]
    talk.say("ready")
    if rank == 2:
        group.light_fuse(1 << 20, lambda: os.kill(os.getpid(), signal.SIGKILL))
        group.all_reduce(torch.ones(16 << 18)).wait(60)  # dies in it
    handle = group.all_reduce(torch.ones(16 << 18))
    with pytest.raises(GenerationAborted):
        handle.wait(30)
    lost = faults.wait()[1]
    group.edit(world(2, {r: addresses[r] for r in (0, 1)}), timeout_s=20)
    right += [reduced(group, 1) for _ in range(3)]
    # A whole leave: the last bytes are on their way on four lanes, and are not cut short.
    last = torch.ones(1 << 18)
    group.all_reduce(last).wait(30)
    group.close()
    return right, sorted(lost), float(last[0]), len(faults)


@pytest.mark.multiproc
def test_a_member_killed_in_mid_transfer_leaves_the_lanes_of_the_others_in_frame():
    with Crew(abort_and_go_on, 3) as crew:
        crew.swap()
        for rank in range(3):
            assert crew.hear(rank) == "ready"
        results = crew.results([0, 1])
    assert results == [([True] * 4, [2], 2.0, 1)] * 2


def leave_at_once(rank, size, talk):
    group, faults = make_group(rank, "tcp", connections=LANES)
    addresses = dict(talk.everyone((rank, group.address)))
    group.edit(world(1, addresses), timeout_s=20)
    group.barrier().wait(30)
    data = torch.full((3 << 18,), float(rank))
    handle = group.broadcast(data, 0)
    handle.wait(30)
    # The root is done when the kernel has all, and leaves while the others still read.
    group.close()
    return float(data.sum()), list(faults)


@pytest.mark.multiproc
def test_who_leaves_after_its_last_operation_cuts_nobody_short():
    for _ in range(3):
        with Crew(leave_at_once, 3) as crew:
            assert crew.results() == [(0.0, [])] * 3
