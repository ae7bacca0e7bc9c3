"""Room: a disk that has no room for what is to be written there next. Said before the write. Pure."""

from typing import ClassVar

from ftkit.core.ids import NodeId
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import World
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.signals import NodeSeen

#: Files, directories and manifests beside the bytes themselves.
MORE = 1.05


class Room:
    """One detector of the panel. Owned by one thread."""

    HEARS: ClassVar[frozenset[type]] = frozenset({NodeSeen, WorldChanged})

    def __init__(self) -> None:
        self._world: World | None = None
        self._seen: dict[NodeId, NodeSeen] = {}

    def ingest(self, observation: Observation) -> None:
        """Take in what nodes have left, the newest of each."""
        match observation:
            case WorldChanged(world=world):
                self._world = world
            case NodeSeen():
                self._seen[observation.node] = observation
            case _:
                pass

    def tick(self, now: float) -> list[Verdict]:
        """One verdict for each node with a disk that is too full, of its fullest."""
        if self._world is None:
            return []
        found = []
        for node, seen in self._seen.items():
            member = self._world.first_on(node)
            short = {
                path: (free, due) for path, (free, due) in seen.disks.items() if free < MORE * due
            }
            if member is None or not short:
                continue
            path = min(short, key=lambda p: short[p][0] - short[p][1])
            free, due = short[path]
            found.append(
                Verdict(
                    fault=Fault.DISK,
                    member=member.member,
                    seat=member.seat,
                    reason=f"{path} on node {node} has {free / 1e9:.2f} GB free, and what is written "
                    f"there next takes {due / 1e9:.2f} GB: it will fail. Free room, or keep fewer "
                    "checkpoints",
                    since_s=seen.at,
                    evidence={"node": int(node), "path": path, "free": free, "next": due},
                )
            )
        return found
