"""The relay passes bytes on, slows them, and cuts real connections."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from ftkit.core.detour import VARIABLE, Detour
from ftkit.core.errors import UsageError
from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.world import Member
from ftkit.launch.relay import Relay


@pytest.fixture
def relay() -> Iterator[Relay]:
    made = Relay()
    yield made
    before = threading.active_count()
    made.close()
    made.close()
    assert threading.active_count() <= before


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.settimeout(5)
        yield made


def dial(relay: Relay, listener: socket.socket, seat: int, to: int) -> socket.socket:
    host, port = listener.getsockname()
    detour = Detour(relay.address, Seat(seat))
    member = Member(member=MemberId(to), seat=Seat(to), node=NodeId(0), host=host, port=port)
    sock = detour.connect(member, 5)
    sock.settimeout(5)
    return sock


def test_bytes_come_through_both_ways_and_ends_are_passed_on(
    relay: Relay, listener: socket.socket
) -> None:
    with dial(relay, listener, 2, 0) as near:
        far, _ = listener.accept()
        with far:
            near.sendall(b"x" * 300_000)
            got = bytearray()
            while len(got) < 300_000:
                got += far.recv(1 << 16)
            assert bytes(got) == b"x" * 300_000
            far.sendall(b"answer")
            assert near.recv(100) == b"answer"
            near.shutdown(socket.SHUT_WR)
            assert far.recv(100) == b"", "the end of a stream is passed on"
            far.sendall(b"last words")
            assert near.recv(100) == b"last words"


def test_a_cut_ends_what_there_is_and_refuses_what_comes_until_it_is_healed(
    relay: Relay, listener: socket.socket
) -> None:
    with dial(relay, listener, 2, 0) as near, dial(relay, listener, 1, 0) as other:
        far, _ = listener.accept()
        far_other, _ = listener.accept()
        with far, far_other:
            near.sendall(b"2")
            other.sendall(b"1")
            by_word = {s.recv(1): s for s in (far, far_other)}
            assert relay.cut(0, 2) == 1
            assert near.recv(1) == b""
            by_word[b"2"].settimeout(5)
            assert by_word[b"2"].recv(1) == b"", "both ends see it"
            other.sendall(b"!")
            assert by_word[b"1"].recv(1) == b"!", "another link is whole"
    with dial(relay, listener, 0, 2) as again:
        assert again.recv(1) == b""
    relay.heal()
    with dial(relay, listener, 2, 0) as near:
        far, _ = listener.accept()
        with far:
            near.sendall(b"back")
            assert far.recv(10) == b"back"


def test_a_slow_link_carries_what_it_may(relay: Relay, listener: socket.socket) -> None:
    relay.slow([(1, 0)], 400_000)
    with dial(relay, listener, 1, 0) as near:
        far, _ = listener.accept()
        with far:
            begin, left = time.monotonic(), 200_000
            near.sendall(bytes(left))
            while left:
                left -= len(far.recv(1 << 16))
            slow_s = time.monotonic() - begin
            assert slow_s > 0.4
            begin, left = time.monotonic(), 200_000
            far.sendall(bytes(left))
            while left:
                left -= len(near.recv(1 << 16))
            assert time.monotonic() - begin < slow_s, "the other way is not slow"


def test_what_is_held_breaks_nothing_and_comes_when_it_is_released(
    relay: Relay, listener: socket.socket
) -> None:
    with dial(relay, listener, 1, 0) as near:
        far, _ = listener.accept()
        with far:
            relay.hold(0, 1)
            near.sendall(b"later")
            far.sendall(b"as well")
            with dial(relay, listener, 0, 1) as fresh:
                other, _ = listener.accept()
                with other:
                    fresh.sendall(b"and this")
                    for sock in (near, far, other):
                        sock.settimeout(0.1)
                        with pytest.raises(TimeoutError):
                            sock.recv(1)
                        sock.settimeout(5)
                    relay.heal()
                    assert far.recv(10) == b"later"
                    assert near.recv(10) == b"as well"
                    assert other.recv(10) == b"and this"
            relay.hold(0, 1)
            near.sendall(b"never")


def test_strangers_and_dead_ends_cost_nothing_but_their_connection(relay: Relay) -> None:
    for line in (b"GET / HTTP/1.1\r\n", b"[]\n", b'{"from": 1}\n', b"x" * 5000 + b"\n"):
        with socket.create_connection(relay.address) as sock:
            sock.settimeout(5)
            sock.sendall(line)
            try:
                assert sock.recv(1) == b""
            except ConnectionResetError:
                pass  # closed with bytes unread
    nobody = {"from": 1, "to": 0, "host": "127.0.0.1", "port": 1}
    with socket.create_connection(relay.address) as sock:
        sock.settimeout(5)
        sock.sendall(json.dumps(nobody).encode() + b"\n")
        assert sock.recv(1) == b""


def test_a_detour_is_there_in_a_drill_of_links_and_nowhere_else() -> None:
    assert Detour.read({}, Seat(0)) is None
    assert Detour.read({VARIABLE: "127.0.0.1:9"}, Seat(0)) is not None
    with pytest.raises(UsageError, match="not HOST:PORT"):
        Detour.read({VARIABLE: "nonsense"}, Seat(0))
