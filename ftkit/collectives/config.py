"""CollectivesConfig: the numbers of the data plane. The same on every member of a job."""

from dataclasses import dataclass
from enum import StrEnum

from ftkit.collectives.frames import SEGMENT_BYTES_MAX


class Transport(StrEnum):
    """How payloads travel between two processes of one host."""

    AUTO = "auto"
    """By memory reads where a probe at link-up succeeds, by TCP elsewhere."""
    TCP = "tcp"
    """Always by TCP."""
    CMA = "cma"
    """By memory reads; a pair that cannot is refused."""


class OnLoss(StrEnum):
    """What becomes of a collective when a member dies in it.

    A session keeps RAISE: it repairs the world itself and plays the whole step again.
    """

    RAISE = "raise"
    """It ends with GenerationAborted, at every survivor. What it was to fill is undefined."""
    RETRY = "retry"
    """The survivors run it again among themselves, from its inputs: a sum is the survivors'."""
    LEAVE_OUT = "leave out"
    """As RETRY, and a sum of floats is scaled by the old size over the new: what the dead
    would have brought is taken to be the mean of the others'."""


#: Between hosts a piece of a reduction is folded while the next one travels: a link that waits for a
#: fold is idle. As long as a frame: each message costs cores what computing beside it lacks.
SENT_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectivesConfig:
    """Sizes in bytes, times in seconds. Peers compare `wire` when they meet."""

    on_loss: OnLoss = OnLoss.RAISE
    """For groups that no session watches over; see `mending` for its cost and its limits."""
    transport: Transport = Transport.AUTO
    segment_bytes: int = 1 << 20
    """A frame. An abort waits for one; larger ones cost fewer calls."""
    piece_bytes: int = 4 << 20
    """What is shown to, and folded for, peers of one host at a time. An abort waits for one."""
    exchange_bytes_max: int = 64 << 10
    """Reductions up to this size go to everyone in one round."""
    cma_bytes_min: int = 32 << 10
    """Below it a message is cheaper through the socket than as an offer and an ack."""
    staging_bytes_max: int = 64 << 20
    """Resident memory for copies of private tensors that peers of this host read."""
    early_bytes_max: int = 8 << 20
    """Per link: what may arrive before its operation is posted, each message counted with half a
    KiB more than it holds. Beyond it we stop reading the link until a receive is posted on it, so memory stays bounded and nothing locks."""
    connections: int = 1
    """TCP connections to each member. More than one is for networks that cap a single one; a
    pair that reads each other's memory has one all the same."""
    plan_every: int = 64
    """Between hosts: ring operations from one look at the measured rates to the next, by which
    all members agree whether to plan the ring anew. 0 keeps the order of ranks."""
    probe_s: float = 0.2
    """How long two hosts whose rate is unknown try each other when a ring is planned, in
    seconds; 0 never does."""
    greeting_timeout_s: float = 5.0
    """How long a stranger may take to prove that it holds the secret."""
    close_timeout_s: float = 2.0
    """How long `close` waits for peers to take what is queued for them."""

    def __post_init__(self) -> None:
        if not 4096 <= self.segment_bytes <= SEGMENT_BYTES_MAX or self.segment_bytes % 64:
            raise ValueError(
                f"segment_bytes must be a multiple of 64 in 4096..{SEGMENT_BYTES_MAX}, "
                f"got {self.segment_bytes}"
            )
        if self.piece_bytes < 4096 or self.piece_bytes % 64:
            raise ValueError(
                f"piece_bytes must be a multiple of 64, at least 4096, got {self.piece_bytes}"
            )
        if self.early_bytes_max < self.segment_bytes:
            raise ValueError(
                f"early_bytes_max ({self.early_bytes_max}) must hold at least one segment "
                f"({self.segment_bytes})"
            )
        if not 1 <= self.connections <= 64:
            raise ValueError(f"connections must be in 1..64, got {self.connections}")
        if self.plan_every < 0:
            raise ValueError(f"plan_every is a count of operations, got {self.plan_every}")
        if not 0 <= self.probe_s <= 10:
            raise ValueError(f"probe_s must be in 0..10, got {self.probe_s}")
        if min(self.greeting_timeout_s, self.close_timeout_s) <= 0:
            raise ValueError("timeouts must be positive")

    @property
    def wire(self) -> dict[str, object]:
        """What two members must agree on to cut messages the same way."""
        return {
            "transport": self.transport.value,
            "segment_bytes": self.segment_bytes,
            "piece_bytes": self.piece_bytes,
            "sent_piece_bytes": SENT_PIECE_BYTES,
            "exchange_bytes_max": self.exchange_bytes_max,
            "cma_bytes_min": self.cma_bytes_min,
            "connections": self.connections,
            "plan_every": self.plan_every,
            "probe_s": self.probe_s,
        }
