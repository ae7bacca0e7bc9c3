"""Signals: what ranks and agents measure beyond rows, and how it crosses the wire as JSON.

A signal is a frozen value that names its kind. Times are seconds; those that are points in time
are on the sender's monotonic clock until `from_json` has put them on the reader's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final, get_args

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.detection.declared import checked


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeen:
    """A member has finished a step: where its time went, and what came out.

    Only what it did itself counts as work: `seconds` of DATA, FORWARD and so on, without the
    time it was blocked in collectives, which is `waited_s`. A collective that runs while the
    thread computes costs it nothing and is in neither. What a member did since the step before
    (evaluation, say) is in `seconds` of BETWEEN.
    """

    KIND: ClassVar[str] = "step"

    member: MemberId
    seat: Seat
    generation: Generation
    step: Step
    at: float
    """When the step ended."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Phase -> wall time of the training thread in it, waiting in collectives left out."""
    waited_s: float = 0.0
    """Wall time for which the training thread was blocked in collectives."""
    cpu_s: float | None = None
    """Processor time of the training thread; None: not measured."""
    gc_s: float = 0.0
    """Of `seconds`, what Python's garbage collector took."""
    starved_s: float = 0.0
    """Of `seconds` of FORWARD, for how long the thread could have run and was given no core."""
    slots: int = 0
    """Slots of the global batch that it computed: work is compared by slot."""
    loss: float | None = None
    """Mean of the losses that it recorded itself, for its own slots; may be NaN."""
    grad_norm: float | None = None
    """Norm of its own gradients before they were reduced, where that is measured; may be NaN."""
    role: str = ""
    """Members of one role do the same work; "" where all do."""
    place: str = ""
    """Coordinates in the job's mesh, such as "dp=0 pp=1 tp=0"; "" where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathsSeen:
    """How fast a member's large messages have lately gone to each seat that got any."""

    KIND: ClassVar[str] = "paths"

    member: MemberId
    seat: Seat
    generation: Generation
    step: Step
    at: float
    rates: Mapping[str, float] = field(default_factory=dict)
    """Seat of the receiver, as text -> bytes a second while some were under way; the time in
    which the receiver did not read is left out."""

    def __post_init__(self) -> None:
        # Of what a peer says nothing is taken on trust.
        rates = {str(int(seat)): float(rate) for seat, rate in self.rates.items()}
        object.__setattr__(self, "rates", rates)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSeen:
    """What a pair test found out about one direction between two seats."""

    KIND: ClassVar[str] = "pair"

    order: int
    """The number of the order that asked for it (`inquiry.PairOrder`)."""
    sender: Seat
    receiver: Seat
    at: float
    nbytes: int = 0
    """Of one transfer; 0 when none came through."""
    seconds: tuple[float, ...] = ()
    """Of each repeat, as the receiver saw it. None: the path carries nothing."""
    error: str = ""
    """Why there are fewer than were asked for."""
    starved: int = 0
    """Repeats that do not count because an agent was not scheduled."""

    def __post_init__(self) -> None:
        # From JSON it is a list, and of what a peer says nothing is taken on trust.
        seconds = tuple(float(s) for s in self.seconds)
        if not all(0 < s < float("inf") for s in seconds) or (seconds and self.nbytes < 1):
            raise ValueError(f"{self.nbytes} bytes in {seconds} s is no transfer")
        object.__setattr__(self, "seconds", seconds)
        object.__setattr__(self, "starved", int(self.starved))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Members of a world have found something out among themselves, by vote or by comparing.

    One of them tells it: the first that it does not speak against.
    """

    KIND: ClassVar[str] = "found"

    fault: str
    """A `Fault`, as text."""
    member: MemberId
    seat: Seat
    """Whom it speaks of."""
    step: Step
    at: float
    reason: str
    evidence: Mapping[str, object] = field(default_factory=dict)
    confidence: float = 1.0
    peer: Seat | None = None
    """The other one, where only one of two can be meant."""

    def __post_init__(self) -> None:
        if not 0 < self.confidence <= 1:
            raise ValueError(f"confidence is {self.confidence}, must be above 0 and at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeScored:
    """What the history of jobs says of a node of this one (`offenders`)."""

    KIND: ClassVar[str] = "node-scored"

    node: NodeId
    name: str
    """Of the machine, whatever its number is in this job."""
    at: float
    faults: int
    recent: float
    rate_per_day: float
    fleet_per_day: float
    factor: float
    certainty: float
    offender: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSeen:
    """What a node has left, as its agent has measured."""

    KIND: ClassVar[str] = "node"

    node: NodeId
    at: float
    available_bytes: int
    """Memory that can be had without swapping."""
    pressure: Mapping[str, float] = field(default_factory=dict)
    """"cpu", "io", "memory" -> share of the last ten seconds in which some process waited for it."""
    disks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Path that ftkit writes to -> [bytes free, bytes that the next write there takes]."""

    def __post_init__(self) -> None:
        if any(len(pair) != 2 for pair in self.disks.values()):
            raise ValueError(f"a disk has what is free and what is next, not {self.disks}")


