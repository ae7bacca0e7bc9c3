"""Links and messages of a simulated job: shared where alike, and still with every exception."""

from collections.abc import Callable
from typing import Any

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.world import Member, World
from ftkit.launch.simulator_network import SLOWEST_S, Circle, Exchange, Network


class Peer:
    """What the network needs of a rank."""

    def __init__(self, member: int) -> None:
        self.member, self.seat, self.alive = MemberId(member), Seat(member), True
        self.generation = Generation(1)
        self.circle: Circle | None = None
        self.notice_s = self.inbox_s = self.reset_s = -1.0
        self.seen: list[Any] = []

    def do(self, action: Callable[..., None], *args: Any) -> None:
        if self.alive:
            action(*args)

    def see_links(self) -> None:
        self.seen.append("links")

    def heard(self, what: str, sequence: int, exchange: Exchange) -> None:
        self.seen.append(exchange)


class Wires:
    """A simulation in which nothing but the network happens."""

    def __init__(self, size: int) -> None:
        self.now = 0.0
        self.ranks: Any = {MemberId(m): Peer(m) for m in range(size)}
        self.seated: Any = {p.seat: p for p in self.ranks.values()}
        self.network = Network(self)  # type: ignore[arg-type]
        self._due: list[tuple[float, Callable[..., None], tuple[Any, ...]]] = []

    def __getitem__(self, member: int) -> Any:
        return self.ranks[member]

    def delay_s(self) -> float:
        return 0.001

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        self._due.append((self.now + delay_s, action, args))

    def settle(self) -> None:
        while self._due:
            self._due.sort(key=lambda due: due[0])
            self.now, action, args = self._due.pop(0)
            action(*args)

    def die(self, member: int, *, lossy: bool) -> None:
        self[member].alive = False
        self.network.died(self[member], lossy=lossy)


def world(*members: int, generation: int = 1) -> World:
    return World.of(
        Generation(generation),
        [
            Member(member=MemberId(m), seat=Seat(m), node=NodeId(0), host="", port=0)
            for m in members
        ],
    )


def connected(size: int) -> tuple[Wires, World]:
    wires, all_of_them = Wires(size), world(*range(size))
    assert not any(wires.network.connect(wires[m], all_of_them) for m in range(size))
    return wires, all_of_them


def put(wires: Wires, among: World, member: int, **words: Any) -> None:
    wires.network.put(wires[member], among, "vote", 1, member, **words)


def test_an_exchange_is_heard_by_all_once_nobodys_part_is_missing() -> None:
    wires, among = connected(3)
    for member in range(3):
        wires.settle()
        assert not any(wires[m].seen for m in range(3))
        put(wires, among, member)
    wires.settle()
    (exchange,) = wires[0].seen
    assert [wires[m].seen for m in range(3)] == [[exchange]] * 3
    assert exchange.said == {0: 0, 1: 1, 2: 2}
    assert all(wires.network.reaches(exchange, wires[m]) for m in range(3))


def test_what_was_cast_to_some_reaches_those_alone() -> None:
    wires, among = connected(4)
    for member in (0, 1, 3):
        put(wires, among, member)
    put(wires, among, 2, cast_to=2)
    wires.settle()
    exchange = wires[0].seen[0]
    assert [wires.network.reaches(exchange, wires[m]) for m in range(4)] == [True] * 3 + [False]


@pytest.mark.parametrize("lossy", [True, False])
def test_a_reset_loses_what_was_on_its_way(lossy: bool) -> None:
    wires, among = connected(200)
    for member in range(200):
        put(wires, among, member)
    wires.now = 0.002
    wires.die(7, lossy=lossy)
    exchange = wires.network._exchange(among, "vote", 1)
    reached = sum(wires.network.reaches(exchange, wires[m]) for m in range(200) if m != 7)
    assert (20 < reached < 150) if lossy else reached == 199
    wires.now = 2 * SLOWEST_S
    wires.die(8, lossy=True)
    there = [wires.network.reaches(exchange, wires[m]) for m in range(200) if m not in (7, 8)]
    assert sum(there) >= reached - 2, "what had arrived is not lost"


def test_a_cut_keeps_two_apart_and_nobody_else() -> None:
    wires, among = connected(3)
    wires.network.cut(wires[0], wires[1], 5.0)
    assert wires.network.unlinked(wires[0], among) == {1}
    assert wires.network.unlinked(wires[1], among) == {0}
    assert not wires.network.unlinked(wires[2], among)
    wires.settle()
    assert [wires[m].seen for m in range(3)] == [["links"], ["links"], []]
    for member in range(3):
        put(wires, among, member)
    wires.settle()
    exchange = wires[2].seen[0]
    assert [wires.network.reaches(exchange, wires[m]) for m in range(3)] == [False, False, True]
    again = world(0, 1, 2, generation=2)
    assert wires.network.connect(wires[0], again) == {1}
    wires.now = 6.0
    assert wires.network.connect(wires[0], again) == frozenset()
    assert not wires.network.unlinked(wires[1], again)


def test_who_is_dead_is_missed_by_each_of_its_world_and_told_once_a_moment() -> None:
    wires, among = connected(5)
    wires.die(3, lossy=True)
    wires.die(4, lossy=True)
    wires.settle()
    assert [wires[m].seen for m in range(3)] == [["links"]] * 3
    assert wires.network.unlinked(wires[0], among) == {3, 4}
    assert wires.network.connect(wires[0], world(0, 1, 4, generation=2)) == {4}


def test_newcomers_are_linked_to_the_world_they_connected_to_and_not_to_each_other() -> None:
    wires, old = connected(3)
    wires.ranks |= {MemberId(m): Peer(m) for m in (8, 9)}
    for newcomer in (8, 9):
        assert not wires.network.connect(wires[newcomer], old)
    grown = world(0, 1, 2, 8, 9, generation=2)
    assert wires.network.beyond(wires[0], grown) == {8, 9}
    assert not wires.network.unlinked(wires[0], grown)
    assert wires.network.unlinked(wires[8], grown) == {9}
    assert not wires.network.connect(wires[8], grown), "now it is linked to all of them"
    wires.die(9, lossy=False)
    assert wires.network.unlinked(wires[0], grown) == {9}


def test_a_flood_comes_from_whoever_is_left_of_those_who_tell() -> None:
    wires, among = connected(4)
    told: list[int] = []

    def tell(member: int) -> None:
        wires.network.flood(
            wires[member],
            "abort",
            among.generation,
            among.member_ids,
            lambda r: told.append(r.member),
        )

    tell(0)
    wires.die(0, lossy=True)
    wires.settle()
    assert not told, "a reset lost it"
    for member in (1, 2, 3):
        tell(member)
    wires.settle()
    assert sorted(set(told)) == [1, 2, 3]
    assert len(told) < 9, "not everybody tells everybody"
