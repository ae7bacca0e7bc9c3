"""From a suspicion over pair tests to a verdict; agents and their network are played here."""

from collections.abc import Callable

import pytest

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import MemberId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection import inquiry
from ftkit.detection.inquiry import Inquiry, PairOrder, rounds_of
from ftkit.detection.observations import WorldChanged
from ftkit.detection.signals import PairSeen, from_json, to_json
from tests.detection.scene import world
from tests.detection.test_path_watch import paths
from tests.detection.test_transfer_watch import step_seen

RATE = 1e8


class Job:
    """A job of `nodes` nodes of `per_node` seats; `share(a, b)` of what a path between nodes does."""

    def __init__(self, nodes: int, per_node: int = 1, *, local: bool = False) -> None:
        self.inquiry = Inquiry(between_seats=local)
        self.per_node = per_node
        self.world = world(nodes * per_node, per_node=per_node)
        self.share: Callable[[int, int], float] = lambda a, b: 1.0
        self.deaf: set[int] = set()
        self.now = 0.0
        self.generation = 1
        self.tests: list[PairOrder] = []
        self.rounds = 0
        self.inquiry.ingest(WorldChanged(world=self.world, at=0.0))

    def tick(self, *panel: Verdict) -> list[Verdict]:
        """One look; whatever was ordered is answered before the next."""
        self.now += 0.5
        said = self.inquiry.tick(self.now, panel)
        orders = self.inquiry.orders()
        self.rounds += bool(orders)
        self.tests += orders
        busy = [seat // self.per_node for o in orders for seat in (o.a, o.b)]
        assert len(busy) == len(set(busy)) or self.inquiry._local, "no node is in two tests"
        for order in orders:
            for a, b in ((order.a, order.b), (order.b, order.a)):
                if a in self.deaf or b in self.deaf:
                    continue
                share = self.share(a // self.per_node, b // self.per_node)
                seconds = (1e6 / (RATE * share),) * 5 if share else ()
                seen = PairSeen(
                    order=order.number, sender=a, receiver=b, at=self.now,
                    nbytes=1_000_000, seconds=seconds,
                )  # fmt: skip
                self.inquiry.ingest(from_json(to_json(seen)))
        return said

    def until_probed(self, *panel: Verdict, within: int = 60) -> list[Verdict]:
        for _ in range(within):
            self.tick(*panel)
            if ended := [p for p in self.inquiry.ended() if not p.baseline]:
                assert len(ended) == 1
                return self.tick(*panel)
        raise AssertionError("no probe ended")

    def settle(self) -> None:
        """Until the paths of the beginning are measured."""
        for _ in range(60):
            self.tick()
            if any(p.baseline for p in self.inquiry.ended()):
                return
        raise AssertionError("the beginning was not measured")

    def trains(self, rate: Callable[[int, int], float] = lambda a, b: RATE, looks: int = 1) -> None:
        size = self.world.size
        for _ in range(looks):
            for seat in range(size):
                after = (seat + 1) % size
                one = paths(seat, {str(after): rate(seat, after)})
                self.inquiry.ingest(one)

    def steps(self, step: int, transfer_s: float) -> None:
        """Everybody ends `step`; the last to arrive waited for `transfer_s`."""
        for seat in range(self.world.size):
            waited_s = transfer_s + (0.5 if seat else 0.0)
            self.inquiry.ingest(step_seen(seat, step, waited_s))


def panel_says(fault: Fault, seat: int = 0) -> Verdict:
    return Verdict(
        fault=fault, member=MemberId(100 + seat), seat=Seat(seat), reason="slow", since_s=1.0
    )


SLOW = panel_says(Fault.SLOW_COMM)
HANG = panel_says(Fault.HANG_COMM)


def named(verdicts: list[Verdict]) -> list[tuple[object, ...]]:
    return [(v.fault, v.seat, v.peer, v.evidence.get("where")) for v in verdicts]


@pytest.mark.parametrize("nodes", [3, 4, 5, 8])
def test_a_slow_link_of_the_ring_is_named(nodes: int):
    job = Job(nodes)
    job.settle()
    job.trains(looks=8)
    job.share = lambda a, b: 1 / 3 if {a, b} == {1, 2} else 1.0
    job.trains(lambda a, b: RATE * job.share(a, b), looks=2)
    assert named(job.until_probed()) == [(Fault.SLOW_COMM, 1, 2, "link")]


@pytest.mark.parametrize("nodes", [3, 5])
def test_a_direction_an_egress_and_an_ingress_are_told_apart(nodes: int):
    for share, expected in (
        (lambda a, b: 1 / 3 if (a, b) == (1, 2) else 1.0, (Fault.SLOW_COMM, 1, 2, "direction")),
        (lambda a, b: 1 / 3 if a == 1 else 1.0, (Fault.SLOW_COMM, 1, None, "egress")),
        (lambda a, b: 1 / 3 if b == 2 else 1.0, (Fault.SLOW_COMM, 2, None, "ingress")),
        (lambda a, b: 1 / 3 if 1 in (a, b) else 1.0, (Fault.SLOW_COMM, 1, None, "nic")),
    ):
        job = Job(nodes)
        job.settle()
        job.share = share
        assert named(job.until_probed(SLOW)) == [expected]
        [verdict] = job.tick(SLOW)
        assert verdict.confidence == 0.95
        assert "MB/s" in verdict.reason


def test_healthy_paths_clear_the_suspicion_and_the_panels_word_stands():
    job = Job(4)
    job.settle()
    assert job.tick(SLOW) == [], "held back while it is probed"
    assert job.until_probed(SLOW) == [SLOW]
    tests = len(job.tests)
    for _ in range(8):
        assert job.tick(SLOW) == [SLOW]
    assert len(job.tests) == tests, "not probed again at once"
    for _ in range(200):
        job.tick(SLOW)
    probes = len(job.inquiry.ended())
    assert 2 <= probes <= 4, "again, and each time later"


def test_a_suspicion_of_training_that_probes_find_groundless_says_nothing():
    job = Job(4)
    job.settle()
    job.trains(looks=8)
    job.trains(lambda a, b: RATE / 10 if a == 1 else RATE, looks=2)
    assert job.until_probed() == []
    assert job.inquiry._watch.suspects == ()


def test_steps_that_wait_longer_for_what_is_carried_are_a_suspicion():
    job = Job(3)
    job.settle()
    for step in range(20):
        job.steps(step, 0.01 if step < 15 else 0.1)
    job.share = lambda a, b: 1 / 4 if a == 2 else 1.0
    [verdict] = job.until_probed()
    assert named([verdict]) == [(Fault.SLOW_COMM, 2, None, "egress")]
    assert "waited 100 ms or more" in str(verdict.evidence["suspicion"])


def test_a_link_that_training_does_not_use_is_not_looked_for():
    job = Job(5)
    job.share = lambda a, b: 0.01 if {a, b} == {0, 2} else 1.0
    job.settle()
    job.trains(looks=20)
    for _ in range(100):
        assert job.tick() == []


def test_a_verdict_stands_until_it_is_looked_at_again():
    job = Job(3)
    job.settle()
    job.share = lambda a, b: 1 / 4 if {a, b} == {0, 1} else 1.0
    [first] = job.until_probed(SLOW)
    for _ in range(int(inquiry.STANDS_S / 0.5) - 2):
        assert named(job.tick()) == named([first])
    assert named(job.until_probed()) == named([first]), "looked at again: it holds"
    job.share = lambda a, b: 1.0
    for _ in range(int(inquiry.STANDS_S / 0.5) - 2):
        job.tick()
    assert job.until_probed() == [], "looked at again: it is over"


def test_a_hang_names_the_link_that_carries_nothing():
    job = Job(4)
    job.settle()
    job.share = lambda a, b: 0.0 if {a, b} == {2, 3} else 1.0
    hangs = [panel_says(Fault.HANG_COMM, seat) for seat in range(4)]
    assert job.tick(*hangs) == []
    [verdict] = job.until_probed(*hangs)
    assert named([verdict]) == [(Fault.HANG_COMM, 2, 3, "link")]
    assert "carries nothing" in verdict.reason
    assert not verdict.evicts
    for _ in range(100):
        assert named(job.tick(*hangs)) == [(Fault.HANG_COMM, 2, 3, "link")]
        if job.inquiry.ended():
            break
    else:
        raise AssertionError("a hang is looked at again")


def test_a_hang_without_a_dead_path_is_said_as_it_is_and_probed_again_seldom():
    job = Job(3)
    job.settle()
    assert job.until_probed(HANG) == [HANG]
    for _ in range(100):
        assert job.tick(HANG) == [HANG]
    assert len(job.inquiry.ended()) <= 4


def test_an_agent_that_does_not_answer_is_no_dead_path():
    job = Job(4)
    job.settle()
    job.deaf = {3}
    assert job.until_probed(HANG) == [HANG]


def test_one_node_has_no_paths_to_test_unless_a_relay_stands_between_its_seats():
    job = Job(1, per_node=4)
    for _ in range(10):
        assert job.tick(SLOW, HANG) == [SLOW, HANG]
    assert job.tests == []
    job = Job(1, per_node=4, local=True)
    job.per_node = 1  # places are seats
    job.share = lambda a, b: 0.1 if {a, b} == {1, 2} else 1.0
    assert named(job.until_probed(SLOW)) == [(Fault.SLOW_COMM, 1, 2, "link")]


def test_other_verdicts_pass_and_a_new_world_forgets():
    job = Job(3)
    job.settle()
    exited = panel_says(Fault.EXITED, 2)
    assert job.tick(exited, SLOW) == [exited]
    job.inquiry.ingest(WorldChanged(world=world(3, generation=2, per_node=1), at=job.now))
    assert job.tick(exited) == [exited]
    assert job.inquiry.ended() == []


def test_rounds_do_not_grow_with_the_job():
    for nodes in (8, 64, 1250):
        job = Job(nodes, per_node=2)
        job.settle()
        before = job.rounds
        job.share = lambda a, b: 1 / 4 if a == 5 else 1.0
        assert named(job.until_probed(SLOW)) == [(Fault.SLOW_COMM, 10, None, "egress")]
        assert job.rounds - before <= 10


def test_rounds_are_disjoint():
    places = {Seat(i): i // 2 for i in range(12)}
    pairs = [(Seat(a), Seat(b)) for a in range(0, 12, 2) for b in range(a + 2, 12, 2)]
    rounds = rounds_of(pairs, places)
    assert sorted(p for members in rounds for p in members) == sorted(pairs)
    for members in rounds:
        ends = [places[seat] for pair in members for seat in pair]
        assert len(ends) == len(set(ends))


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": [0.0]},
        {"seconds": [-1.0]},
        {"seconds": ["x"]},
        {"seconds": 3},
        {"seconds": [1.0], "nbytes": 0},
        {"more": 1},
    ],
)
def test_a_result_that_is_none_is_refused(wrong: dict[str, object]):
    value = {
        "kind": "pair", "order": 1, "sender": 0, "receiver": 1, "at": 0.0, "nbytes": 5, "seconds": [],
    }  # fmt: skip
    assert isinstance(from_json(value), PairSeen)
    with pytest.raises(ProtocolError):
        from_json(value | wrong)
