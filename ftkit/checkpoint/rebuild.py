"""Rebuild: which shards of a stripe to read, to compute one that is gone (pure).

Whoever lost a shard pulls what it is computed from, and computes it itself. Rotation puts the
pieces of a node into different stripes, so what one node reads comes evenly from all others.
"""

from collections.abc import Collection, Mapping

from ftkit.checkpoint.stripes import Stripe
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import NodeId


def shards_to_read(
    stripe: Stripe,
    shard: int,
    usable: Collection[int],
    sent: Mapping[NodeId, int] = {},  # never changed
) -> tuple[int, ...]:
    """The shards that suffice to compute one shard of their stripe.

    Pieces without bytes are not among them: what is known to be empty is neither read nor
    lost. `erasure.Codec.rebuild` is given an empty buffer for each.

    Args:
      stripe: as it was published.
      shard: the one to compute.
      usable: shards whose holders live, less those that turned out to be corrupt.
      sent: bytes that each node has sent so far; who has sent least is asked first.

    Raises:
      IntegrityError: too few are usable. The message says whose data cannot be had.
    """
    count = sum(1 for piece in stripe.data if piece.count)
    found = sorted(
        (i for i in usable if i != shard and stripe.shard_bytes(i)),
        key=lambda i: (sent.get(stripe.nodes[i], 0), i),
    )
    if len(found) < count:
        gone = [n for i, n in enumerate(stripe.nodes) if i not in found and stripe.shard_bytes(i)]
        raise IntegrityError(
            f"parity makes up for {len(stripe.parity)} lost shards of a stripe, and those of nodes "
            f"{sorted(gone)} are lost or corrupt: {stripe.shard_bytes(shard)} bytes of node "
            f"{stripe.nodes[shard]} cannot be rebuilt. Fall back to an older step or to disk"
        )
    return tuple(sorted(found[:count]))
