"""Door: where a node's ranks, the coordinators and other agents connect to its agent."""

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ftkit.core.errors import WireError
from ftkit.core.ids import MemberId, NodeId
from ftkit.core.trace import Trace
from ftkit.core.wire import Line, admit, listen, listen_unix

logger = logging.getLogger(__name__)

#: Takes over a connection of a kind that is no rank's and no coordinator's, with its hello.
Guest = Callable[[socket.socket, dict[str, Any]], None]
#: Told ("rank", (member, line)), ("said", (member, message)), ("coordinator", (term, line)) and
#: ("plan", (term, message)), on the thread of that connection.
Take = Callable[[str, Any], None]


class Door:
    """Two listeners, and a thread for each connection: no guest holds up another."""

    def __init__(self, host: str, port: int) -> None:
        """Hold `port` of `host` for coordinators; another, where it is taken or 0. OSError."""
        try:
            sock = listen(host, port)
        except OSError:
            sock = listen(host)
        self._listeners: list[tuple[socket.socket, str]] = [(sock, "coordinator")]

    @property
    def address(self) -> tuple[str, int]:
        """Where coordinators and other agents connect to."""
        host, port = self._listeners[0][0].getsockname()[:2]
        return str(host), int(port)

    def add_ranks(self, path: str) -> None:
        """Listen for ranks at `path`, too. OSError."""
        self._listeners.append((listen_unix(path), "rank"))

    def open(
        self,
        node: NodeId,
        secret: bytes,
        trace: Trace,
        *,
        take: Take,
        guests: Mapping[str, Guest],
        visitors: tuple[bytes, Guest] | None = None,
    ) -> None:
        """Let in who holds the secret, from now on.

        Args:
          node: who we are.
          secret: the job's.
          trace: told of those who are refused.
          take: takes what comes from ranks and coordinators.
          guests: who takes over a connection, by the role that its hello names.
          visitors: the key of those who do not hold the secret, and who takes them over, whatever
            role they name; None: there are none.
        """
        self._node, self._secret, self._trace = node, secret, trace
        self._take, self._guests = take, guests
        self._key = None if visitors is None else visitors[0]
        self._receive = None if visitors is None else visitors[1]
        for listener, kind in self._listeners:
            threading.Thread(
                target=self._accept, args=(listener, kind), name=f"ftkit-{kind}s", daemon=True
            ).start()

    def close(self) -> None:
        """Let nobody in any more. Connections live on. Twice is fine."""
        for listener, _ in self._listeners:
            try:
                listener.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # a listener that nobody waits on
            listener.close()

    def _accept(self, listener: socket.socket, kind: str) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._greet, args=(sock, kind), name=f"ftkit-greet-{kind}", daemon=True
            ).start()

    def _greet(self, sock: socket.socket, kind: str) -> None:
        """Authenticate, then pass on what the peer says until it hangs up."""
        try:
            visits, hello = admit(
                sock, self._secret, visitors=self._key, hello={"node": self._node}
            )
        except WireError as error:
            logger.warning("refused a %s: %s", kind, error)
            self._trace.event("refused", peer=kind, reason=str(error))
            sock.close()
            return
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if visits:
            assert self._receive is not None, "they have a key"
            self._receive(sock, hello)
        elif kind == "rank":
            member = MemberId(int(hello.get("member", -1)))
            self._pass_on("rank", "said", member, Line(sock, hello))
        elif guest := self._guests.get(str(hello.get("role"))):
            guest(sock, hello)
        else:
            term = int(hello.get("term", 0))
            self._pass_on("coordinator", "plan", term, Line(sock, hello))

    def _pass_on(self, came: str, says: str, who: int, line: Line) -> None:
        self._take(came, (who, line))
        try:
            while True:
                self._take(says, (who, line.receive()))
        except WireError as error:
            logger.debug("a connection ended: %s", error)
