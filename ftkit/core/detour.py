"""Detour: in a drill of links, ranks reach each other through a relay that can be told to fail.

Outside such a drill there is none, and ranks dial each other.
"""

import json
import socket
from collections.abc import Mapping

from ftkit.core.errors import UsageError
from ftkit.core.ids import NodeId, Seat
from ftkit.core.world import Member

VARIABLE = "FTKIT_DRILL_RELAY"
#: Set where coordinator and agents, too, reach each other through the relay.
CONTROL = "FTKIT_DRILL_RELAY_CONTROL"

#: The coordinator's end of a connection; ranks have the numbers of their seats.
COORDINATOR = Seat(-1)


def agent_end(node: NodeId) -> Seat:
    """The end of a node's agent."""
    return Seat(-2 - node)


class Detour:
    """Opens connections through the relay. Any thread."""

    def __init__(self, relay: tuple[str, int], seat: Seat) -> None:
        """Go through `relay` in the name of `seat`."""
        self._relay = relay
        self._seat = seat

    @classmethod
    def read(cls, environ: Mapping[str, str], seat: Seat) -> "Detour | None":
        """What the drill has set; None outside of one. UsageError when it is no address."""
        text = environ.get(VARIABLE)
        if not text:
            return None
        host, _, port = text.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"{VARIABLE} is {text!r}, not HOST:PORT")
        return cls((host, int(port)), seat)

    @classmethod
    def of_control(cls, environ: Mapping[str, str], end: Seat) -> "Detour | None":
        """The same for the coordinator and agents."""
        return cls.read(environ, end) if environ.get(CONTROL) else None

    def connect(self, member: Member, timeout_s: float) -> socket.socket:
        """A connection on which the first byte is for, or from, `member`. OSError."""
        return self.dial(member.seat, (member.host, member.port), timeout_s)

    def dial(self, end: Seat, address: tuple[str, int], timeout_s: float) -> socket.socket:
        """The same to another `end`, which listens at `address`."""
        sock = socket.create_connection(self._relay, timeout_s)
        asked = {"from": self._seat, "to": end, "host": address[0], "port": address[1]}
        try:
            sock.sendall(json.dumps(asked).encode() + b"\n")
        except OSError:
            sock.close()
            raise
        return sock
