"""What the coordinator knows of each member: levels reported by agents, never edges.

An agent repeats the whole of its `NodeFacts` at every change and at every heartbeat, so a
lost message costs a tick and a new coordinator knows the job as soon as every agent has
spoken once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import TYPE_CHECKING, Any

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Boot, Generation, MemberId, NodeId, Seat, Step

if TYPE_CHECKING:
    from ftkit.recovery.approximation import Approximation


class Stage(StrEnum):
    """How far a member has come. A session moves it forward; only a halt moves it back."""

    STARTING = auto()
    """The process runs and has not called `ftkit.init`, and perhaps never will."""
    READY = auto()
    """It has an address and belongs to no world that goes on."""
    LINKED = auto()
    """A newcomer connected to every member of world `linked`, waiting to be let in."""
    ACTIVE = auto()
    """It works in `generation`."""
    HALTED = auto()
    """It stands still; `step` and `voted` are final until it enters a newer generation."""
    DONE = auto()
    """Its step loop has ended; the process still runs, on its own business."""
    FINISHED = auto()
    """The process exited with 0."""
    DEAD = auto()
    """The process exited otherwise."""


class Allowed(StrEnum):
    """Whether a script allows approximate recovery, and of which kind its state is."""

    NOTHING = ""
    """It does not."""
    SHARDS = "shards"
    """A part of each tensor."""
    STAGES = "stages"
    """Some layers of a pipeline."""
    SWAPPED = "swapped"
    """The same, of one whose outer stages change places on every other micro-batch, and whose first
    and last layer are copied beside (`recovery.swapped`)."""


#: Stages of a process that still runs.
ALIVE: frozenset[Stage] = frozenset(
    {Stage.STARTING, Stage.READY, Stage.LINKED, Stage.ACTIVE, Stage.HALTED, Stage.DONE}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberFacts:
    """One member as its agent last saw it."""

    member: MemberId
    seat: Seat
    node: NodeId
    stage: Stage
    generation: Generation = Generation(0)
    """The newest generation it has entered, or has acknowledged to be over."""
    linked: Generation = Generation(0)
    """The world whose members it, as a newcomer, is connected to."""
    step: Step | None = None
    """Steps committed by this member: its vote for the last of them passed. None: no state."""
    entry_step: Step | None = None
    """The step it stood at when it first held state: where its own work begins."""
    at_step: Step = Step(0)
    """The step its status row shows it playing, or played last; 0 before its first. Telemetry,
    for counting and for messages. DEAD: where it died."""
    voted: bool = False
    """HALTED: it holds the reduced gradients of step + 1 and has voted for them."""
    cut: frozenset[MemberId] = frozenset()
    """Members of the world it stands still after, or could not enter, that it had no link to."""
    stepping: bool = False
    """It has entered its step loop, so its work can be played again."""
    sharded: bool = False
    """Its state is one of several shards. Once it stands still it gives up what it holds, is READY,
    and loads what the next world begins with."""
    allowed: Allowed = Allowed.NOTHING
    """What its script allows where state is lost."""
    host: str = ""
    port: int = 0
    pid: int = 0
    exit_code: int | None = None
    """DEAD: the exit code, or minus the signal number."""
    error: str = ""
    """DEAD: the last lines it wrote, when they are known."""
    out_of_memory: str = ""
    """DEAD: why it is taken to have run out of memory; empty when nothing says so."""
    drilled: bool = False
    """A drill struck it on purpose: what becomes of it is nobody's fault, and no budget's."""
    ours: bool = False
    """DEAD: ftkit killed it itself, for a reason given before: no fault of its node."""

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__} | {"cut": sorted(self.cut)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "MemberFacts":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            step, code, entry = value["step"], value["exit_code"], value["entry_step"]
            return cls(
                member=MemberId(int(value["member"])),
                seat=Seat(int(value["seat"])),
                node=NodeId(int(value["node"])),
                stage=Stage(value["stage"]),
                generation=Generation(int(value["generation"])),
                linked=Generation(int(value["linked"])),
                step=None if step is None else Step(int(step)),
                entry_step=None if entry is None else Step(int(entry)),
                at_step=Step(int(value["at_step"])),
                voted=bool(value["voted"]),
                cut=frozenset(MemberId(int(m)) for m in value["cut"]),
                stepping=bool(value["stepping"]),
                sharded=bool(value["sharded"]),
                allowed=Allowed(value["allowed"]),
                host=str(value["host"]),
                port=int(value["port"]),
                pid=int(value["pid"]),
                exit_code=None if code is None else int(code),
                error=str(value["error"]),
                out_of_memory=str(value["out_of_memory"]),
                drilled=bool(value["drilled"]),
                ours=bool(value["ours"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not a member's facts: {value!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFacts:
    """Everything the protocol judges by, at one moment."""

    members: Mapping[MemberId, MemberFacts]
    snapshots: frozenset[Step] = frozenset()
    """Steps that can be restored whole: at most the newest."""
    approximation: "Approximation | None" = None
    """What to go on from where no step can be restored whole, and the job allows that."""
    lacking: str = ""
    """What is lost where no step can be restored whole, and why nothing replaces it."""
    awaited: str = ""
    """What will give a newer snapshot soon; empty when nothing will."""
    dead_s: Mapping[MemberId, float] = field(default_factory=dict)
    """For how long each dead member has been known to be; one that is not in it, for long."""
    evictions: Mapping[MemberId, str] = field(default_factory=dict)
    """Members that detection wants removed, with the reason."""
    nodes_lost: frozenset[NodeId] = frozenset()
    nodes_away: frozenset[NodeId] = frozenset()
    """Nodes that cannot be asked or told anything now, and are not lost yet."""
    boots: Mapping[NodeId, Boot] = field(default_factory=dict)
    """The agent of each node as last heard of; nodes never heard of are not in it."""
    advised: Mapping[NodeId, str] = field(default_factory=dict)
    """Nodes that nothing should be started on while another can take it, and why (`exclusion`)."""
    per_node: int = 0
    """Places for ranks on each node; 0: every seat stays on its node."""
    world_max: int = 0
    """The most members that a world has; those beyond stand by. 0: any number."""
    draining: frozenset[NodeId] = frozenset()
    """Nodes that are about to be taken away: their members are to leave at the end of a step."""
    interrupted: str = ""
    """Why the user or the cluster wants the job to end; empty while nobody does."""
    wait: str = ""
    """Why those who are left of shards stand still until every seat is filled; empty: they go on."""
    refused: str = ""
    """Why the job must not begin: what it was to go on from cannot be used; else empty."""
