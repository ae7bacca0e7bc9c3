"""Who holds the secret gets in; whoever does not is refused in bounded time and memory."""

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import AuthenticationError, FtkitError, ProtocolError, WireError
from ftkit.core.wire import (
    HELLO_BYTES_MAX,
    MAGIC,
    MESSAGE_BYTES_MAX,
    NONCE_BYTES,
    Line,
    admit,
    authenticate,
    connect,
    listen,
    listen_unix,
    receive_message,
    send_message,
)

SECRET = b"s" * 32


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@contextmanager
def beside(action: Callable[[], object]) -> Iterator[list[Any]]:
    """Run `action` on a thread; its result, or its ftkit error, is in the list afterwards."""
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(action())
        except (FtkitError, OSError) as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield results
    finally:
        thread.join(timeout=30)
        assert not thread.is_alive()


def serve(sock: socket.socket, **words: Any) -> dict[str, Any]:
    return authenticate(sock, SECRET, server=True, timeout_s=5, **words)


def test_both_sides_learn_who_the_other_is() -> None:
    with pair() as (a, b):
        with beside(lambda: serve(a, hello={"role": "agent"})) as server:
            assert authenticate(b, SECRET, server=False, hello={"seat": 2}) == {"role": "agent"}
        assert server == [{"seat": 2}]
        assert a.gettimeout() is None
        assert b.gettimeout() is None


def test_another_jobs_secret_is_refused_on_both_sides() -> None:
    with pair() as (a, b):
        with (
            beside(lambda: serve(a)) as server,
            pytest.raises(AuthenticationError, match="secret"),
        ):
            authenticate(b, b"x" * 32, server=False)
        assert isinstance(server[0], AuthenticationError)


def test_both_in_the_same_role_is_refused() -> None:
    with pair() as (a, b):
        with beside(lambda: serve(a)) as server, pytest.raises(AuthenticationError):
            authenticate(b, SECRET, server=True)
        assert isinstance(server[0], AuthenticationError)


KEY = b"k" * 32


@pytest.mark.parametrize(("held", "visitor", "visits"), [(SECRET, False, False), (KEY, True, True)])
def test_a_visitor_is_told_from_those_who_hold_the_secret(held, visitor, visits) -> None:
    with pair() as (a, b):
        with beside(lambda: admit(a, SECRET, visitors=KEY, hello={"node": 1})) as server:
            hello = {"role": "coordinator"}
            told = authenticate(b, held, server=False, hello=hello, visitor=visitor)
            assert told == {"node": 1}
        assert server == [(visits, {"role": "coordinator"})]


@pytest.mark.parametrize(
    ("held", "visitor", "visitors"),
    [
        (KEY, False, KEY),  # a visitor who claims to be more
        (SECRET, True, KEY),
        (b"x" * 32, True, KEY),
        (KEY, True, None),  # where none are let in
    ],
)
def test_a_visitor_s_key_opens_its_own_door_alone(held, visitor, visitors) -> None:
    with pair() as (a, b):

        def let_in() -> object:
            with a:  # as the door does
                return admit(a, SECRET, visitors=visitors)

        with beside(let_in) as server, pytest.raises(WireError):
            authenticate(b, held, server=False, visitor=visitor, timeout_s=5)
        assert isinstance(server[0], AuthenticationError)


def test_an_answer_is_waited_for_as_long_as_was_said() -> None:
    with pair() as (a, b):
        line = Line(a)
        line.answer_within(0.05)
        with pytest.raises(WireError):
            line.receive()
        send_message(b, {"late": True})
        assert line.receive() == {"late": True}


def test_an_echo_of_our_own_greeting_is_seen() -> None:
    def echo(sock: socket.socket) -> None:
        sock.sendall(sock.recv(4096))

    with (
        pair() as (a, b),
        beside(lambda: echo(b)),
        pytest.raises(AuthenticationError, match="reflected"),
    ):
        serve(a)


def test_our_own_proof_sent_back_under_another_nonce_is_no_proof() -> None:
    def reflect(sock: socket.socket) -> None:
        sock.recv(4096)
        sock.sendall(MAGIC + os.urandom(NONCE_BYTES))
        sock.sendall(sock.recv(4096))

    with (
        pair() as (a, b),
        beside(lambda: reflect(b)),
        pytest.raises(AuthenticationError, match="secret"),
    ):
        serve(a)


def test_a_recorded_conversation_does_not_open_the_door_again() -> None:
    recorded: list[bytes] = []
    with pair() as (a, b):
        real = b.sendall

        class Recorder:
            """A socket that remembers what it sent."""

            def __getattr__(self, name: str) -> Any:
                return getattr(b, name)

            def sendall(self, data: bytes) -> None:
                recorded.append(bytes(data))
                real(data)

        with beside(lambda: serve(a)):
            authenticate(Recorder(), SECRET, server=False)  # type: ignore[arg-type]
    with pair() as (a, b):
        b.sendall(b"".join(recorded))
        with pytest.raises(AuthenticationError, match="secret"):
            serve(a)


def test_another_protocol_is_named() -> None:
    with pair() as (a, b):
        b.sendall(b"GET / HTTP/1.1\r\nHost: localhost:12345\r\nAccept: */*\r\n\r\n")
        with pytest.raises(ProtocolError, match="GET / HT"):
            serve(a)


@given(st.binary(max_size=200))
def test_garbage_gets_nowhere(data: bytes) -> None:
    with pair() as (a, b):
        b.sendall(data)
        b.shutdown(socket.SHUT_WR)
        with pytest.raises(WireError):
            serve(a)


