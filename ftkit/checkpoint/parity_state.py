"""What the parity protocol knows, hears and says: its state, events and commands (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ftkit.core.ids import Generation, NodeId, Step

Version: TypeAlias = tuple[Generation, Step]
"""A snapshot's place in the order of snapshots (`slots.Sealed.version`)."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A snapshot whose parity is being made."""

    version: Version
    sent: frozenset[NodeId] = frozenset()
    acknowledged: frozenset[NodeId] = frozenset()


@dataclass(frozen=True, slots=True)
class Published:
    """A snapshot that survives the loss of m nodes of each of its groups."""

    version: Version
    groups: tuple[frozenset[NodeId], ...]
    """As they were when it was published; the job may have other nodes by now."""
    m: int
    lost: frozenset[NodeId] = frozenset()
    """Those of its nodes that are gone."""

    @property
    def nodes(self) -> frozenset[NodeId]:
        return frozenset().union(*self.groups)

    @property
    def beyond(self) -> list[list[NodeId]]:
        """The lost nodes of each group that has lost more than m; empty: all data can be had."""
        lost = (sorted(group & self.lost) for group in self.groups)
        return [nodes for nodes in lost if len(nodes) > self.m]

    def without(self, node: NodeId) -> "Published":
        """The same after the loss of a node, which need not be one of its own."""
        return replace(self, lost=self.lost | ({node} & self.nodes))


@dataclass(frozen=True, slots=True)
class ParityState:
    """All that is known. Made anew by `advance` only."""

    generation: Generation
    groups: tuple[frozenset[NodeId], ...]
    """Of the present world. Empty: it has too few nodes for parity."""
    m: int
    gone: frozenset[NodeId] = frozenset()
    """Nodes of this world that were lost; nothing new begins until the next is formed."""
    held: Mapping[NodeId, frozenset[Version]] = field(default_factory=dict)
    """Sealed snapshots that each node reported last."""
    flights: tuple[Flight, ...] = ()
    """Oldest first."""
    done: Version | None = None
    """The newest that was ever begun; what is not newer is not begun again."""
    published: Published | None = None
    rebuilding: Published | None = None
    """What a rebuild that is going on reads, and whose loss it makes up for."""

    @property
    def nodes(self) -> frozenset[NodeId]:
        return frozenset().union(*self.groups)

    @property
    def kept(self) -> frozenset[Version]:
        """What no node may overwrite, neither its own sealed parts nor its parity.

        A driver sends it to the nodes again and again, so that a lost command costs no slot.
        """
        standing = (p.version for p in (self.published, self.rebuilding) if p)
        return frozenset([*standing, *(f.version for f in self.flights)])


@dataclass(frozen=True, slots=True)
class Formed:
    """A new world was agreed on."""

    generation: Generation
    groups: tuple[frozenset[NodeId], ...]
    m: int


@dataclass(frozen=True, slots=True)
class Holds:
    """A node's arenas hold these snapshots, sealed; a level."""

    node: NodeId
    versions: frozenset[Version]


@dataclass(frozen=True, slots=True)
class Sent:
    """A node has sent all its pieces of a snapshot."""

    node: NodeId
    version: Version


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """A node holds its own parts of a snapshot and all parity it keeps, verified."""

    node: NodeId
    version: Version


@dataclass(frozen=True, slots=True)
class Refused:
    """A node cannot take part in a snapshot: it was overwritten, or memory ran out."""

    node: NodeId
    version: Version
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """A node is gone."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class RebuildWanted:
    """Recovery asks for what the lost nodes held."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """A rebuild is done."""

    version: Version
    lost: frozenset[NodeId]
    """Whose data was rebuilt, as the command said."""


Event: TypeAlias = Formed | Holds | Sent | Acknowledged | Refused | Lost | RebuildWanted | Rebuilt


@dataclass(frozen=True, slots=True)
class Encode:
    """To every node: keep this snapshot, send its pieces, make parity, acknowledge."""

    version: Version


@dataclass(frozen=True, slots=True)
class Publish:
    """This snapshot's stripes count from now on."""

    version: Version


@dataclass(frozen=True, slots=True)
class Release:
    """To every node: the slots of this snapshot may be overwritten."""

    version: Version


@dataclass(frozen=True, slots=True)
class Abandon:
    """A snapshot will not be published; its slots may be overwritten."""

    version: Version
    reason: str


@dataclass(frozen=True, slots=True)
class Rebuild:
    """Compute what these nodes held of this snapshot (`rebuild.plan_rebuild`)."""

    version: Version
    lost: frozenset[NodeId]


@dataclass(frozen=True, slots=True)
class BeyondRepair:
    """Parity cannot help: fall back to disk."""

    reason: str


Command: TypeAlias = Encode | Publish | Release | Abandon | Rebuild | BeyondRepair
