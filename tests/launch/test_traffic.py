"""An agent's gate: what it lets through between the collectives that its board tells of."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ftkit.checkpoint.gate import go_through
from ftkit.checkpoint.parity.combine import Superseded
from ftkit.core.clock import ManualClock
from ftkit.core.errors import UsageError
from ftkit.core.governor import Grant, Pause, TrafficLimits
from ftkit.core.ids import MemberId, NodeId
from ftkit.detection.recorder import Recorder
from ftkit.detection.row import Phase
from ftkit.detection.status import BOARD, StatusBoard
from ftkit.launch.arenas import PENDING_S, PENDING_TIMES, Arenas
from ftkit.launch.config import JobConfig
from ftkit.launch.traffic import SAY_AFTER_S, TrafficGate

BUCKET_S, LONG_S = 0.01, 0.1
RATE = 100e6
MB = 1 << 20


class Node:
    """A node of one rank, which reduces two buckets a step on a clock that it turns itself."""

    def __init__(self, root: Path, limits: TrafficLimits) -> None:
        config = JobConfig(job="ab12", command=("x",), shm_root=str(root))
        self.arenas = Arenas(config, NodeId(0))
        self.board = StatusBoard.open(self.arenas.directory / BOARD)
        self.clock = ManualClock(100.0)
        self.rank = Recorder(self.board.attach(0, MemberId(0)), self.clock)
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.gate = TrafficGate(
            self.arenas, limits, lambda kind, **f: self.told.append((kind, f)), clock=self.clock
        )
        self.gate.set_open(False)
        self.seq = 0

    def bucket(self) -> None:
        self.rank.enter(0, self.seq, "all_reduce", MB)
        self.clock.advance(BUCKET_S)
        self.rank.leave(0, self.seq, True)
        self.seq += 1

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.bucket()
            self.clock.advance(0.002)
            self.bucket()
            self.clock.advance(LONG_S)

    def close(self) -> None:
        self.rank.close()
        self.board.close()
        self.arenas.remove()


def refused(node: Node, nbytes: int) -> bool:
    return isinstance(node.gate.ask(nbytes), Pause)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    limits = TrafficLimits(rate_guess=RATE, max_slowdown=0.0)
    made = Node(tmp_path, limits)
    yield made
    made.close()


def test_what_fits_the_window_goes_and_what_does_not_waits(node: Node) -> None:
    node.steps(10)
    node.bucket()
    assert refused(node, MB), "this may be the gap between two buckets"
    node.clock.advance(0.004)
    grant = node.gate.ask(MB)
    assert isinstance(grant, Grant)
    node.gate.arrived(grant, MB / RATE)
    node.clock.advance(0.09)
    assert refused(node, MB), "10 ms do not fit the 6 ms that are left"


def test_a_phase_that_begins_within_a_window_does_not_make_it_longer(node: Node) -> None:
    node.steps(10)
    node.bucket()
    node.clock.advance(0.002)
    node.bucket()
    node.clock.advance(LONG_S - 0.005)
    node.rank.phase(Phase.OPTIMIZER)
    assert refused(node, MB), "5 ms are left, whatever the rank does"


def test_nothing_goes_while_a_bucket_is_reduced_unless_it_hangs(node: Node) -> None:
    node.steps(10)
    node.rank.enter(0, 99, "all_reduce", MB)
    node.clock.advance(0.05)
    assert refused(node, MB)
    node.clock.advance(PENDING_S)
    assert not refused(node, MB)


def test_on_a_slow_link_a_long_collective_is_not_taken_for_one_that_hangs(node: Node) -> None:
    for _ in range(3):  # 4 s each
        node.rank.enter(0, node.seq, "all_reduce", MB)
        node.clock.advance(4.0)
        node.rank.leave(0, node.seq, True)
        node.seq += 1
        node.clock.advance(LONG_S)
        node.gate.ask(1 << 40)  # looks
    node.rank.enter(0, node.seq, "all_reduce", MB)
    for _ in range(4):
        node.clock.advance(0.9)
        assert refused(node, MB)
    node.clock.advance(4 * PENDING_TIMES)
    assert not refused(node, MB), "it hangs"


def test_while_the_job_is_repaired_everything_goes(node: Node) -> None:
    node.steps(10)
    node.rank.enter(0, 99, "all_reduce", MB)
    assert refused(node, MB)
    node.gate.set_open(True)
    assert not refused(node, 1 << 40)


@pytest.mark.parametrize("ends", ["withdraws", "the gate opens"])
def test_who_waits_no_more_is_not_said_to_wait(node: Node, ends: str) -> None:
    node.steps(10)
    node.rank.enter(0, 99, "all_reduce", MB)
    if ends == "withdraws":

        def superseded() -> None:
            raise Superseded

        with pytest.raises(Superseded):
            go_through(node.gate, MB, check=superseded)
    else:
        assert refused(node, MB)
        node.gate.set_open(True)
        node.gate.set_open(False)
    node.rank.leave(0, 99, True)
    node.clock.advance(10 * SAY_AFTER_S)
    node.rank.enter(0, 100, "all_reduce", MB)
    assert refused(node, MB), "the first time that this one asks"
    assert not node.told


def test_what_never_fits_is_told_once_with_numbers(node: Node) -> None:
    node.steps(10)
    for _ in range(60):
        node.steps(1)
        assert refused(node, 64 * MB), "0.67 s fit no window of 0.1 s"
    (kind, fields), *more = node.told
    assert not more
    assert kind == "traffic-stretched"
    assert fields["bytes"] == 64 * MB
    assert 60 * LONG_S > SAY_AFTER_S
    assert 0.7 < fields["idle_share"] < 0.9


def test_pieces_that_go_without_a_window_are_told_of_too(tmp_path: Path) -> None:
    node = Node(tmp_path, TrafficLimits(rate_guess=RATE, max_slowdown=0.05))
    try:
        went = 0
        for _ in range(400):  # buckets one right after the other
            node.bucket()
            node.rank.enter(0, node.seq, "all_reduce", MB)
            decision = node.gate.ask(MB, whole=False)
            if isinstance(decision, Grant):
                went += decision.bytes
                node.gate.arrived(decision, decision.bytes / RATE)
            node.rank.leave(0, node.seq, True)
            node.seq += 1
        assert went, "slowly"
        (said,) = node.told
        assert said[0] == "traffic-stretched"
    finally:
        node.close()


def test_the_slow_down_that_is_allowed_gets_it_through(tmp_path: Path) -> None:
    node = Node(tmp_path, TrafficLimits(rate_guess=RATE, max_slowdown=0.05))
    try:
        node.steps(10)
        for _ in range(200):
            node.steps(1)
            if not refused(node, 64 * MB):
                break
        # 0.67 s are 5 % of 13.4 s.
        assert 13.4 < node.clock.now() - 100.0 < 13.4 + 1
    finally:
        node.close()


def test_a_slow_down_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-slowdown"):
        JobConfig(job="a", command=("x",), max_slowdown=1.5)


@pytest.mark.parametrize("cap", ["link", "memory"])
def test_a_cap_is_a_rate_and_goes_with_pacing(cap: str) -> None:
    def config(value: float, slowdown: float | None) -> JobConfig:
        return JobConfig(
            job="a",
            command=("x",),
            max_slowdown=slowdown,
            **{f"{cap}_cap": value},  # type: ignore[arg-type]
        )

    config(1e6, 0.01)
    with pytest.raises(UsageError, match=f"--{cap}-cap goes with --max-slowdown"):
        config(1e6, None)
    for value in (0.0, -1e6, float("inf"), float("nan")):
        with pytest.raises(UsageError, match=f"--{cap}-cap is"):
            config(value, 0.01)


def test_a_cap_of_memory_bandwidth_holds_back_what_touches_more(tmp_path: Path) -> None:
    limits = TrafficLimits(rate_guess=RATE, memory_rate_max=6e6, unacknowledged_max=9)
    node = Node(tmp_path, limits)
    try:
        assert isinstance(node.gate.ask(MB, touches=4.0), Grant)
        refused = node.gate.ask(MB, touches=4.0)
        assert isinstance(refused, Pause)
        assert "memory bandwidth" in refused.reason
        assert isinstance(node.gate.ask(MB, touches=1.0), Grant)
    finally:
        node.close()
