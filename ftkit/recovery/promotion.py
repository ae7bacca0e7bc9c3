"""Promotion: who owns a block of state, as it follows from who holds it. Pure.

Every block is held by two ranks, its owner and a stand-in. Who owns it follows from who holds it: the
ranks tell each other what they hold, and each comes to the same owners. So when a rank is lost
its blocks are those of their stand-ins, whatever happened before, and no byte moves. Afterwards
`copies` says what to copy beside training until every block has a stand-in again, on every rank
about as many. A newcomer, which holds nothing, gets its blocks in the same way.
"""

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType

from ftkit.core.ids import NodeId, Seat
from ftkit.recovery.virtual_blocks import Copy, Placement

Held = Mapping[Seat, Collection[int]]
"""The blocks that each rank holds."""

Nodes = Mapping[Seat, NodeId]
"""Where ranks are. Those that it leaves out are on nodes of their own."""


#: Every rank on a node of its own.
ALONE: Nodes = MappingProxyType({})


class BlocksLost(ValueError):
    """Nobody holds some blocks any more; the message says which."""


def fresh(seats: Sequence[Seat], blocks: int, nodes: Nodes = ALONE) -> dict[Seat, frozenset[int]]:
    """What each rank of a new world is to hold, where nobody holds anything yet.

    With N (N - 1) blocks on N nodes each two ranks share two (`virtual_blocks.declustered`).
    """
    order = sorted(seats)
    owner = {block: order[block % len(order)] for block in range(blocks)}
    bare = Placement(owner=owner, replica=dict.fromkeys(owner))
    held = {seat: set(bare.owned(seat)) for seat in order}
    for copy in copies(bare, order, nodes):
        held[copy.target].add(copy.block)
    return {seat: frozenset(mine) for seat, mine in held.items()}


def settle(
    held: Held,
    blocks: int,
    nodes: Nodes = ALONE,
    *,
    before: Mapping[int, Seat] = MappingProxyType({}),
) -> Placement:
    """Owners, as evenly as can be, and stand-ins, of what the ranks hold.

    Who owned a block before, by what all have been told, goes on if that is even enough. Of more than two holders of a block those stay that are on nodes of their own, and hold least;
    the others may forget it.

    Raises:
      BlocksLost: a block is held by nobody.
    """
    holders, apart = _holders(held, blocks), _apart(nodes)
    if lost := [b for b, who in enumerate(holders) if not who]:
        raise BlocksLost(
            f"blocks {lost[:8]}{' and more' if len(lost) > 8 else ''} of {blocks} are held by none "
            f"of seats {sorted(held)}"
        )
    load = {seat: len(set(mine)) for seat, mine in held.items()}
    for who in holders:
        while len(who) > 2:
            near = {s: not all(apart(s, other) for other in who if other != s) for s in who}
            most = max(who, key=lambda s: (near[s], load[s], s))
            who.remove(most)
            load[most] -= 1
    owner = _owners(holders, sorted(held), before)
    replica = {b: next((s for s in who if s != owner[b]), None) for b, who in enumerate(holders)}
    return Placement(owner=owner, replica=replica)


def copies(placement: Placement, seats: Collection[Seat], nodes: Nodes = ALONE) -> list[Copy]:
    """What to copy so that every block has a stand-in, and every rank holds about as many.

    A stand-in is on another node than the owner, unless ranks there hold twice their share already.

    Args:
      placement: of all blocks.
      seats: of the world, those that hold nothing yet too.
      nodes: where they are.
    """
    order = sorted(seats)
    if len(order) < 2:
        return []
    table = _Table(placement, order, _apart(nodes))
    table.stand_in()
    table.even_out()
    return table.made


