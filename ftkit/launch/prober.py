"""Prober: an agent's part of pair tests, and of finding out who is there. Decides nothing.

The agent of the first seat dials that of the second, on the way that ranks take (in a drill of
links, through the relay). Each end reports what it received; the one that dialled also reports
for the other when they did not get as far as knowing each other.
"""

import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ftkit.core.clock import Clock
from ftkit.core.detour import Detour, agent_end
from ftkit.core.errors import WireError
from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.wire import authenticate
from ftkit.core.world import Member
from ftkit.detection.signals import PairSeen, ReachSeen, to_json
from ftkit.launch.pair_test import meet

logger = logging.getLogger(__name__)

ROLE = "pair"
#: Of who only wants to know whether somebody answers.
REACH = "reach"
#: Tests an agent has under way at a time; more are refused, as nobody in order asks for them.
TESTS_MAX = 16


class Prober:
    """One an agent. Thread-safe. Its threads end by themselves, within the test's limit."""

    def __init__(
        self,
        secret: bytes,
        environ: Mapping[str, str],
        clock: Clock,
        report: Callable[[dict[str, object]], None],
    ) -> None:
        """Prepare to test.

        Args:
          secret: the job's.
          environ: the ranks' variables, in which a drill names its relay.
          clock: the agent's.
          report: takes a signal as JSON, from any thread; must not block.
        """
        self._secret = secret
        self._environ = environ
        self._clock = clock
        self._report = report
        self._slots = threading.BoundedSemaphore(TESTS_MAX)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = False

    def take(self, tests: object) -> None:
        """Begin the tests of a coordinator's message, each on a thread. Does not block."""
        for test in tests if isinstance(tests, list) else []:
            try:
                arguments = (
                    int(test["number"]),
                    Seat(int(test["a"])),
                    Seat(int(test["b"])),
                    (str(test["host"]), int(test["port"])),
                    float(test["limit_s"]),
                )
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("not a pair test: %s", error)
                continue
            if not self._slots.acquire(blocking=False):
                logger.warning("too many pair tests at a time: one is left out")
                continue
            threading.Thread(
                target=self._dial, args=arguments, name="ftkit-pair", daemon=True
            ).start()

    def reach(self, node: NodeId, tests: object) -> None:
        """Try to connect to other agents, each on a thread, for this one of `node`. Does not block."""
        for test in tests if isinstance(tests, list) else []:
            try:
                number, other = int(test["number"]), NodeId(int(test["node"]))
                address = str(test["host"]), int(test["port"])
                limit_s = float(test["limit_s"])
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("not a node to reach: %s", error)
                continue
            if not self._slots.acquire(blocking=False):
                logger.warning("too many tests at a time: node %s is not tried", other)
                continue
            threading.Thread(
                target=self._reach,
                args=(number, node, other, address, limit_s),
                name="ftkit-reach",
                daemon=True,
            ).start()

    def _reach(
        self, number: int, node: NodeId, other: NodeId, address: tuple[str, int], limit_s: float
    ) -> None:
        error, refused = "", False
        try:
            detour = Detour.of_control(self._environ, agent_end(node))
            if detour is None:
                sock = socket.create_connection(address, limit_s)
            else:
                sock = detour.dial(agent_end(other), address, limit_s)
            with self._using(sock):
                # That the kernel takes a connection says nothing of the process.
                authenticate(
                    sock, self._secret, server=False, hello={"role": REACH}, timeout_s=limit_s
                )
        except (WireError, OSError) as failed:
            error = str(failed)[:200] or type(failed).__name__
            refused = isinstance(failed, ConnectionRefusedError)
        finally:
            self._slots.release()
        seen = ReachSeen(
            order=number,
            node=other,
            via=node,
            at=self._clock.now(),
            reached=not error,
            error=error,
            refused=refused,
        )
        self._report(to_json(seen))

    def serve(self, sock: socket.socket, hello: Mapping[str, Any]) -> None:
        """Be the second end, for a peer that has said `hello`. Blocks; closes the socket."""
        try:
            number, a, b = int(hello["number"]), Seat(int(hello["a"])), Seat(int(hello["b"]))
            limit_s = min(float(hello["limit_s"]), 60.0)
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("a peer asked for a pair test that is none: %s", error)
            sock.close()
            return
        with self._using(sock):
            seen, broke = meet(sock, first=True, limit_s=limit_s)
        self._say(number, a, b, *seen.result, broke, starved=seen.starved)

    def close(self) -> None:
        """Break off what is under way. Twice is fine."""
        with self._lock:
            self._closed = True
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _dial(
        self, number: int, a: Seat, b: Seat, address: tuple[str, int], limit_s: float
    ) -> None:
        try:
            sock = self._connect(a, b, address, limit_s)
            with self._using(sock):
                authenticate(
                    sock,
                    self._secret,
                    server=False,
                    hello={"role": ROLE, "number": number, "a": a, "b": b, "limit_s": limit_s},
                    timeout_s=limit_s,
                )
                seen, broke = meet(sock, first=False, limit_s=limit_s)
            self._say(number, b, a, *seen.result, broke, starved=seen.starved)
        except ConnectionRefusedError:
            # There is a way, and nobody at the end of it: no word on the path.
            logger.info("the agent of seat %s does not listen at %s", b, address)
        except (WireError, OSError) as error:
            self._say(number, a, b, 0, (), f"no connection: {error}")
            self._say(number, b, a, 0, (), f"no connection: {error}")
        finally:
            self._slots.release()

    def _connect(self, a: Seat, b: Seat, address: tuple[str, int], limit_s: float) -> socket.socket:
        detour = Detour.read(self._environ, a)
        if detour is None:
            sock = socket.create_connection(address, limit_s)
        else:
            host, port = address
            target = Member(member=MemberId(b), seat=b, node=NodeId(0), host=host, port=port)
            sock = detour.connect(target, limit_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    @contextlib.contextmanager
    def _using(self, sock: socket.socket) -> Iterator[None]:
        with self._lock:
            closed = self._closed
            self._open.add(sock)
        try:
            if closed:
                raise WireError("the agent ends")
            yield
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()

    def _say(
        self,
        number: int,
        sender: Seat,
        receiver: Seat,
        nbytes: int,
        seconds: tuple[float, ...],
        error: str,
        *,
        starved: int = 0,
    ) -> None:
        seen = PairSeen(
            order=number,
            sender=sender,
            receiver=receiver,
            nbytes=nbytes,
            seconds=seconds,
            error=error[:200],
            starved=starved,
            at=self._clock.now(),
        )
        self._report(to_json(seen))