@dataclass(frozen=True, slots=True, kw_only=True)
class IoSeen:
    """What an agent did to a store since it told last, of one kind of operation."""

    KIND: ClassVar[str] = "io"

    node: NodeId
    at: float
    path: str
    """The store's root."""
    op: str
    """"write" and "sync" of new files, "put" of a small one, "read"."""
    count: int
    """Operations that ended."""
    seconds: float
    """Spent in them, and in one that is still under way."""
    nbytes: int = 0
    """Of those that ended: written, made durable, or asked for."""

    def __post_init__(self) -> None:
        # Of what a peer says nothing is taken on trust.
        count, seconds, nbytes = int(self.count), float(self.seconds), int(self.nbytes)
        if count < 0 or nbytes < 0 or not 0 <= seconds < float("inf"):
            raise ValueError(f"{count} operations with {nbytes} bytes in {seconds} s")
        object.__setattr__(self, "nbytes", nbytes)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "seconds", seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockSeen:
    """A node's wall clock against the coordinator's, by four time stamps."""

    KIND: ClassVar[str] = "clock"

    node: NodeId
    at: float
    offset_s: float
    """How far the node's is ahead."""
    error_s: float
    """Half of the time that the stamps were on their way: it may be off by so much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChecked:
    """What a node's self-check came to."""

    KIND: ClassVar[str] = "node-checked"

    node: NodeId
    at: float
    result: Mapping[str, object] = field(default_factory=dict)
    """A `node_health.NodeResult`, as JSON."""
    error: str = ""
    """Why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGap:
    """A node's agent was not there for a while, and is back."""

    KIND: ClassVar[str] = "node-gap"

    node: NodeId
    at: float
    gap_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReachSeen:
    """What came of an attempt to connect to the agent of another node (`reach`)."""

    KIND: ClassVar[str] = "reach"

    order: int
    node: NodeId
    """The one that was tried."""
    via: NodeId
    """The one that tried."""
    at: float
    reached: bool
    error: str = ""
    """Why not."""
    refused: bool = False
    """Why not: its machine answered that nobody listens there."""

    def __post_init__(self) -> None:
        # Of what a peer says nothing is taken on trust.
        for name in ("reached", "refused"):
            value = getattr(self, name)
            if value not in (True, False):
                raise ValueError(f"{name} is {value!r}, must be true or false")
            object.__setattr__(self, name, bool(value))
        object.__setattr__(self, "error", str(self.error)[:200])
        for name in ("order", "node", "via"):
            object.__setattr__(self, name, int(getattr(self, name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class CommSeen:
    """How long one rank was in some collectives of one group: a sample, the same on all ranks."""

    KIND: ClassVar[str] = "comm"

    seat: Seat
    generation: Generation
    group: int
    at: float
    """When it left the last one."""
    seqs: Sequence[int]
    spent_s: Sequence[float]
    """From entering each of them, or from the end of the one before it in its group if that came
    later, to leaving it."""
    worked_s: Sequence[float]
    """From leaving the collective before it, of whatever group, to entering it."""
    nbytes: Sequence[int] = ()
    """What this rank brings to each; () when that is not told."""

    def __post_init__(self) -> None:
        # Of what a peer says nothing is taken on trust.
        whose = [int(n) for n in (self.seat, self.generation, self.group)]
        seqs = [int(seq) for seq in self.seqs]
        spent, worked = ([float(s) for s in told] for told in (self.spent_s, self.worked_s))
        if not len(seqs) == len(spent) == len(worked):
            raise ValueError(f"{len(seqs)} collectives, {len(spent)} and {len(worked)} durations")
        nbytes = [int(n) for n in self.nbytes]
        if len(nbytes) not in (0, len(seqs)):
            raise ValueError(f"{len(seqs)} collectives, of {len(nbytes)} sizes")
        if min(whose + seqs + nbytes) < 0 or not all(0 <= s < float("inf") for s in spent + worked):
            raise ValueError("numbers of collectives and durations are 0 or more, and finite")
        object.__setattr__(self, "seat", Seat(whose[0]))
        object.__setattr__(self, "generation", Generation(whose[1]))
        object.__setattr__(self, "group", whose[2])
        object.__setattr__(self, "seqs", seqs)
        object.__setattr__(self, "spent_s", spent)
        object.__setattr__(self, "worked_s", worked)
        object.__setattr__(self, "nbytes", nbytes or [0] * len(seqs))


Signal = (
    CommSeen
    | ReachSeen
    | StepSeen
    | PathsSeen
    | PairSeen
    | Found
    | NodeScored
    | NodeSeen
    | IoSeen
    | ClockSeen
    | NodeChecked
    | NodeGap
)

#: What may be infinite or NaN, for that is a finding.
_UNBOUNDED: Final = frozenset({"loss", "grad_norm"})

_KINDS: Final[Mapping[str, type[Signal]]] = {kind.KIND: kind for kind in get_args(Signal)}


def to_json(signal: Signal) -> dict[str, object]:
    """The signal as a JSON-safe object. Its mappings and sequences are shared, not copied."""
    return {"kind": signal.KIND} | {name: getattr(signal, name) for name in signal.__slots__}


def from_json(value: object, *, offset_s: float = 0.0) -> Signal:
    """Read what `to_json` wrote.

    Args:
      value: any JSON value.
      offset_s: how far this clock is ahead of the sender's.

    Raises:
      ProtocolError: it is no signal, or of a kind that this version does not know.
    """
    kind_name = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind_name, str) or kind_name not in _KINDS:
        raise ProtocolError(f"not a signal: {value!r}")
    fields = {name: item for name, item in value.items() if name != "kind"}
    try:
        kind = _KINDS[kind_name]
        found = checked(kind, fields, unbounded=_UNBOUNDED)
        found["at"] += offset_s  # type: ignore[operator]
        return kind(**found)  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"not a signal: {value!r}") from error
