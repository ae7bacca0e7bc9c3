"""JobState: how a job stands, put together from what its agents answer. Pure."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import MemberId, NodeId
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """One agent's answer."""

    node: NodeId
    name: str
    """What the machine is called in every job."""
    order: tuple[int, int]
    """Of the newest plan it knows."""
    members: tuple[MemberFacts, ...]
    """Those that run."""
    draining: bool = False
    led: bool = True
    """Whether it hears of a coordinator."""
    versions: Mapping[str, str] = field(default_factory=dict)
    plan: Plan | None = None
    """Where it was asked for."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "NodeState":
        """Read an agent's answer. Raises ProtocolError on anything else."""
        try:
            term, version = value["order"]
            return cls(
                node=NodeId(int(value["node"])),
                name=str(value["name"]),
                order=(int(term), int(version)),
                members=tuple(MemberFacts.from_json(m) for m in value["members"]),
                draining=bool(value["draining"]),
                led=bool(value["led"]),
                versions={str(n): str(v) for n, v in value["versions"].items()},
                plan=None if value["plan"] is None else Plan.from_json(value["plan"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProtocolError(f"not how a node stands: {error!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """All of them, at about one moment."""

    seats: int
    """Ranks of a full world."""
    nodes: Mapping[NodeId, NodeState]
    silent: Mapping[NodeId, str] = field(default_factory=dict)
    """Nodes that gave no answer, and why."""
    accusations: tuple[str, ...] = ()
    """Verdicts and suspicions that are not over: one sentence each."""

    @property
    def plan(self) -> Plan | None:
        """The newest that anybody told in full."""
        told = [n.plan for n in self.nodes.values() if n.plan is not None]
        return max(told, key=lambda p: p.order, default=None)

    @property
    def members(self) -> dict[MemberId, MemberFacts]:
        """All that run."""
        return {m.member: m for n in self.nodes.values() for m in n.members}

    @property
    def world(self) -> tuple[MemberFacts, ...]:
        """Those that run of the world that trains, in the order of their seats."""
        plan, members = self.plan, self.members
        if plan is None or plan.world is None:
            return ()
        return tuple(members[m] for m in sorted(plan.world.member_ids) if m in members)

    @property
    def spares(self) -> tuple[MemberFacts, ...]:
        """Those that stand by, connected to everybody who trains."""
        plan = self.plan
        if plan is None or plan.world is None:
            return ()
        return tuple(
            m
            for m in self.members.values()
            if m.stage is Stage.LINKED
            and m.linked == plan.world.generation
            and m.member not in plan.world.member_ids
        )

    @property
    def spare_nodes(self) -> frozenset[NodeId]:
        """Nodes with an agent that answers, and no seat."""
        plan = self.plan
        taken = set() if plan is None else {s.node for s in plan.seats}
        return frozenset(n for n, s in self.nodes.items() if n not in taken and not s.draining)

    @property
    def committed(self) -> int:
        """Steps that everybody in the world has committed: who is at one has committed that before."""
        return min((max(m.at_step - 1, m.step or 0) for m in self.world), default=0)

    @property
    def undisturbed_since(self) -> int:
        """The step at which the world became what it is."""
        begun = [m.entry_step or 0 for m in self.world]
        return max([*begun, 0 if self.plan is None else self.plan.step])

    @property
    def versions(self) -> dict[str, str]:
        """What all nodes have; where they differ, all of it."""
        found: dict[str, set[str]] = {}
        for state in self.nodes.values():
            for name, version in state.versions.items():
                found.setdefault(name, set()).add(version)
        return {name: ", ".join(sorted(some)) for name, some in sorted(found.items())}


class OpenAccusations:
    """Verdicts and suspicions that are not over: fed a coordinator's events, in order. One thread's."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], tuple[int, str]] = {}
        self._coordinator = 0

    def feed(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take what is new; an event that lacks a field is passed over."""
        for event in events:
            try:
                number = int(event.get("coordinator", 0))
                if number > self._coordinator:
                    # What its predecessor had said, it says again if it still holds.
                    self._coordinator = number
                    self._open.clear()
                if number < self._coordinator:
                    continue
                key = str(event.get("fault")), int(event["member"])
                if event["kind"] in ("verdict", "suspicion"):
                    words = f"rank {int(event['seat'])} is called {key[0]}"
                    self._open[key] = key[1], f"{words}: {event.get('reason', '')}"
                elif event["kind"] == "verdict-over":
                    self._open.pop(key, None)
            except (KeyError, TypeError, ValueError):
                continue

    def of(self, alive: Iterable[MemberId]) -> tuple[str, ...]:
        """Those against members that still run, one sentence each: the others are over with them."""
        there = set(alive)
        return tuple(words for member, words in self._open.values() if member in there)
