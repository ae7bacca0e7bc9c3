"""Mailbox: matches what arrives with what is waited for. No I/O.

A receive may be posted before or after its message arrives. What arrives first waits here:
a few bytes for an offer, the payload otherwise. Messages of a later generation wait until
we get there, those of an earlier one are never kept.
"""

from collections.abc import Iterator

from ftkit.collectives.arithmetic import Bytes, copy
from ftkit.collectives.frames import Offer
from ftkit.collectives.keys import Key
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import empty
from ftkit.core.errors import ProtocolError

#: What it takes to keep a message, beside its payload.
_KEPT_BYTES = 512


class Inbound:
    """A message on its way in: posted, arriving, or both."""

    __slots__ = ("data", "got", "offer", "raw", "started", "target", "ticket", "total")

    def __init__(self) -> None:
        self.ticket: Ticket | None = None
        self.data: Bytes | None = None
        """Where segments are written."""
        self.target: Bytes | None = None
        """Where the whole is copied at the end: it was posted when segments had come."""
        self.offer: Offer | None = None
        self.raw = False
        self.started = False
        self.got = 0
        self.total = 0

    def begin(self, key: Key, total: int) -> None:
        """The first sight of the message: its size must be the awaited one."""
        if self.data is not None and self.data.size != total:
            raise ProtocolError(
                f"member {key.peer} sent {total} bytes for operation {key.seq} of group "
                f"{key.group}, where {self.data.size} were expected: the ranks disagree about "
                "the operation or its shape"
            )
        if self.data is None:
            self.data = empty(total)
        self.started, self.total = True, total

    @property
    def early_bytes(self) -> int:
        """What it counts for while it waits to be posted; an offer does not count."""
        return self.total + _KEPT_BYTES if self.offer is None else 0

    @property
    def complete(self) -> bool:
        return self.started and self.got == self.total

    def deliver(self, key: Key) -> None:
        """All bytes are here: hand them to whoever waits."""
        assert self.ticket is not None, "only a posted message is delivered"
        assert self.data is not None, "a complete message has data"
        if self.target is not None:
            if self.target.size != self.total:
                raise ProtocolError(
                    f"member {key.peer} sent {self.total} bytes for operation {key.seq} of "
                    f"group {key.group}, where {self.target.size} were expected: the ranks "
                    "disagree about the operation or its shape"
                )
            copy(self.target, self.data)
            self.data = self.target
        self.ticket.data = self.data
        self.ticket.complete()


class Mailbox:
    """All messages on their way in. Owned by the communication thread."""

    def __init__(self) -> None:
        self.posted: dict[Key, Inbound] = {}
        self.early: dict[Key, Inbound] = {}

    def find(self, key: Key) -> Inbound | None:
        """The message of this name, if anything of it is known."""
        return self.posted.get(key) or self.early.get(key)

    def purge(self, generation: int) -> Iterator[tuple[Key, Inbound]]:
        """Forget everything of `generation` and older; yields the early ones dropped."""
        self.posted = {k: v for k, v in self.posted.items() if k.generation > generation}
        for key in [k for k in self.early if k.generation <= generation]:
            yield key, self.early.pop(key)
