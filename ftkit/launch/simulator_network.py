"""Network: the data plane of a simulated job, at a cost near linear in its ranks.

Every rank is linked to every other, and in a step each sends to each. What all have alike is kept
once: a *circle* is the members of a world and who of them is lost, an *exchange* one message from
each to each, a *flood* the same message from whoever has it to all. What is unlike is an exception
to these: links that were cut, messages that were cast to some only, or lost on their way when a
connection was reset. So what may reach whom, and in which order, is as with single messages.
"""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ftkit.core.ids import Generation, MemberId, Seat
from ftkit.core.world import World

if TYPE_CHECKING:
    from ftkit.launch.simulator import Simulation
    from ftkit.launch.simulator_rank import SimRank

#: A message that takes longer is not on its way any more: it has arrived.
SLOWEST_S = 0.3
#: So many senders of the same message get it to everybody, whatever becomes of one of them.
TELLERS = 2
#: Worlds that may be linked at the same time; of older ones nobody is any more.
CIRCLES = 8
#: Exchanges of one kind that may be under way in a generation at the same time.
UNDER_WAY = 4


class Circle:
    """The members of one world, as those see them who are linked to all of them."""

    def __init__(self, world: World, dead: set[MemberId]) -> None:
        self.world = world
        self.members = world.member_ids
        self.watchers: dict[MemberId, SimRank] = {}
        """Who is connected to all of them and would halt for the loss of one, by its member."""
        self.noticed_s = -1.0
        self._lost = self.members & dead
        #: Circles all of whose members are linked to the members that those lack.
        self._reached_from: set[Circle] = set()
        self._lacking: dict[Circle, frozenset[MemberId]] = {}

    @property
    def lost(self) -> frozenset[MemberId]:
        """Members that are dead."""
        return self._lost

    def lose(self, members: Iterable[MemberId]) -> None:
        """These have died."""
        self._lost |= self.members.intersection(members)

    def lacking(self, other: "Circle") -> frozenset[MemberId]:
        """The members that `other` has not."""
        lacking = self._lacking.get(other)
        if lacking is None:
            lacking = self._lacking[other] = self.members - other.members
        return lacking

    def strangers(self, rank: "SimRank", ranks: dict[MemberId, "SimRank"]) -> set[MemberId]:
        """Members that `rank`, which is of another circle, has no link to."""
        own = rank.circle
        if own is None:
            return set(self.members - {rank.member})
        inside = rank.member in own.members
        if own is self or (inside and own in self._reached_from):
            return set()
        lacking = self.lacking(own)
        if inside and all(ranks[m].circle is own for m in lacking):
            self._reached_from.add(own)
            return set()
        circles = ((m, ranks[m].circle) for m in lacking if m != rank.member)
        return {m for m, c in circles if c is None or rank.member not in c.members}


class Exchange:
    """One message from every member of a circle to every other."""

    def __init__(self, circle: Circle, sequence: int) -> None:
        self.circle, self.sequence = circle, sequence
        self.said: dict[MemberId, Any] = {}
        self.result: Any = None
        """What those who have all of it make of it: they all have the same."""
        self.sent_s: dict[MemberId, float] = {}
        self.cast_to: dict[MemberId, int] = {}
        """Who was stopped while casting: to how many, in the order of ranks, it had cast."""
        self.reset_s: dict[MemberId, float] = {}
        """When a sender's connections were reset: what was on its way is lost."""
        self.delivered = False

    def missing(self) -> int:
        """How many have sent nothing yet."""
        return self.circle.world.size - len(self.said)

    def reaches(self, member: MemberId) -> bool:
        """Whether everybody's message came to `member`, links that were cut apart."""
        rank_of = self.circle.world.rank_of
        own = rank_of(member) or 0
        for source, count in self.cast_to.items():
            place = own - (own > (rank_of(source) or 0))
            if source != member and place >= count:
                return False
        return not any(
            source != member and self.way_s(source, member) > at - self.sent_s[source]
            for source, at in self.reset_s.items()
        )

    def way_s(self, source: MemberId, member: MemberId) -> float:
        """How long the message took between these two: mostly short, now and then not."""
        message = b"%d,%d,%d,%d" % (self.circle.world.generation, self.sequence, source, member)
        chance = zlib.crc32(message) / 2**32
        return 0.02 + 9.3 * chance if chance < 0.03 else 0.0002 + 0.0048 * chance


