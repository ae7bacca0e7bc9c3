"""What the data plane needs from outside."""

import socket
from collections.abc import Sequence
from typing import Protocol

from ftkit.core.world import Member


class OpRecorder(Protocol):
    """Told of every operation. Called on the hot path: must be cheap and never raise."""

    def enter(self, group: int, seq: int, op: str, nbytes: int) -> None:
        """Operation `seq` of `group` was issued; `nbytes` is this rank's payload.

        `op` names all that ranks must agree on: what it does, and to which type. That of a send
        or a receive names the peer: "recv 7" waits for member 7.
        """

    def leave(self, group: int, seq: int, ok: bool) -> None:
        """Operation `seq` of `group` completed (`ok`) or failed. From the communication thread."""

    def awaiting(self, group: int, seq: int, members: Sequence[int]) -> None:
        """Operation `seq` of `group` has waited for bytes of these members for some time."""


class Detour(Protocol):
    """Another way to members than the address at which they listen."""

    def connect(self, member: Member, timeout_s: float) -> socket.socket:
        """A connection whose other end is `member`'s listener. Blocks. OSError."""


class NullRecorder:
    """Records nothing."""

    def enter(self, group: int, seq: int, op: str, nbytes: int) -> None:
        pass

    def leave(self, group: int, seq: int, ok: bool) -> None:
        pass

    def awaiting(self, group: int, seq: int, members: Sequence[int]) -> None:
        pass
