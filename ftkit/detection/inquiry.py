"""Inquiry: probe before blame. From a suspicion of communication, over pair tests, to a verdict.

Pure: it is told what was seen and what the panel says, and answers with verdicts and with orders
for pair tests, which agents carry out beside the training (`PairSeen` comes back). ::

    suspicion      a path that training found slow (`PathWatch`); steps that wait longer for what
                   collectives carry (`TransferWatch`), or a group whose collectives take longer
                   (SLOW_COMM that names no path, of `slow_transfers`); a collective that all
                   entered and none leaves (HANG_COMM)
    first round    the paths that training uses: neighbours on the ring, suspects
    second round   what was bad is tried again, and counts by the better of both; its ends meet up
                   to three others each: a NIC, or a link?
    verdict        the paths as `paths.read` reads them; none: the suspicion is dropped, and not
                   heard again for a while

No place is in two tests at a time, so a round takes as long as its slowest pair, and there are
some rounds whatever the size of the job. What was measured while nothing was suspected, after a
world began, is the history that the next tests are compared with.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ftkit.core.ids import Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.core.world import Member, World
from ftkit.detection import paths
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.path_watch import PathWatch
from ftkit.detection.paths import Cell, Pair, PathFault, Where
from ftkit.detection.signals import PairSeen
from ftkit.detection.transfer_watch import TransferWatch

logger = logging.getLogger(__name__)

#: A pair test is given up after this; what came of it until then counts.
TEST_S = 3.0
#: Beyond it an agent that was asked has not answered.
ANSWER_S = TEST_S + 2.0
#: Nothing is probed sooner after a probe that found nothing; doubled each time, up to the last.
AGAIN_S, AGAIN_S_MAX = 5.0, 640.0
#: How long a verdict stands before it is looked at again.
STANDS_S = 30.0
#: The paths of a world are measured this long after it began.
SETTLED_S = 1.0
#: Suspects beyond these are not tried: a fault of so many paths shows in any of them.
PAIRS_MAX = 4096

#: Each place is measured with those so far from it when a world begins: a few for the second
#: round, whatever the size of the job.
STRIDES = (1, 2, 3)

_TRIGGERS = (Fault.SLOW_COMM, Fault.HANG_COMM)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairOrder:
    """Two seats whose path is to be tested both ways; the agent of `a` dials that of `b`."""

    number: int
    a: Seat
    b: Seat
    limit_s: float = TEST_S


@dataclass(slots=True)
class _Probe:
    """One probe under way."""

    reason: str
    cause: tuple[Verdict, ...]
    """What the panel said that began it; () for the history."""
    baseline: bool
    began: float
    waiting: list[list[tuple[Seat, Seat]]]
    """Rounds that have not begun."""
    open: dict[int, tuple[float, set[tuple[Seat, Seat]]]] = field(default_factory=dict)
    """Order -> when it was given, and the directions that have not been answered."""
    cells: dict[Pair, Cell] = field(default_factory=dict)
    """By seats."""
    second: bool = False
    tests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """A probe that has ended, for the event stream."""

    reason: str
    baseline: bool
    took_s: float
    tests: int
    """Pair tests that were ordered."""
    found: tuple[str, ...]
    """What is wrong, a phrase each; () when the paths are healthy."""


class Inquiry:
    """One for a job. Owned by the thread that owns the panel."""

    def __init__(self, *, between_seats: bool = False) -> None:
        """Know nothing yet.

        Args:
          between_seats: whether paths between seats of one node are worth a test.
        """
        self._local = between_seats
        self._watch = PathWatch()
        self._transfers = TransferWatch()
        self._world: World | None = None
        self._began = 0.0
        self._by_seat: dict[Seat, Member] = {}
        self._places: dict[Seat, int] = {}
        self._history: dict[Pair, float] = {}
        self._probe: _Probe | None = None
        self._number = 0
        self._orders: list[PairOrder] = []
        self._ended: list[Probed] = []
        self._standing: list[Verdict] = []
        self._stands_until = float("-inf")
        self._quiet_until = float("-inf")
        self._again_s = AGAIN_S
        self._cleared = float("inf")
        """How strong the suspicion was that was dropped last."""
        self._unexplained: frozenset[Fault] = frozenset()
        """What the last probe was about and could not name: then the panel's word stands."""
        self._measured = False

    def ingest(self, observation: Observation) -> None:
        """Take in what was seen."""
        self._watch.ingest(observation)
        self._transfers.ingest(observation)
        match observation:
            case WorldChanged(world=world, at=at):
                self._begin_world(world, at)
            case PairSeen():
                self._take(observation)
            case _:
                pass

    def tick(self, now: float, verdicts: Sequence[Verdict]) -> list[Verdict]:
        """What holds at `now`, given what the panel says.

        Verdicts of communication that name no path are held back while they are probed, and are
        said as they are when the probe found the paths healthy.
        """
        causes = tuple(v for v in verdicts if v.fault in _TRIGGERS and v.peer is None)
        rest = [v for v in verdicts if v not in causes]
        if self._world is None or self._world.size < 2:
            return [*rest, *causes]
        if self._probe is None:
            self._begin_probe(now, causes)
        if self._probe is not None:
            self._advance(self._probe, now)
        if now > self._stands_until and self._probe is None:
            self._standing = []
        faults = {v.fault for v in causes}
        self._unexplained &= frozenset(faults)
        unnamed = [v for v in causes if v.fault in self._unexplained]
        return [*rest, *self._standing, *unnamed]

    def orders(self) -> list[PairOrder]:
        """Tests to be carried out now, each told once."""
        fresh, self._orders = self._orders, []
        return fresh

    def ended(self) -> list[Probed]:
        """Probes that have ended, each told once."""
        fresh, self._ended = self._ended, []
        return fresh

    # Beginning.

    def _begin_world(self, world: World, at: float) -> None:
        self._world, self._began, self._probe = world, at, None
        self._by_seat = {m.seat: m for m in world.members}
        many = len({m.node for m in world.members}) > 1
        self._places = {m.seat: int(m.node) if many else int(m.seat) for m in world.members}
        self._standing, self._unexplained, self._measured = [], frozenset(), False
        # A path that was healthy once is the measure of it in every later world.

    def _begin_probe(self, now: float, causes: tuple[Verdict, ...]) -> None:
        if not self._testable:
            self._unexplained = frozenset(v.fault for v in causes)
            return
        # What is known from the beginning comes first: without it much looks slow.
        suspects = self._watch.suspects if self._measured else ()
        slower = self._transfers.suspicion if self._measured else ""
        hang = tuple(v for v in causes if v.fault is Fault.HANG_COMM)
        again = now > self._stands_until and bool(self._standing)
        if hang and Fault.HANG_COMM not in self._unexplained and not self._names_hang:
            self._start(now, hang[0].reason, hang, self._paths(()))
        elif again or (
            (suspects or slower or causes)
            and (now >= self._quiet_until or self._strength > 2 * self._cleared)
        ):
            if causes:
                reason = causes[0].reason
            elif slower:
                reason = slower
            elif again:
                reason = "whether what was found still holds"
            else:
                a, b = suspects[0]
                reason = f"training sends from seat {a} to seat {b} more slowly than it did"
            self._start(now, reason, causes, self._paths([*suspects, *_between(causes)]))
        elif not self._measured and not (suspects or slower) and now - self._began >= SETTLED_S:
            self._measured = True
            missing = [p for p in self._paths((), STRIDES) if not self._known(p)]
            if missing:
                self._start(now, "the paths as they are at the beginning", (), missing, True)

    @property
    def _strength(self) -> float:
        """How many times slower than usual training finds what it sends."""
        return max(self._watch.times, self._transfers.times)

    @property
    def _testable(self) -> bool:
        return self._local or self._many_nodes

    @property
    def _many_nodes(self) -> bool:
        assert self._world is not None, "asked of a world"
        return self._world.members[0].node != self._world.members[-1].node

    @property
    def _names_hang(self) -> bool:
        return any(v.fault is Fault.HANG_COMM for v in self._standing)

    def _known(self, pair: tuple[Seat, Seat]) -> bool:
        a, b = (self._places[seat] for seat in pair)
        return (a, b) in self._history and (b, a) in self._history

    def _paths(
        self, suspects: Iterable[Pair], strides: Iterable[int] = (1,)
    ) -> list[tuple[Seat, Seat]]:
        """Pairs of seats: suspects, those training uses, neighbours so many places apart.

        Of the pairs between the same two places, the first.
        """
        assert self._world is not None, "there is a world"
        seats = [m.seat for m in self._world.members]
        speaker: dict[int, Seat] = {}
        for seat in seats:
            speaker.setdefault(self._places[seat], seat)
        ring = list(speaker.values())
        pairs = [(a, b) for a, b in [*suspects, *sorted(self._watch.in_use)]]
        for stride in strides:
            pairs += zip(ring, ring[stride:] + ring[:stride], strict=True)
        found: dict[tuple[int, int], tuple[Seat, Seat]] = {}
        for a, b in pairs:
            if a not in self._places or b not in self._places:
                continue
            low, high = sorted((self._places[Seat(a)], self._places[Seat(b)]))
            if low != high:
                found.setdefault((low, high), (Seat(a), Seat(b)))
        return list(found.values())[:PAIRS_MAX]

    def _start(
        self,
        now: float,
        reason: str,
        cause: tuple[Verdict, ...],
        pairs: Sequence[tuple[Seat, Seat]],
        baseline: bool = False,
    ) -> None:
        self._probe = _Probe(
            reason=reason,
            cause=cause,
            baseline=baseline,
            began=now,
            waiting=rounds_of(pairs, self._places),
        )

    # Going on.

    def _take(self, seen: PairSeen) -> None:
        probe = self._probe
        if probe is None or seen.order not in probe.open:
            return
        _, expected = probe.open[seen.order]
        direction = (seen.sender, seen.receiver)
        if direction not in expected:
            return
        expected.discard(direction)
        if seen.seconds or not seen.starved:  # else a machine was too busy: no word on the path
            seconds = min(seen.seconds, default=float("inf"))
            cell = Cell(nbytes=max(1, seen.nbytes), seconds=seconds, repeats=len(seen.seconds))
            pair = self._places[seen.sender], self._places[seen.receiver]
            before = probe.cells.get(pair)
            if before is None or (before.firm, before.rate) < (cell.firm, cell.rate):
                probe.cells[pair] = cell
        if not expected:
            del probe.open[seen.order]

    def _advance(self, probe: _Probe, now: float) -> None:
        silent = {n: ways for n, (given, ways) in probe.open.items() if now - given > ANSWER_S}
        if silent:
            # Their agents are busy, dead or blind: that is no word on the paths.
            some = sorted(way for ways in silent.values() for way in ways)[:4]
            logger.warning("%d pair tests were not answered, of %s", len(silent), some)
            for number in silent:
                del probe.open[number]
        if probe.open:
            return
        if not probe.waiting and not probe.second and not probe.baseline:
            probe.second = True
            probe.waiting = self._second_round(probe)
        if not probe.waiting:
            self._conclude(probe, now)
            return
        for a, b in probe.waiting.pop(0):
            self._number += 1
            probe.tests += 1
            probe.open[self._number] = (now, {(a, b), (b, a)})
            self._orders.append(PairOrder(number=self._number, a=a, b=b))

    def _second_round(self, probe: _Probe) -> list[list[tuple[Seat, Seat]]]:
        bad = paths.bad_cells(probe.cells, self._history)
        if not bad:
            return []
        speaker: dict[int, Seat] = {}
        for seat, place in self._places.items():
            speaker.setdefault(place, seat)
        again = {(min(pair), max(pair)) for pair in bad}
        more = again.union(paths.further(probe.cells, bad, speaker, self._history))
        return rounds_of([(speaker[a], speaker[b]) for a, b in sorted(more)], self._places)

    def _conclude(self, probe: _Probe, now: float) -> None:
        self._probe = None
        faults = paths.read(probe.cells, self._history)
        if probe.baseline:
            # Even so: nothing is suspected, and a path that is slow from the start is as it is.
            self._remember(probe)
            faults = []
        else:
            self._settle(probe, faults, now)
        self._ended.append(
            Probed(
                reason=probe.reason,
                baseline=probe.baseline,
                took_s=now - probe.began,
                tests=probe.tests,
                found=tuple(self._phrase(f, probe.cells) for f in faults),
            )
        )

    def _remember(self, probe: _Probe) -> None:
        """The best of a path is what it can do: what is less had to share the machine."""
        for pair, cell in probe.cells.items():
            if cell.firm:
                self._history[pair] = max(self._history.get(pair, 0.0), cell.rate)

    def _settle(self, probe: _Probe, faults: Sequence[PathFault], now: float) -> None:
        hang = any(v.fault is Fault.HANG_COMM for v in probe.cause)
        if hang:
            # Only what carries nothing holds up everybody for good.
            faults = [f for f in faults if f.share == 0.0] or list(faults)
        self._standing = [self._verdict(f, probe, now) for f in faults]
        self._stands_until = now + STANDS_S if faults else float("-inf")
        named = {v.fault for v in self._standing}
        self._unexplained = frozenset(v.fault for v in probe.cause if v.fault not in named)
        self._cleared = self._strength or float("inf")
        if faults:
            self._again_s, self._quiet_until = AGAIN_S, now + AGAIN_S
        else:
            self._remember(probe)
            self._watch.forgive()
            self._transfers.forgive()
            self._quiet_until = now + self._again_s
            self._again_s = min(2 * self._again_s, AGAIN_S_MAX)

    # Saying it.

    def _verdict(self, fault: PathFault, probe: _Probe, now: float) -> Verdict:
        seats: dict[int, Seat] = {}
        for seat, place in self._places.items():
            seats.setdefault(place, seat)
        dead = fault.share == 0.0
        seat = seats[fault.place]
        peer = None if fault.peer is None else seats[fault.peer]
        rates = {f"{a}>{b}": round(c.rate) for (a, b), c in sorted(probe.cells.items())}
        since = min((v.since_s for v in probe.cause), default=probe.began)
        return Verdict(
            fault=Fault.HANG_COMM if dead else Fault.SLOW_COMM,
            member=self._by_seat[seat].member,
            seat=seat,
            peer=peer,
            reason=self._phrase(fault, probe.cells),
            since_s=since,
            # Two places are told apart from their link only by a third.
            confidence=0.7 if fault.alone else 0.95,
            evidence={
                "where": fault.where.value,
                "place": fault.place,
                "peer_place": fault.peer,
                "share": round(fault.share, 3),
                "rates": rates if len(rates) <= 64 else {k: rates[k] for k in list(rates)[:64]},
                "tests": probe.tests,
                "probe_s": round(now - probe.began, 3),
                "suspicion": probe.reason,
            },
        )

    def _phrase(self, fault: PathFault, cells: Mapping[Pair, Cell]) -> str:
        word = "node" if self._many_nodes else "seat"
        best = max(cells[p].rate for p in fault.cells)
        usual = best / fault.share if fault.share else 0.0
        pace = (
            "carries nothing"
            if fault.share == 0.0
            else f"carries {_speed(best)} where {_speed(usual)} would be usual"
        )
        match fault.where:
            case Where.EGRESS:
                return f"what {word} {fault.place} sends to anybody {pace}: its NIC, outgoing"
            case Where.INGRESS:
                return f"what anybody sends to {word} {fault.place} {pace}: its NIC, incoming"
            case Where.NIC:
                return f"the NIC of {word} {fault.place} {pace}, both ways"
            case Where.LINK:
                maybe = ", or the NIC of one of them" if fault.alone else ""
                return f"the link between {word}s {fault.place} and {fault.peer} {pace}{maybe}"
            case Where.DIRECTION:
                return f"the link from {word} {fault.place} to {word} {fault.peer} {pace}"


def _between(causes: Iterable[Verdict]) -> list[Pair]:
    """Neighbours among the seats of each group that is said to be slow."""
    pairs: list[Pair] = []
    for cause in causes:
        seats = cause.evidence.get("seats")
        if isinstance(seats, list) and len(seats) > 1:
            pairs += zip(seats, seats[1:] + seats[:1], strict=True)
    return pairs


def rounds_of(
    pairs: Iterable[tuple[Seat, Seat]], places: Mapping[Seat, int]
) -> list[list[tuple[Seat, Seat]]]:
    """The pairs in rounds in which no place is met twice; pure.

    First fit: at most twice as many rounds, less one, as the busiest place has pairs.
    """
    rounds: list[tuple[set[int], list[tuple[Seat, Seat]]]] = []
    for a, b in pairs:
        ends = {places[a], places[b]}
        free = next((r for r in rounds if not r[0] & ends), None)
        if free is None:
            free = (set(), [])
            rounds.append(free)
        free[0].update(ends)
        free[1].append((a, b))
    return [members for _, members in rounds]


def _speed(rate: float) -> str:
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"
