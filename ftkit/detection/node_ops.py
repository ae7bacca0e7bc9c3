"""NodeOps: an agent's collectives, reduced to what others need to tell who was late.

Of each group one collective in `STRIDE` is told, by a number that all its members agree on, so that
what agents of many nodes tell can be joined; and of each only how long every rank here was in it.
"""

from collections.abc import Iterable
from typing import Final

from ftkit.core.ids import Generation, Seat
from ftkit.detection.row import OpRecord
from ftkit.detection.signals import CommSeen

#: Collectives are told whose number is a multiple of this.
STRIDE: Final = 4

#: Operations that nobody leaves before all have come. Of a broadcast, say, the root may.
SYNCHRONISING: Final = frozenset(
    {"all_reduce", "all_reduce_quantized", "all_gather", "reduce_scatter", "all_to_all"}
    | {"barrier", "exchange", "reduce_slots"}
)


class NodeOps:
    """Remembers what it has told. Owned by the agent's thread."""

    def __init__(self) -> None:
        self._told_until: dict[Seat, int] = {}

    def take(self, seat: Seat, records: Iterable[OpRecord]) -> list[CommSeen]:
        """What is new among one rank's newest records, in order of time."""
        last = self._told_until.get(seat, 0)
        newest, left = last, 0
        #: Of each group: when it was last through with one.
        free: dict[int, int] = {}
        found: dict[tuple[int, int], list[tuple[int, float, float, int]]] = {}
        for record in records:
            # On its own clock, and only after an operation that is in the ring: else unknown.
            worked = max(0, record.t_enter_ns - left) / 1e9 if left else 0.0
            if record.t_leave_ns and record.ok:
                told = record.t_leave_ns > last and record.seq % STRIDE == 0
                if told and record.op.partition(" ")[0] in SYNCHRONISING:
                    # One that stands in line behind another has not begun: how long that takes
                    # says how far the rank is ahead, and nothing of the network.
                    began = max(record.t_enter_ns, free.get(record.group, 0))
                    spent = (record.t_leave_ns - min(began, record.t_leave_ns)) / 1e9
                    found.setdefault((record.generation, record.group), []).append(
                        (record.seq, round(spent, 6), round(worked, 6), record.nbytes)
                    )
                newest = max(newest, record.t_leave_ns)
                free[record.group] = max(free.get(record.group, 0), record.t_leave_ns)
                left = max(left, record.t_leave_ns)
        self._told_until[seat] = newest
        return [
            CommSeen(
                seat=seat,
                generation=Generation(generation),
                group=group,
                at=newest / 1e9,
                seqs=seqs,
                spent_s=spent,
                worked_s=worked,
                nbytes=nbytes,
            )
            for (generation, group), ops in found.items()
            for seqs, spent, worked, nbytes in [zip(*ops, strict=True)]
        ]
