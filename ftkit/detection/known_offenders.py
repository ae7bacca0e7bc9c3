"""KnownOffenders: nodes of this job that fail far more often than the fleet does. Advice only."""

from typing import ClassVar

from ftkit.core.ids import NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.signals import NodeScored


class KnownOffenders:
    """Says it of the first member on such a node, for as long as it has one."""

    HEARS: ClassVar[frozenset[type]] = frozenset({NodeScored, WorldChanged})

    def __init__(self) -> None:
        self._world: World | None = None
        self._scored: dict[NodeId, NodeScored] = {}

    def ingest(self, observation: Observation) -> None:
        """Take in what the history says of a node, the newest, and who is on it."""
        match observation:
            case NodeScored():
                self._scored[observation.node] = observation
            case WorldChanged(world=world):
                self._world = world
            case _:
                pass

    def tick(self, now: float) -> list[Verdict]:
        """One verdict for each offender that members are on."""
        if self._world is None:
            return []
        return [
            Verdict(
                fault=Fault.OFFENDER,
                member=member.member,
                seat=member.seat,
                reason=f"node {member.node} ({one.name}) has failed {one.faults} times, "
                f"{one.recent:.1f} of them recent: its rate is more than {one.factor:g} times the "
                f"fleet's with probability {one.certainty:.3f}. Leave it out of the next job",
                since_s=one.at,
                evidence={
                    "node": int(member.node),
                    "name": one.name,
                    "faults": one.faults,
                    "recent": round(one.recent, 3),
                    "rate_per_day": one.rate_per_day,
                    "fleet_per_day": one.fleet_per_day,
                },
                confidence=max(1e-6, min(1.0, one.certainty)),
            )
            for one in self._scored.values()
            if one.offender and (member := self._world.first_on(one.node)) is not None
        ]