class _Table:
    """Who is to hold what, while copies are planned."""

    def __init__(
        self, placement: Placement, seats: Sequence[Seat], apart: Callable[[Seat, Seat], bool]
    ) -> None:
        self.made = list[Copy]()
        self._owner, self._seats, self._apart = placement.owner, seats, apart
        self._who = {b: [s] for b, s in placement.owner.items()}
        self._load = dict.fromkeys(seats, 0)
        self._shared = dict[tuple[Seat, Seat], int]()
        for block, seat in placement.owner.items():
            self._load[seat] += 1
            if (other := placement.replica[block]) is not None:
                self._pair(block, other)

    def stand_in(self) -> None:
        """Give every block a second holder, each rank's on as many others as can be."""
        share = -(-2 * len(self._who) // len(self._seats))
        for block in sorted(b for b, held in self._who.items() if len(held) == 1):
            (only,) = self._who[block]

            def price(seat: Seat, only: Seat = only) -> tuple[bool, bool, bool, int, int, Seat]:
                return (
                    self._load[seat] >= 2 * share,
                    not self._apart(only, seat),
                    self._load[seat] >= share,
                    self._shared.get((only, seat), 0),
                    self._load[seat],
                    seat,
                )

            self._copy(block, min((s for s in self._seats if s != only), key=price))

    def even_out(self) -> None:
        """Have who holds least hold blocks in place of who holds most."""
        moved = {copy.block for copy in self.made}
        while True:
            most = max(self._seats, key=lambda s: (self._load[s], s))
            least = min(self._seats, key=lambda s: (self._load[s], s))
            if self._load[most] - self._load[least] < 2:
                return
            found = list[tuple[bool, int, int]]()
            for block, held in self._who.items():
                if most not in held or least in held or block in moved:
                    continue
                stays = next(s for s in held if s != most)
                safe = self._apart(stays, most)
                if self._apart(stays, least) or not safe:
                    found.append((safe, self._shared.get((stays, least), 0), block))
            if not found:
                return
            block = min(found)[-1]
            stays = next(s for s in self._who[block] if s != most)
            self._who[block] = [stays]
            self._load[most] -= 1
            for pair in ((stays, most), (most, stays)):
                self._shared[pair] -= 1
            self._copy(block, least)
            moved.add(block)

    def _copy(self, block: int, target: Seat) -> None:
        self.made.append(Copy(block=block, source=self._owner[block], target=target))
        self._pair(block, target)

    def _pair(self, block: int, other: Seat) -> None:
        (only,) = self._who[block]
        self._who[block].append(other)
        self._load[other] += 1
        for pair in ((only, other), (other, only)):
            self._shared[pair] = self._shared.get(pair, 0) + 1


def layouts(placement: Placement, seats: Collection[Seat]) -> int:
    """How many different sets of blocks the ranks own: those that own none are alike."""
    owners = set(placement.owner.values())
    return len(owners) + any(seat not in owners for seat in seats)


def _holders(held: Held, blocks: int) -> list[list[Seat]]:
    found: list[list[Seat]] = [[] for _ in range(blocks)]
    for seat in sorted(held):
        for block in sorted(set(held[seat])):
            found[block].append(seat)
    return found


def _apart(nodes: Nodes) -> Callable[[Seat, Seat], bool]:
    """Whether two ranks are on different nodes, of which one may be lost alone."""
    return lambda one, other: one not in nodes or nodes[one] != nodes.get(other)


def _owners(
    holders: Sequence[Sequence[Seat]], seats: Sequence[Seat], before: Mapping[int, Seat]
) -> dict[int, Seat]:
    """One holder of each block, so that the busiest owns as few as can be, and the idlest as many."""
    owner = {b: before[b] for b, who in enumerate(holders) if before.get(b) in who}
    load = dict.fromkeys(seats, 0)
    for seat in owner.values():
        load[seat] += 1
    for block in sorted(range(len(holders)), key=lambda b: (len(holders[b]), b)):
        if block not in owner:
            owner[block] = min(holders[block], key=lambda s: (load[s], s))
            load[owner[block]] += 1
    while path := _relief(owner, holders, load):
        for block, seat in path:
            load[owner[block]] -= 1
            owner[block] = seat
            load[seat] += 1
    return owner


def _relief(
    owner: Mapping[int, Seat], holders: Sequence[Sequence[Seat]], load: Mapping[Seat, int]
) -> list[tuple[int, Seat]]:
    """Blocks to hand on, one after another, from a rank to one that owns two fewer; or none."""
    gives: dict[Seat, list[tuple[int, Seat]]] = {}
    for block, seat in owner.items():
        for other in holders[block]:
            if other != seat:
                gives.setdefault(seat, []).append((block, other))
    for start in sorted(load, key=lambda s: (-load[s], s)):
        came: dict[Seat, tuple[int, Seat]] = {}
        todo = deque([start])
        while todo:
            seat = todo.popleft()
            if load[start] - load[seat] >= 2:
                path = list[tuple[int, Seat]]()
                while seat != start:
                    block, before = came[seat]
                    path.append((block, seat))
                    seat = before
                return path
            for block, other in gives.get(seat, ()):
                if other != start and other not in came:
                    came[other] = block, seat
                    todo.append(other)
    return []