class Network:
    """All links of one simulation. Owned by it."""

    def __init__(self, sim: "Simulation") -> None:
        self._sim = sim
        self._dead: set[MemberId] = set()
        self._circles: dict[Generation, Circle] = {}
        self._exchanges: dict[Generation, dict[tuple[str, int], Exchange]] = {}
        #: Of each flood: who has still to be told, and how often.
        self._floods: dict[tuple[str, Generation], dict[MemberId, int]] = {}
        #: Until when two seats cannot connect, whoever sits there.
        self._barred: dict[Seat, dict[Seat, float]] = defaultdict(dict)
        #: Links that are cut now, and when each was cut last.
        self._cut: dict[MemberId, set[MemberId]] = defaultdict(set)
        self._cut_s: dict[MemberId, dict[MemberId, float]] = defaultdict(dict)

    # Links.

    def circle(self, world: World) -> Circle:
        """The circle of a world."""
        circle = self._circles.get(world.generation)
        if circle is None or circle.world is not world:
            if circle is not None and circle.members == world.member_ids:
                return circle
            circle = self._circles[world.generation] = Circle(world, self._dead)
            for old in sorted(self._circles)[:-CIRCLES]:
                del self._circles[old]
        return circle

    def linked(self, rank: "SimRank", peer: "SimRank") -> bool:
        """Whether the connection between two ranks stands."""
        if not (rank.alive and peer.alive) or peer.member in self._cut.get(rank.member, ()):
            return False
        return (rank.circle is not None and peer.member in rank.circle.members) or (
            peer.circle is not None and rank.member in peer.circle.members
        )

    def unlinked(self, rank: "SimRank", world: World) -> frozenset[MemberId]:
        """Members of `world` that `rank` has no link to."""
        circle = self.circle(world)
        away = circle.lost
        if cut := self._cut.get(rank.member):
            away |= cut & circle.members
        if strangers := circle.strangers(rank, self._sim.ranks):
            away |= strangers
        return away

    def connect(self, rank: "SimRank", world: World) -> frozenset[MemberId]:
        """Connect to all members of `world`; who cannot be reached is the answer."""
        circle = self.circle(world)
        for seat, until_s in self._barred.get(rank.seat, {}).items():
            peer = self._sim.seated.get(seat)
            if peer is None or peer.member not in circle.members or peer is rank:
                continue
            if self._sim.now >= until_s:
                self._cut[rank.member].discard(peer.member)
                self._cut[peer.member].discard(rank.member)
            elif not self.linked(rank, peer):
                self._cut[rank.member].add(peer.member)
                self._cut[peer.member].add(rank.member)
        self.unwatch(rank)
        rank.circle = circle
        circle.watchers[rank.member] = rank
        return self.unlinked(rank, world)

    def unwatch(self, rank: "SimRank") -> None:
        """What becomes of its links does not concern a rank that stands still, until it connects."""
        if rank.circle is not None:
            rank.circle.watchers.pop(rank.member, None)

    def beyond(self, rank: "SimRank", world: World) -> frozenset[MemberId]:
        """Members of `world` that are not of the circle of `rank`."""
        circle = self.circle(world)
        return circle.members if rank.circle is None else circle.lacking(rank.circle)

    def cut(self, one: "SimRank", other: "SimRank", until_s: float) -> None:
        """Cut the link of two ranks; their seats cannot connect until `until_s`."""
        for a, b in ((one, other), (other, one)):
            self._barred[a.seat][b.seat] = until_s
        if not self.linked(one, other):
            return
        for a, b in ((one, other), (other, one)):
            self._cut[a.member].add(b.member)
            self._cut_s[a.member][b.member] = self._sim.now
            self._notice(a, lossy=True)

    def heal(self) -> None:
        """Whoever wants to connect can."""
        for barred in self._barred.values():
            for seat in barred:
                barred[seat] = 0.0

    def died(self, rank: "SimRank", *, lossy: bool) -> None:
        """A process is gone: a reset loses what is on the way, an end of stream does not."""
        self._dead.add(rank.member)
        self.unwatch(rank)
        if lossy:
            rank.reset_s = self._sim.now
            for exchange in self._exchanges.get(rank.generation, {}).values():
                sent_s = exchange.sent_s.get(rank.member)
                if sent_s is not None and self._sim.now - sent_s < SLOWEST_S:
                    exchange.reset_s[rank.member] = self._sim.now
        for circle in self._circles.values():
            if rank.member in circle.members:
                circle.lose([rank.member])
                if circle.noticed_s != self._sim.now:
                    circle.noticed_s = self._sim.now
                    for watcher in list(circle.watchers.values()):
                        self._notice(watcher, lossy=lossy)

    def _notice(self, rank: "SimRank", *, lossy: bool) -> None:
        """Have a rank see soon that a connection has ended: after what came by it, unless reset."""
        if rank.notice_s > self._sim.now:
            return  # it looks at all of them then
        rank.notice_s = self._sim.now + self._sim.delay_s()
        if not lossy:
            rank.notice_s = max(rank.notice_s, rank.inbox_s)
        self._sim.after(rank.notice_s - self._sim.now, rank.do, rank.see_links)

    # Messages.

    def put(
        self,
        rank: "SimRank",
        world: World,
        what: str,
        sequence: int,
        value: object,
        *,
        cast_to: int | None = None,
    ) -> None:
        """A member's part of an exchange is on its way to all; or to the first `cast_to` of them.

        Once nobody's is missing, all hear of it (`SimRank.heard`).
        """
        exchange = self._exchange(world, what, sequence)
        exchange.said[rank.member] = value
        exchange.sent_s[rank.member] = self._sim.now
        if cast_to is not None:
            exchange.cast_to[rank.member] = cast_to
        if exchange.missing() > 0 or exchange.delivered:
            return
        exchange.delivered = True
        for member in world.members:
            peer = self._sim.ranks[member.member]
            if peer.alive:
                self._deliver(peer, peer.heard, what, sequence, exchange)

    def reaches(self, exchange: Exchange, rank: "SimRank") -> bool:
        """Whether everybody's message of an exchange came to `rank`."""
        if not exchange.reaches(rank.member):
            return False
        for peer, at in self._cut_s.get(rank.member, {}).items():
            if peer in exchange.said:
                sent_s = exchange.sent_s[peer]
                way = exchange.way_s(peer, rank.member)
                still = peer in self._cut[rank.member]
                if sent_s + way > at and (still or sent_s <= at):
                    return False
        return True

    def flood(
        self,
        rank: "SimRank",
        what: str,
        generation: Generation,
        members: Iterable[MemberId],
        action: Callable[..., None],
        *args: object,
    ) -> None:
        """Tell `members` what others tell them as well: `action(member, *args)`, where it arrives."""
        needy = self._floods.get((what, generation))
        if needy is None:
            needy = self._floods[what, generation] = dict.fromkeys(members, TELLERS)
            for key in list(self._floods)[:-UNDER_WAY]:
                del self._floods[key]
        for member in list(needy):
            peer = self._sim.ranks[member]
            if not peer.alive:
                del needy[member]
            elif peer is not rank and self.linked(rank, peer):
                needy[member] -= 1
                if not needy[member]:
                    del needy[member]
                self._deliver(peer, self._arrive, rank, peer, self._sim.now, action, args)

    def _arrive(
        self,
        source: "SimRank",
        rank: "SimRank",
        sent_s: float,
        action: Callable[..., None],
        args: tuple[object, ...],
    ) -> None:
        # By sending order: whatever ended the connection since has ended this message, too.
        if source.reset_s < sent_s and self._cut_s[rank.member].get(source.member, -1.0) < sent_s:
            action(rank, *args)

    def _deliver(self, rank: "SimRank", action: Callable[..., None], *args: object) -> None:
        delay_s = self._sim.delay_s()
        rank.inbox_s = max(rank.inbox_s, self._sim.now + delay_s)
        self._sim.after(delay_s, rank.do, action, *args)

    def _exchange(self, world: World, what: str, sequence: int) -> Exchange:
        exchanges = self._exchanges.setdefault(world.generation, {})
        exchange = exchanges.get((what, sequence))
        if exchange is None:
            exchange = exchanges[what, sequence] = Exchange(self.circle(world), sequence)
            for key in list(exchanges)[: -2 * UNDER_WAY]:
                del exchanges[key]
            for generation in sorted(self._exchanges)[:-UNDER_WAY]:
                del self._exchanges[generation]
        return exchange
