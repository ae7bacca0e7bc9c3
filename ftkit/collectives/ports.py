"""What the data plane needs from outside."""

import socket
from typing import Protocol

from ftkit.core.world import Member


class OpRecorder(Protocol):
    """Told of every operation. Called on the hot path: must be cheap and never raise."""

    def enter(self, group: int, seq: int, op: str, nbytes: int) -> None:
        """Operation `seq` of `group` was issued; `nbytes` is this rank's payload."""

    def leave(self, seq: int, ok: bool) -> None:
        """Operation `seq` completed (`ok`) or failed. Comes from the communication thread."""


class Detour(Protocol):
    """Another way to members than the address at which they listen."""

    def connect(self, member: Member, timeout_s: float) -> socket.socket:
        """A connection whose other end is `member`'s listener. Blocks. OSError."""


class NullRecorder:
    """Records nothing."""

    def enter(self, group: int, seq: int, op: str, nbytes: int) -> None:
        pass

    def leave(self, seq: int, ok: bool) -> None:
        pass
