"""Operations: what the members of a world do together.

None of them blocks, and none raises for what goes wrong on the way: that comes through the
handle, as `GenerationAborted` once the generation is over. Tensors are used in place, and
belong to the operation until its handle completes. ValueError: arguments that cannot work,
before anything is sent.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ftkit.collectives import canonical, moves, planning, reductions
from ftkit.collectives.arithmetic import Bytes, as_bytes, check, signature
from ftkit.collectives.channel import Channel
from ftkit.collectives.frames import CONTROL_BYTES_MAX
from ftkit.collectives.handle import Handle
from ftkit.collectives.ring_order import Ring
from ftkit.collectives.slot_tree import SlotNode
from ftkit.collectives.slots import Held, assign, nodes_among, nodes_of
from ftkit.core.ids import Rank


class Operations:
    """See the module. Any thread; all members issue them in the same order."""

    channel: Channel
    """The world's."""

    def all_reduce(self, flat: torch.Tensor, op: str = "sum") -> Handle[None]:
        """Reduce a contiguous CPU tensor in place: sum, avg, product, min, max, band, ...

        Same bits on every rank. After a failure its content is undefined.
        """
        check(flat.dtype, op)
        data = as_bytes(flat)
        return self.channel.issue(
            signature("all_reduce", op, flat.dtype),
            reductions.all_reduce(data, flat.dtype, op),
            nbytes=data.size,
        )

    def reduce_scatter(
        self, out: torch.Tensor, ins: Sequence[torch.Tensor], op: str = "sum"
    ) -> Handle[None]:
        """The reduction of all ranks' `ins[r]` into the `out` of rank r."""
        check(out.dtype, op)
        parts = [as_bytes(t) for t in ins]
        return self.channel.issue(
            signature("reduce_scatter", op, out.dtype),
            reductions.reduce_scatter(as_bytes(out), parts, out.dtype, op),
            nbytes=sum(p.size for p in parts),
        )

    def all_gather(self, outs: Sequence[torch.Tensor], mine: torch.Tensor) -> Handle[None]:
        """Rank r's tensor into `outs[r]` everywhere."""
        data = as_bytes(mine)
        return self.channel.issue(
            "all_gather", moves.all_gather([as_bytes(t) for t in outs], data), nbytes=data.size
        )

    def broadcast(self, tensor: torch.Tensor, root_rank: int) -> Handle[None]:
        """The root's tensor to all, in place."""
        data = as_bytes(tensor)
        return self.channel.issue("broadcast", moves.broadcast(data, root_rank), nbytes=data.size)

    def exchange(self, payload: bytes) -> Handle[list[bytes]]:
        """Everybody's bytes in rank order, in one round. For small things: at most 1 MiB.

        It completes only when every member has issued it, so it is a barrier, and a vote.
        """
        if len(payload) > CONTROL_BYTES_MAX:
            raise ValueError(f"{len(payload)} bytes are too many to exchange")
        data: Bytes = np.frombuffer(payload, dtype=np.uint8)
        return self.channel.issue("exchange", moves.exchange(data), nbytes=len(payload))

    def barrier(self) -> Handle[list[bytes]]:
        """Completes when every member has issued it."""
        return self.exchange(b"")

    # -- the ring -----------------------------------------------------------------------------

    @property
    def ring(self) -> tuple[int, ...]:
        """Ranks in the order in which bulk goes round between hosts. Any thread."""
        return self.channel.ring

    @property
    def wants_plan(self) -> bool:
        """Whether this member has a reason to plan the ring. Any thread; does not block.

        Members may see it differently: agree, then let all call `plan_ring`.
        """
        return self.channel.wants_plan

    def plan_ring(self) -> Handle[Ring]:
        """Order the ring by what was measured; in use from the next operation on.

        An operation of all members, like any other. Hosts that have not exchanged anything
        large yet try each other first, for `probe_s` a round. Rings plan themselves, too,
        every `plan_every` operations, when a member `wants_plan`.
        """
        return self.channel.issue("plan_ring", planning.plan_ring(), nbytes=16 * self.channel.size)

    def probe(self, partner: Rank) -> Handle[None]:
        """Load the path to and from a rank for `probe_s`; what came of it is in `traffic`.

        Both ranks call it, and in a larger world so do pairs of all the others.
        """
        return self.channel.issue("probe", planning.probe(partner), nbytes=0)

    def reduce_slots(
        self,
        nodes: Sequence[SlotNode],
        out: torch.Tensor,
        *,
        slots: int,
        scale: float | None = None,
        division: Held | None = None,
    ) -> Handle[None]:
        """The canonical sum over all slots into `out`: bits independent of the world size.

        Args:
          nodes: this rank's nodes, as `SlotTree.nodes` gives them after pushing the slots
            `division[rank]`. Flat, contiguous, floating; read until the handle
            completes, and not changed, except that `out` may be one of them.
          out: flat, same length and dtype.
          slots: slots of the global batch.
          scale: multiplied in once, at the end; 1 / slots for a mean.
          division: the slots of each rank, the same on all ranks; None for `assign(slots, size)`.

        Raises:
          ValueError: the nodes are not the ones this rank must bring.
        """
        rank = self.channel.rank
        if division is None:
            expected = nodes_of(assign(slots, self.channel.size)[rank], slots)
        else:
            expected = nodes_among(division[rank], slots)
        if [n.node for n in nodes] != expected:
            raise ValueError(
                f"rank {self.channel.rank} of {self.channel.size} must bring the nodes {expected} of {slots} "
                f"slots, not {[n.node for n in nodes]}"
            )
        if not out.dtype.is_floating_point or any(
            n.value.dtype != out.dtype or n.value.shape != out.shape for n in nodes
        ):
            raise ValueError("nodes and out must be floating and alike in dtype and shape")
        check(out.dtype, "sum")
        data = as_bytes(out)
        program = canonical.reduce_slots(
            [as_bytes(n.value) for n in nodes], data, out.dtype, slots, scale, division
        )
        # Ranks bring different numbers of nodes; the bucket is what they must agree on.
        name = signature("reduce_slots", str(data.size), out.dtype)
        return self.channel.issue(name, program, nbytes=data.size * len(nodes))
