"""Two ends of a pair test on real sockets, in threads of this process."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ftkit.core.clock import MonotonicClock
from ftkit.core.detour import VARIABLE
from ftkit.core.ids import NodeId, Seat
from ftkit.core.wire import authenticate, listen
from ftkit.detection.signals import PairSeen, ReachSeen, from_json
from ftkit.launch import pair_test
from ftkit.launch.pair_test import BYTES_MAX, BYTES_MIN, Transfers, meet
from ftkit.launch.prober import REACH, Prober
from ftkit.launch.relay import Relay

SECRET = b"s" * 32


def test_sizes_grow_until_a_transfer_can_be_told_from_noise():
    seen = Transfers()
    while seen.wants:
        seen.note(seen.wants / 1e9)
    nbytes, seconds = seen.result
    assert nbytes / 1e9 >= pair_test.LONG_ENOUGH_S
    assert len(seconds) == 5
    slow = Transfers()
    while slow.wants:
        slow.note(slow.wants / 1e6)
    assert slow.result == (BYTES_MIN, (BYTES_MIN / 1e6,) * 5)
    fastest = Transfers()
    while fastest.wants:
        fastest.note(0.0)
    assert fastest.result[0] == BYTES_MAX
    busy = Transfers()
    busy.note(0.02)
    while busy.wants:
        busy.note(0.03, queued_s=0.016)
    assert busy.result == (BYTES_MIN, (0.02,)), "an end that is not scheduled says nothing"
    assert busy.made <= 25
    cut = Transfers()
    cut.note(0.001)
    assert cut.result == (BYTES_MIN, (0.001,)), "what came through is not forgotten"
    assert Transfers().result == (BYTES_MIN, ())


def ends(limit_s: float = 5.0) -> list[tuple[Transfers, str]]:
    a, b = socket.socketpair()
    with a, b, ThreadPoolExecutor() as pool:
        one = pool.submit(meet, a, first=True, limit_s=limit_s)
        other = pool.submit(meet, b, first=False, limit_s=limit_s)
        return [one.result(), other.result()]


def test_both_ends_see_what_came():
    for seen, error in ends():
        assert error == ""
        nbytes, seconds = seen.result
        assert len(seconds) == 5 or seen.starved
        assert nbytes / min(seconds) > 1e7


def test_a_sender_that_comes_late_does_not_count():
    a, b = socket.socketpair()
    with a, b, ThreadPoolExecutor() as pool:
        one = pool.submit(meet, a, first=True, limit_s=5)
        time.sleep(0.3)
        pool.submit(meet, b, first=False, limit_s=5).result()
        assert max(one.result()[0].result[1]) < 0.3


def test_an_end_that_says_nothing_or_nonsense_ends_the_test():
    a, b = socket.socketpair()
    with a, b:
        seen, error = meet(a, first=True, limit_s=0.2)
        assert seen.result[1] == ()
        assert error
    a, b = socket.socketpair()
    with a, b:
        b.sendall(b"\xff\xff\xff\xff" * 2)
        seen, error = meet(a, first=False, limit_s=0.5)
        assert "at most" in error
    a, b = socket.socketpair()
    with a:
        b.close()
        assert meet(a, first=True, limit_s=0.5)[1]


class Node:
    """An agent's prober behind a listener."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.signals: list[PairSeen] = []
        self.prober = Prober(SECRET, environ, MonotonicClock(), self._take)
        self.listener = listen("127.0.0.1")
        self.address = self.listener.getsockname()
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _take(self, value: Any) -> None:
        signal = from_json(value)
        assert isinstance(signal, PairSeen)
        self.signals.append(signal)

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            hello = authenticate(sock, SECRET, server=True, hello={})
            if hello.get("role") == REACH:
                sock.close()
                continue
            self.prober.serve(sock, hello)

    def close(self) -> None:
        self.prober.close()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


def wait_for(what: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_two_agents_test_the_path_and_each_reports_what_it_received():
    one, other = Node({}), Node({})
    try:
        host, port = other.address
        one.prober.take(
            [{"number": 7, "a": 0, "b": 1, "host": host, "port": port, "limit_s": 5.0}, {"a": "?"}]
        )
        wait_for(lambda: one.signals and other.signals)
        assert [(s.order, s.sender, s.receiver) for s in one.signals] == [(7, 1, 0)]
        assert [(s.order, s.sender, s.receiver) for s in other.signals] == [(7, 0, 1)]
        assert all(len(s.seconds) == 5 or s.starved for s in (*one.signals, *other.signals))
    finally:
        one.close()
        other.close()


def test_through_a_relay_that_is_slow_and_one_that_is_cut():
    relay = Relay()
    environ = {VARIABLE: "{}:{}".format(*relay.address)}
    one, other = Node(environ), Node(environ)
    try:
        host, port = other.address
        test = {"number": 1, "a": 0, "b": 1, "host": host, "port": port, "limit_s": 4.0}
        relay.cut(0, 1)
        one.prober.take([test])
        wait_for(lambda: len(one.signals) == 2)
        assert all(s.seconds == () and s.error for s in one.signals)
        relay.heal()
        one.signals.clear()
        relay.slow([(0, 1), (1, 0)], 2e6)
        one.prober.take([test])
        wait_for(lambda: one.signals and other.signals)
        for signal in (*one.signals, *other.signals):
            # Who reads late finds more in its buffers; without the relay it is a thousand million.
            assert signal.nbytes / min(signal.seconds) < 1e7
    finally:
        one.close()
        other.close()
        relay.close()


def test_a_node_is_reached_when_its_agent_answers_and_not_when_only_its_kernel_does(monkeypatch):
    said: list[ReachSeen] = []

    def take(value: object) -> None:
        signal = from_json(value)
        assert isinstance(signal, ReachSeen)
        said.append(signal)

    other, one = Node({}), Prober(SECRET, {}, MonotonicClock(), take)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = closed.getsockname()
    stopped = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(threading, "Thread", Inline)
    try:
        addresses = [other.address, stopped.getsockname(), nobody]
        one.reach(
            NodeId(3),
            [
                {"number": n, "node": 7 + n, "host": host, "port": port, "limit_s": 0.2}
                for n, (host, port) in enumerate(addresses)
            ]
            + [{"node": "?"}],
        )
        assert [(s.order, s.node, s.via) for s in said] == [(0, 7, 3), (1, 8, 3), (2, 9, 3)]
        assert [s.reached for s in said] == [True, False, False]
        assert [bool(s.error) for s in said] == [False, True, True]
    finally:
        stopped.close()
        other.close()


def test_nobody_at_the_other_end_is_no_word_on_the_path(monkeypatch):
    said: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    one = Prober(SECRET, {}, MonotonicClock(), said.append)
    monkeypatch.setattr(threading, "Thread", Inline)
    one.take(
        [
            {
                "number": 1,
                "a": Seat(0),
                "b": Seat(1),
                "host": address[0],
                "port": address[1],
                "limit_s": 1,
            }
        ]
    )
    assert said == []


class Inline:
    def __init__(self, *, target: Any, args: Any, name: str, daemon: bool) -> None:
        self._run = lambda: target(*args)

    def start(self) -> None:
        self._run()
