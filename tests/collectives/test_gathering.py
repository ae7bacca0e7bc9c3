"""What a payload lacks gathers in the kernel: a link is woken for much of it, or for all."""

import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ftkit.collectives.frames import Header, Kind, pack
from ftkit.collectives.link import gathered_bytes_max
from ftkit.collectives.linkset import LinkSet
from ftkit.collectives.mesh import Greeted
from ftkit.core.ids import MemberId
from tests.collectives.test_frames import Inbox

PEER = MemberId(1)
PAYLOAD = bytes(range(256)) * 1024
SOON_S = 5.0


def frame(payload: bytes, seq: int = 0) -> bytes:
    size = len(payload)
    return pack(Header(Kind.DATA, 0, 0, 1, seq, 0, 0, PEER, 0, size, size)) + payload


@contextmanager
def linked() -> Iterator[tuple[LinkSet, Inbox, socket.socket]]:
    """A set of one link, what it received, and the peer's end of it."""
    links = LinkSet(1 << 20, lambda command: command(), lambda link, reason: None)
    inbox = Inbox()
    links.router = inbox
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    links.add(Greeted(sock=sock, peer=PEER, process="", cma=None, can_offer=False, dialled=True))
    try:
        yield links, inbox, far
    finally:
        links.close()
        far.close()


def serve(links: LinkSet, patience_s: float) -> bool:
    """One look; whether the link was served."""
    events = links.poll(patience_s)
    for fd, event in events:
        link = links.by_fd(fd)
        assert link is not None
        links.serve(link, event)
    return bool(events)


@pytest.mark.skipif(
    gathered_bytes_max(platform.release()) == 1, reason="this kernel tells of everything"
)
def test_it_is_not_woken_before_the_rest_is_there() -> None:
    data, cut = frame(PAYLOAD), 100_000
    with linked() as (links, inbox, far):
        far.sendall(data[:1000])
        assert serve(links, SOON_S)
        far.sendall(data[1000:cut])
        while serve(links, 0):
            pass  # the beginning may have come in two parts
        assert bytes(inbox.messages[0])[: cut - 200] != PAYLOAD[: cut - 200]
        far.sendall(data[cut:])
        while bytes(inbox.messages[0]) != PAYLOAD:
            assert serve(links, SOON_S)


def test_a_payload_that_is_heard_out_leaves_no_mark_behind() -> None:
    """What is read without having been told of, too, ends with a link that wakes for anything."""
    data = frame(PAYLOAD)
    with linked() as (links, inbox, far):
        far.sendall(data[:1000])
        assert serve(links, SOON_S)
        far.sendall(data[1000:])
        link = links.links[PEER]
        while bytes(inbox.messages[0]) != PAYLOAD:
            link.receive(inbox)
        far.sendall(frame(b"x", 1))
        assert serve(links, SOON_S)
        assert inbox.messages[1] == b"x"


@pytest.mark.parametrize(
    ("kernel", "gathers"),
    [
        ("6.18.44-fc", True),
        ("5.12", True),
        ("5.4.0-99-generic", False),
        ("4.18.0-553.el8", False),
        ("?", False),
    ],
)
def test_kernels_that_might_not_tell_are_left_to_tell_of_everything(
    kernel: str, gathers: bool
) -> None:
    assert (gathered_bytes_max(kernel) > 1) is gathers


def test_short_messages_and_the_end_are_told_at_once() -> None:
    with linked() as (links, inbox, far):
        far.sendall(frame(PAYLOAD, 0))
        while bytes(inbox.messages.get(0, b"")) != PAYLOAD:
            assert serve(links, SOON_S)
        far.sendall(frame(b"x", 1))
        assert serve(links, SOON_S)
        assert inbox.messages[1] == b"x"
        far.sendall(frame(PAYLOAD, 2)[:1000])
        assert serve(links, SOON_S)
        far.close()
        assert serve(links, SOON_S)
        assert PEER not in links.links


@pytest.mark.parametrize("size", [0, 1, 70_000, 3 << 20])
def test_messages_of_all_sizes_arrive_in_any_pieces(size: int) -> None:
    payload = (PAYLOAD * 16)[:size]
    cuts = [1 << 20] * (size >> 20) + [size % (1 << 20)]
    at, data = 0, b""
    for length in cuts:
        header = Header(Kind.DATA, 0, 0, 1, 0, 0, 0, PEER, at, size, length)
        data += pack(header) + payload[at : at + length]
        at += length
    with linked() as (links, inbox, far):
        far.setblocking(False)
        sent = 0
        while sent < len(data) or bytes(inbox.messages.get(0, b"-")) != payload:
            if sent < len(data):
                try:
                    sent += far.send(data[sent : sent + 77_777])
                except BlockingIOError:
                    pass
            assert serve(links, 0) or sent < len(data) or serve(links, SOON_S)
