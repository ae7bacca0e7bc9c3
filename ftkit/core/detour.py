"""Detour: in a drill of links, ranks reach each other through a relay that can be told to fail.

Outside such a drill there is none, and ranks dial each other.
"""

import json
import socket
from collections.abc import Mapping

from ftkit.core.errors import UsageError
from ftkit.core.ids import Seat
from ftkit.core.world import Member

VARIABLE = "FTKIT_DRILL_RELAY"


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

    def connect(self, member: Member, timeout_s: float) -> socket.socket:
        """A connection on which the first byte is for, or from, `member`. OSError."""
        sock = socket.create_connection(self._relay, timeout_s)
        asked = {"from": self._seat, "to": member.seat, "host": member.host, "port": member.port}
        try:
            sock.sendall(json.dumps(asked).encode() + b"\n")
        except OSError:
            sock.close()
            raise
        return sock
