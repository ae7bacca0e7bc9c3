"""Rebuild: who reads what, and computes what, when nodes are gone (pure).

Each lost shard is computed once, by one of the nodes that hold a shard of its stripe: that one
need not travel. Rotation puts every lost piece into another stripe, so the work of one lost
node is shared by all of its group.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ftkit.checkpoint.stripes import Place, StripePlan
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import NodeId


@dataclass(frozen=True, slots=True)
class StripeWork:
    """The work on one stripe of a rebuild.

    `erasure.Codec.rebuild` takes the reads, and an empty buffer for each piece without bytes:
    what is known to be empty is neither read nor lost.
    """

    stripe: int
    worker: NodeId
    """Who computes; it reads from the others."""
    reads: tuple[tuple[Place, NodeId], ...]
    """As many shards as suffice, and who holds each."""
    outputs: tuple[Place, ...]
    """What is computed; each lost shard is the output of one stripe only."""


def plan_rebuild(
    plan: StripePlan, held: Mapping[Place, NodeId], *, parity: bool = False
) -> tuple[StripeWork, ...]:
    """How to compute all data that nobody holds.

    When another node dies meanwhile, plan again from what is held then: what was rebuilt by
    then is held by its worker, and is not computed twice.

    Args:
      plan: the stripes as they were published.
      held: who holds each shard: `StripePlan.holders`, and whatever was rebuilt since.
      parity: compute lost parity too, so that m more nodes may vanish.

    Returns:
      One entry for each stripe that needs work, the longest first; reads and work are spread
      evenly over the nodes.

    Raises:
      IntegrityError: more of some stripe is gone than parity makes up for. The message names
        the nodes whose data it was, and how much.
    """
    missing = {
        number: [
            shard
            for shard in range(len(stripe.nodes))
            if stripe.shard_bytes(shard) and Place(number, shard) not in held
        ]
        for number, stripe in enumerate(plan.stripes)
    }
    _check_possible(plan, missing)
    sent, computed = Counter[NodeId](), Counter[NodeId]()
    found = list[StripeWork]()
    # The longest first: the short ones then even out what is left uneven.
    for number in sorted(missing, key=lambda n: (-plan.stripes[n].length, n)):
        stripe = plan.stripes[number]
        k = len(stripe.data)
        outputs = [shard for shard in missing[number] if parity or shard < k]
        if not outputs:
            continue
        readable = [
            (place, held[place])
            for shard in range(len(stripe.nodes))
            if stripe.shard_bytes(shard) and (place := Place(number, shard)) in held
        ]
        worker = min((node for _, node in readable), key=lambda n: (computed[n], sent[n], n))
        # Its own shard costs nothing; of the rest, those who have sent least so far.
        readable.sort(key=lambda read: (read[1] != worker, sent[read[1]], read[0]))
        reads = readable[: sum(1 for piece in stripe.data if piece.count)]
        computed[worker] += stripe.length * len(outputs)
        for place, node in reads:
            if node != worker:
                sent[node] += stripe.shard_bytes(place.shard)
        places = tuple(Place(number, shard) for shard in outputs)
        found.append(StripeWork(number, worker, tuple(sorted(reads)), places))
    return tuple(found)


def _check_possible(plan: StripePlan, missing: Mapping[int, list[int]]) -> None:
    beyond = [n for n, shards in missing.items() if len(shards) > plan.m]
    data = Counter[NodeId]()
    for number in beyond:
        stripe = plan.stripes[number]
        for shard in missing[number]:
            if shard < len(stripe.data):
                data[stripe.data[shard].node] += stripe.data[shard].count
    if not data:
        return  # parity alone is gone, or nothing
    nodes = sorted({plan.stripes[n].nodes[shard] for n in beyond for shard in missing[n]})
    named = ", ".join(f"{count} bytes of node {node}" for node, count in sorted(data.items()))
    raise IntegrityError(
        f"parity makes up for {plan.m} lost shards of a stripe; {len(beyond)} stripes have lost "
        f"more, which nodes {nodes} kept: {named} cannot be rebuilt. Fall back to a peer's live "
        "state, an older step or disk"
    )
