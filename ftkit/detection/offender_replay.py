"""OffenderReplay: what leaving offenders out would have avoided, over a history of faults. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from ftkit.detection.offenders import OffenderConfig, Offenders


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A policy's score over one history. Nothing is known of the future at any moment."""

    faults: int
    avoided: int
    """Of nodes that were left out by then."""
    nodes: int
    left_out: tuple[str, ...]
    """Nodes that were left out, in order; none is let in again."""
    node_time_share: float
    """Of all nodes' time, what was left out."""

    @property
    def avoided_share(self) -> float:
        return self.avoided / self.faults if self.faults else 0.0

    @property
    def left_out_share(self) -> float:
        return len(self.left_out) / self.nodes if self.nodes else 0.0

    def to_json(self) -> dict[str, object]:
        return {
            **asdict(self),
            "left_out": list(self.left_out),
            "avoided_share": round(self.avoided_share, 6),
            "left_out_share": round(self.left_out_share, 6),
        }


def replay(
    faults: Iterable[tuple[float, str]], nodes: Sequence[str], config: OffenderConfig
) -> Replayed:
    """Leave a node out once it is an offender, and count what would have come of it after.

    Args:
      faults: (time in seconds, node), in any order.
      nodes: of the whole fleet, there from the first fault on.
      config: the rule.
    """
    ordered = sorted(faults)
    if not ordered:
        return Replayed(faults=0, avoided=0, nodes=len(nodes), left_out=(), node_time_share=0.0)
    first, last = ordered[0][0], ordered[-1][0]
    fleet = Offenders(config)
    for node in nodes:
        fleet.seen(node, first)
    out: dict[str, float] = {}
    avoided = 0
    for at, node in ordered:
        if node in out:
            avoided += 1
            continue
        fleet.fault(node, at)
        if fleet.score(node, at).offender:
            out[node] = at
    whole = len(fleet.nodes) * (last - first)
    return Replayed(
        faults=len(ordered),
        avoided=avoided,
        nodes=len(fleet.nodes),
        left_out=tuple(out),
        node_time_share=sum(last - at for at in out.values()) / whole if whole else 0.0,
    )
