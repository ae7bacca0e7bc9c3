"""Connections are kept while they are good: after a whole answer, to a server that is there."""

import fcntl
import resource
import socket
import threading
from contextlib import ExitStack
from typing import Any

import pytest

from ftkit.checkpoint.lines import KEEP_MAX, KEEP_S, ByteLine, Lines
from ftkit.checkpoint.serve import ArenaServer, send_bytes
from ftkit.core.errors import IntegrityError, WireError
from ftkit.core.ids import JobId
from ftkit.core.wire import send_message

SECRET = b"s" * 32


def lost(sock: socket.socket, request: dict[str, Any]) -> None:
    raise IntegrityError("it is not here")


def numbers(sock: socket.socket, request: dict[str, Any]) -> None:
    send_bytes(sock, memoryview(bytes(request["bytes"])))


def work(sock: socket.socket, request: dict[str, Any]) -> None:
    send_message(sock, {"working": True})


OPERATIONS = {"lost": lost, "numbers": numbers, "work": work}


def serve(directory, port: int = 0) -> ArenaServer:
    return ArenaServer(directory, JobId("job"), SECRET, port=port, operations=OPERATIONS)


@pytest.fixture
def server(tmp_path):
    with serve(tmp_path) as made:
        yield made


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def lines(now):
    made = Lines(SECRET, timeout_s=5, clock=lambda: now[0])
    yield made
    made.close()


def test_a_connection_is_kept_and_two_who_ask_at_once_have_two(server, lines):
    with lines.borrow(server.address) as first:
        assert first.ask({"op": "list"}) == {"copies": []}
        with lines.borrow(server.address) as second:
            assert second is not first
    with lines.borrow(server.address) as again:
        assert again is first
        assert again.ask({"op": "list"}) == {"copies": []}


def test_that_something_is_not_there_is_a_whole_answer(server, lines):
    with pytest.raises(IntegrityError), lines.borrow(server.address) as first:
        first.ask({"op": "lost"})
    with lines.borrow(server.address) as again:
        assert again is first


def test_a_stream_that_broke_off_is_not_taken_for_an_answer(server, lines):
    with lines.borrow(server.address) as first:
        next(first.ranges({"op": "numbers"}, 0, 30, 10))
        # The second range is on its way.
    with lines.borrow(server.address) as second:
        assert second is not first
        assert second.ask({"op": "list"}) == {"copies": []}
        second.ask({"op": "work"})
        # There is more to come of this answer.
    with lines.borrow(server.address) as third:
        assert third is not second
        assert len(b"".join(third.ranges({"op": "numbers"}, 0, 30, 10))) == 30
    with lines.borrow(server.address) as again:
        assert again is third


def test_a_server_that_was_gone_is_connected_to_anew(tmp_path, lines):
    with serve(tmp_path) as server:
        address = server.address
        with lines.borrow(address) as first:
            first.ask({"op": "list"})
    with pytest.raises(WireError), lines.borrow(address):
        pass
    with serve(tmp_path, port=address[1]), lines.borrow(address) as second:
        assert second is not first
        assert second.ask({"op": "list"}) == {"copies": []}


def test_one_that_was_idle_for_long_is_replaced(server, lines, now):
    with lines.borrow(server.address) as first:
        pass
    now[0] += KEEP_S + 1
    with lines.borrow(server.address) as second:
        assert second is not first


def test_those_to_a_node_that_left_are_closed(server, lines):
    with lines.borrow(server.address) as idle:
        pass
    lines.only([])
    assert not idle.is_idle, "it was closed"
    with lines.borrow(server.address) as late:
        assert late.ask({"op": "list"}) == {"copies": []}
    assert not late.is_idle, "it came back when nobody wanted it"
    lines.only([server.address])
    with lines.borrow(server.address) as first:
        pass
    assert first.is_idle


def test_a_process_may_have_more_files_open_than_select_knows(server):
    line = ByteLine.open(server.address, SECRET, timeout_s=5)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2000)), hard))
    try:
        high = fcntl.fcntl(line._sock, fcntl.F_DUPFD_CLOEXEC, 1500)
        with line, ByteLine(socket.socket(fileno=high)) as same:
            assert same.is_idle
            same._sock.shutdown(socket.SHUT_RDWR)
            assert not same.is_idle
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_more_than_a_few_are_kept(server, lines):
    with ExitStack() as opened:
        many = [opened.enter_context(lines.borrow(server.address)) for _ in range(KEEP_MAX + 2)]
    assert sum(line.is_idle for line in many) == KEEP_MAX


def test_a_server_that_reads_nothing_is_not_waited_for_for_ever(tmp_path):
    """As a process that was stopped: the kernel accepts, and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        lines = Lines(SECRET, timeout_s=0.05)
        with (
            pytest.raises(WireError, match="the greeting took"),
            lines.borrow(stopped.getsockname()[:2]),
        ):
            pass
    with serve(tmp_path) as server:
        reached, goes_on = threading.Event(), threading.Event()

        def stops(sock: socket.socket, request: dict[str, Any]) -> None:
            reached.set()
            goes_on.wait(10)

        server._operations = {"stops": stops}
        with pytest.raises(WireError, match="silent"), lines.borrow(server.address) as line:
            line.ask({"op": "stops"})
        assert reached.is_set()
        assert not line.is_idle, "its late answer must not be taken for another"
        goes_on.set()
    lines.close()


def test_a_line_is_not_idle_before_all_that_was_asked_for_has_come(server, lines):
    with lines.borrow(server.address) as first:
        into = memoryview(bytearray(10))
        for at in (0, 10):
            first.ask_for({"op": "numbers"}, at, 10)
        first.take_in(into)
        assert not first.is_idle, "an answer is on its way"
        first.take_in(into)
        assert first.is_idle
    with lines.borrow(server.address) as again:
        assert again is first
