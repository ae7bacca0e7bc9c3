"""Leader: one node has all make parity of the newest step, and says when it counts.

It remembers nothing: another node may take its place between any two lines (`protocol`).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ftkit.checkpoint.parity.operations import NodeState
from ftkit.checkpoint.parity.protocol import choose, standing
from ftkit.checkpoint.parity.rounds import Ballot, RoundId, StripeSet
from ftkit.checkpoint.parity.streams import Peers
from ftkit.checkpoint.stripes import Code
from ftkit.core.errors import FtkitError, ProtocolError, WireError
from ftkit.core.ids import NodeId

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """How a round went."""

    made: RoundId | None = None
    """What counts from now on; None: there was nothing newer, or it broke off."""
    kept: RoundId | None = None
    """What counted before."""
    bytes: int = 0
    """Of parity, on all nodes."""
    seconds: float = 0.0
    broken: str = ""
    """Why it broke off; "" when it did not."""


def lead_round(peers: Peers, node: NodeId, code: Code, ballot: Ballot) -> tuple[Round, Ballot]:
    """Have all nodes make parity of the newest complete step. Blocks.

    Args:
      peers: all nodes that live, this one among them.
      node: this one.
      code: the code; there are as many nodes as it needs.
      ballot: the last that this node used or has heard of.

    Returns:
      How it went, and the highest ballot heard of.
    """
    start = time.monotonic()
    ballot = Ballot(ballot.number + 1, node)
    try:
        states = _with_all(peers.addresses, lambda n: _ask(peers, n, ballot))
    except FtkitError as error:
        return Round(broken=str(error)), ballot
    highest = max(s.promised for s in states.values())
    if refusals := [f"node {n}: {s.refused}" for n, s in states.items() if s.refused]:
        return Round(broken="; ".join(refusals)), max(ballot, highest)
    now = standing({n: s.holds for n, s in states.items()})
    kept = None if now is None else now.round
    sets = choose({n: s.parts for n, s in states.items()}, now, code, ballot)
    if not sets:
        return Round(kept=kept), ballot
    groups = {n: stripes for stripes in sets for n in stripes.parts}
    round_ = sets[0].round
    try:
        made = _with_all(groups, lambda n: _make(peers, n, groups[n], kept))
    except FtkitError as error:
        broken = Round(kept=kept, broken=f"step {round_.step}: {error}")
        if kept is not None:
            # So that no slab stays pinned for it. Said again by the next round, if it is lost.
            _tell_all(peers, ballot, kept)
        return broken, ballot
    _tell_all(peers, ballot, round_)
    return Round(
        made=round_, kept=kept, bytes=sum(made.values()), seconds=time.monotonic() - start
    ), ballot


def ask_all(peers: Peers, nodes: Sequence[NodeId]) -> dict[NodeId, NodeState]:
    """What those nodes that answer say of themselves; it binds them to nothing. Blocks."""

    def ask(node: NodeId) -> NodeState | None:
        try:
            return _ask(peers, node, None)
        except WireError as error:
            logger.debug("node %s does not answer: %s", node, error)
            return None

    found = _with_all(nodes, ask)
    return {node: state for node, state in found.items() if state is not None}


def _tell_all(peers: Peers, ballot: Ballot, round_: RoundId) -> None:
    """Say what counts. Who does not hear it learns it in the next round."""

    def tell(node: NodeId) -> None:
        try:
            with peers.line(node) as line:
                line.ask({"op": "parity-keep", "ballot": ballot, "round": round_})
        except FtkitError as error:
            logger.debug("node %s was not told what to keep: %s", node, error)

    _with_all(peers.addresses, tell)


def _ask(peers: Peers, node: NodeId, ballot: Ballot | None) -> NodeState:
    request: dict[str, object] = {"op": "parity-state"}
    with peers.line(node) as line:
        return NodeState.from_json(
            line.ask(request if ballot is None else {**request, "ballot": ballot})
        )


def _make(peers: Peers, node: NodeId, stripes: StripeSet, kept: RoundId | None) -> int:
    """Have one node make its parity; returns the bytes of it."""
    with peers.line(node) as line:
        answer = line.ask({"op": "parity-make", "set": stripes.to_json(), "keep": kept})
        while answer.get("working"):
            answer = line.hear()
        match answer.get("made"):
            case [int(count), int() | float()]:
                return count
            case other:
                raise ProtocolError(f"node {node} answers an order by {other!r:.80}")


def _with_all(
    nodes: Sequence[NodeId] | Mapping[NodeId, object], do: Callable[[NodeId], _T]
) -> dict[NodeId, _T]:
    """Do it for every node at once; the first error, once all have ended."""
    if not nodes:
        return {}
    # A thread for each: who waits for its turn would lose the step before it can pin it.
    with ThreadPoolExecutor(len(nodes), "ftkit-parity-talk") as pool:
        started = {node: pool.submit(do, node) for node in nodes}
    return {node: future.result() for node, future in started.items()}
