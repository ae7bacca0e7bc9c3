"""Virtual blocks: shards that shrink without moving a byte first, beside contiguous ones. Pure.

The state is cut into N (N - 1) blocks. Rank r owns N - 1 of them, and a replica of each lies on
another rank: the k-th on the k-th other one (declustered). When rank r dies, each of the N - 1
survivors holds a replica of exactly one of its blocks, and takes that one over: nothing moves before
training goes on, and every survivor owns the same again. New replicas are made afterwards, beside
training. Contiguous shards move a quarter to a half of the whole state instead.

After k losses survivors own N (N - 1) / (N - k) blocks each, as evenly as whole blocks allow. FSDP2
cannot hold its parameters so, as its rank r must hold chunk r of each: ftkit's sharded jobs are
contiguous, and `ftkit plan` shows what that costs against blocks. The state of an optimizer that
is cut by itself lies in blocks (`promotion`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ftkit.core.ids import Seat


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """One block to copy, after the loss."""

    block: int
    source: Seat
    target: Seat


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Who owns each block, and who holds its replica; None: nobody, until it is made."""

    owner: Mapping[int, Seat]
    replica: Mapping[int, Seat | None]

    def owned(self, seat: Seat) -> frozenset[int]:
        return frozenset(b for b, s in self.owner.items() if s == seat)

    @property
    def seats(self) -> tuple[Seat, ...]:
        held = [*self.owner.values(), *(s for s in self.replica.values() if s is not None)]
        return tuple(sorted(set(held)))


def declustered(seats: Iterable[Seat]) -> Placement:
    """The placement of a full world: N (N - 1) blocks, each rank's replicas on all others.

    Raises:
      ValueError: there are fewer than two ranks.
    """
    order = sorted(set(seats))
    count = len(order)
    if count < 2:
        raise ValueError("a replica needs another rank to lie on")
    owner: dict[int, Seat] = {}
    replica: dict[int, Seat | None] = {}
    for block in range(count * (count - 1)):
        mine, k = block % count, block // count
        owner[block] = order[mine]
        replica[block] = order[(mine + 1 + k) % count]
    return Placement(owner=owner, replica=replica)


def shrink(placement: Placement, lost: Seat) -> Placement:
    """Who owns what once `lost` is gone: replicas take over, where they lie. Moves nothing.

    Raises:
      ValueError: a block is nowhere any more; parity or the disk must have it.
    """
    orphans = [
        b for b, s in placement.owner.items() if s == lost and placement.replica[b] in (None, lost)
    ]
    if orphans:
        raise ValueError(
            f"seat {lost} alone held blocks {orphans}: their replicas were lost before"
        )
    owner, replica = dict(placement.owner), dict(placement.replica)
    for block, seat in placement.owner.items():
        standby = placement.replica[block]
        if seat == lost:
            assert standby is not None, "orphans were refused"
            owner[block], replica[block] = standby, None
        elif standby == lost:
            replica[block] = None
    return Placement(owner=owner, replica=replica)


def replicate(placement: Placement) -> tuple[Placement, list[Copy]]:
    """Give every block a replica again, spread over the others; and the copies that takes.

    Off the critical path: training goes on meanwhile, unprotected for the blocks without one. A
    rank's replicas are spread so that at its loss the others take over equally many.
    """
    seats = placement.seats
    replica = dict(placement.replica)
    if len(seats) < 2:
        return placement, []
    load = dict.fromkeys(seats, 0)
    pairs: dict[tuple[Seat, Seat], int] = {}
    for block, seat in replica.items():
        if seat is not None:
            load[seat] += 1
            pair = (placement.owner[block], seat)
            pairs[pair] = pairs.get(pair, 0) + 1
    copies = []
    for block in sorted(b for b, s in replica.items() if s is None):
        owner = placement.owner[block]
        target = min(
            (s for s in seats if s != owner), key=lambda s: (pairs.get((owner, s), 0), load[s], s)
        )
        replica[block] = target
        load[target] += 1
        pairs[owner, target] = pairs.get((owner, target), 0) + 1
        copies.append(Copy(block=block, source=owner, target=target))
    return Placement(owner=placement.owner, replica=replica), copies


def contiguous_shrink(ranks: int, lost: int) -> float:
    """The share of the state that moves when contiguous shards close the gap.

    Rank r of N holds [r/N, (r + 1)/N); the N - 1 survivors, in order, hold equal parts of it again.
    The lost part counts: it comes from where its copy lies.
    """
    return sum(_received(ranks, lost))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """What a placement of shards moves when one of the ranks is lost, as shares of the state."""

    name: str
    before: float
    """Before training goes on, at the worst place of the lost rank."""
    before_rank: float
    """Of it, what the busiest rank takes in."""
    replicas: float
    """Beside training, until every block has a replica again. 0 where shards have none."""

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "before": round(self.before, 6),
            "before_rank": round(self.before_rank, 6),
            "replicas": round(self.replicas, 6),
        }


def placements(ranks: int) -> tuple[Placed, ...]:
    """Both ways to place the shards of `ranks`; first the one that moves fewer bytes before going on.

    Raises:
      ValueError: there are fewer than two ranks.
    """
    if ranks < 2:
        raise ValueError("a shard that is lost comes from another rank: there is none")
    gaps = [_received(ranks, lost) for lost in range(ranks)]
    whole = declustered(map(Seat, range(ranks)))
    left = shrink(whole, Seat(ranks - 1))
    taken_over = [
        b for b, s in left.owner.items() if not (s == whole.owner[b] or s == whole.replica[b])
    ]
    copies = replicate(left)[1]
    found = (
        Placed(
            name="contiguous",
            before=max(map(sum, gaps)),
            before_rank=max(map(max, gaps)),
            replicas=0.0,
        ),
        Placed(
            name="blocks",
            before=len(taken_over) / len(whole.owner),
            before_rank=0.0,
            replicas=len(copies) / len(whole.owner),
        ),
    )
    return tuple(sorted(found, key=lambda p: p.before))


def _received(ranks: int, lost: int) -> list[float]:
    """What each survivor takes in as contiguous shards close the gap."""
    left = [r for r in range(ranks) if r != lost]
    moved = []
    for new, old in enumerate(left):
        a, b = new / len(left), (new + 1) / len(left)
        kept = max(0.0, min(b, (old + 1) / ranks) - max(a, old / ranks))
        moved.append((b - a) - kept)
    return moved