def test_silence_ends_by_the_timeout() -> None:
    with pair() as (a, b):
        with pytest.raises(WireError, match=r"more than 0\.05 s"):
            authenticate(a, SECRET, server=True, timeout_s=0.05)
        assert b.recv(len(MAGIC)) == MAGIC


def test_who_drips_is_waited_for_no_longer_than_who_is_silent() -> None:
    with pair() as (a, b):

        def drip() -> None:
            with contextlib.suppress(OSError):
                for byte in MAGIC + bytes(1000):
                    b.sendall(bytes([byte]))
                    time.sleep(0.02)

        dripping = threading.Thread(target=drip)
        dripping.start()
        with pytest.raises(WireError, match=r"more than 0\.1 s"):
            authenticate(a, SECRET, server=True, timeout_s=0.1)
        a.close()
        dripping.join()


def test_a_hello_may_not_be_large() -> None:
    large = {"x": "y" * HELLO_BYTES_MAX}
    with (
        pair() as (a, b),
        beside(lambda: authenticate(b, SECRET, server=False, hello=large)),
        a,
        pytest.raises(ProtocolError, match=f"at most {HELLO_BYTES_MAX}"),
    ):
        serve(a)


def test_an_oversize_message_is_refused_before_it_is_read() -> None:
    with pair() as (a, b):
        b.sendall(struct.pack("!I", MESSAGE_BYTES_MAX + 1))
        with pytest.raises(ProtocolError, match=f"announces {MESSAGE_BYTES_MAX + 1} bytes"):
            receive_message(a)
        with pytest.raises(ValueError, match="exceeds"):
            send_message(b, {"x": "y" * MESSAGE_BYTES_MAX})


@pytest.mark.parametrize("body", [b"{", b"[1]", b"3", b"null", b"\xff\xfe", b"", b"[" * 100_000])
def test_a_message_is_a_json_object_or_a_protocol_error(body: bytes) -> None:
    with (
        pair() as (a, b),
        beside(lambda: b.sendall(struct.pack("!I", len(body)) + body)),
        pytest.raises(ProtocolError, match="message is"),
    ):
        receive_message(a)


def test_a_message_cut_short_says_how_much_came() -> None:
    with pair() as (a, b):
        b.sendall(struct.pack("!I", 10) + b"{}")
        b.close()
        with pytest.raises(WireError, match="2 of 10 bytes"):
            receive_message(a)


@pytest.fixture(params=["unix", "tcp", "tcp6"])
def listener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[socket.socket]:
    if request.param == "unix":
        sock = listen_unix(str(tmp_path / "s"))
        assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    else:
        try:
            sock = listen("127.0.0.1" if request.param == "tcp" else "::1")
        except OSError:
            pytest.skip("no such address here")
    with sock:
        yield sock


def address_of(listener: socket.socket) -> Any:
    name = listener.getsockname()
    return name if isinstance(name, str) else name[:2]


def accept(listener: socket.socket, secret: bytes = SECRET) -> Line:
    sock, _ = listener.accept()
    try:
        return Line(sock, authenticate(sock, secret, server=True, timeout_s=5))
    except WireError:
        sock.close()
        raise


def test_channels_carry_messages_both_ways(listener: socket.socket) -> None:
    with beside(lambda: accept(listener)) as accepted:
        client = connect(address_of(listener), SECRET, hello={"role": "rank"})
    (server,) = accepted
    assert server.hello == {"role": "rank"}
    client.send({"n": 1})
    assert server.receive() == {"n": 1}
    large = {"text": "ü" * 100_000}  # more than a socket's buffer holds
    with beside(lambda: server.send(large)):
        assert client.receive() == large
    client.close()
    with pytest.raises(WireError):
        server.receive()
    server.close()


def test_many_threads_may_send(listener: socket.socket) -> None:
    with beside(lambda: accept(listener)) as accepted:
        client = connect(address_of(listener), SECRET, hello={})
    (server,) = accepted

    def send(n: int) -> None:
        for i in range(50):
            client.send({"n": n, "i": i, "pad": "x" * 3000})

    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    seen = [server.receive() for _ in range(200)]
    for thread in threads:
        thread.join(timeout=30)
    for n in range(4):
        assert [m["i"] for m in seen if m["n"] == n] == list(range(50))
    client.close()
    server.close()


def test_close_wakes_a_blocked_receive() -> None:
    with pair() as (a, _):
        line = Line(a)
        with beside(line.receive) as received:
            line.close()
        assert isinstance(received[0], WireError)
        line.close()
        with pytest.raises(WireError, match="gone"):
            line.send({})


def test_a_server_of_another_job_is_refused(listener: socket.socket) -> None:
    with beside(lambda: accept(listener, b"other")), pytest.raises(AuthenticationError):
        connect(address_of(listener), SECRET, hello={})


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="cannot reach"):
        connect(str(tmp_path / "none"), SECRET, hello={})
    with listen("127.0.0.1") as sock:
        address = sock.getsockname()[:2]
        with pytest.raises(OSError, match="in use"):
            listen("127.0.0.1", address[1])
    with pytest.raises(WireError, match="cannot reach"):
        connect(address, SECRET, hello={}, timeout_s=5)


def test_a_listener_that_never_answers_is_given_up(listener: socket.socket) -> None:
    with pytest.raises(WireError, match="more than"):
        connect(address_of(listener), SECRET, hello={}, timeout_s=0.1)
