"""Stories: a hang is named early, by the job's own tempo, and nobody has to go for it."""

from ftkit.core.ids import MemberId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.awaits import roots
from ftkit.detection.config import NAMED_FLOOR_S, DetectionConfig
from ftkit.detection.observations import ObserverLate, WorldChanged
from ftkit.detection.row import Awaited, Phase
from tests.detection.scene import Scene, world

CONFIG = DetectionConfig(max_stall_s=30.0)
LOOK = CONFIG.look_s


class Job(Scene):
    """Ranks in step: each step all compute for a while, then all-reduce."""

    def __init__(self, size: int = 3, step_s: float = 0.1) -> None:
        super().__init__(size, CONFIG)
        self.step = 100
        self.seq = 50
        self.step_s = step_s

    def train(self, steps: int) -> list[Verdict]:
        """Healthy steps, looked at as often as an agent would. Everything said meanwhile."""
        said: list[Verdict] = []
        for _ in range(steps):
            self.step += 1
            for seat in range(len(self.rows)):
                self.set(seat, step=self.step, entered=self.seq)
            said += self.look(self.step_s)
            self.seq += 1
            self.wait(*range(len(self.rows)), entered=self.seq, step=self.step)
            said += self.tick(LOOK)
        return said

    def look(self, seconds: float) -> list[Verdict]:
        said: list[Verdict] = []
        end = self.clock.now() + seconds
        while self.clock.now() < end:
            said += self.tick(LOOK)
        return said

    def hang(self, seat: int, *others: int, phase: Phase = Phase.FORWARD) -> None:
        """`seat` begins another step and never comes; the others wait for it."""
        self.step += 1
        self.seq += 1
        self.set(seat, step=self.step, entered=self.seq - 1, phase=phase)
        self.wait(*others, entered=self.seq, step=self.step)

    def named(self, within: float) -> tuple[float, list[Verdict]]:
        began = self.clock.now()
        while self.clock.now() - began < within:
            if said := self.tick(LOOK):
                return self.clock.now() - began, said
        raise AssertionError(f"nobody was named within {within} s")


def test_a_hang_in_a_quick_job_is_named_within_a_second_and_nobody_has_to_go() -> None:
    job = Job()
    assert job.train(40) == []
    job.hang(1, 0, 2)
    after, (verdict,) = job.named(within=5)
    assert NAMED_FLOOR_S < after <= 1.2
    assert (verdict.seat, verdict.fault, verdict.suspected) == (1, Fault.HANG_BLOCKED, True)
    assert not verdict.evicts
    assert verdict.confidence < 1
    assert "suspected, and convicted after 30.0 s" in verdict.reason


def test_it_is_convicted_when_its_time_is_up() -> None:
    job = Job()
    job.train(40)
    job.hang(1, 0, 2)
    job.look(CONFIG.max_stall_s - 1)
    (verdict,) = job.tick(LOOK)
    assert verdict.suspected
    job.look(1.5)
    (verdict,) = job.tick(LOOK)
    assert (verdict.seat, verdict.suspected, verdict.evicts) == (1, False, True)


def test_a_stopped_rank_is_named_and_cleared_when_it_goes_on() -> None:
    job = Job()
    job.train(40)
    job.hang(2, 0, 1)
    job.states[2] = "T"
    _, (verdict,) = job.named(within=2)
    assert (verdict.seat, verdict.fault) == (2, Fault.STOPPED)
    job.states[2] = "S"
    assert job.train(5) == []
    # What was done to it is not how the job works.
    job.hang(2, 0, 1)
    after, _ = job.named(within=2)
    assert after <= 1.2


def test_a_job_of_long_steps_is_given_its_time() -> None:
    job = Job(step_s=2.0)
    assert job.train(20) == []
    job.hang(0, 1, 2)
    after, (verdict,) = job.named(within=15)
    assert verdict.seat == 0
    assert 5 * 2.0 < after < 5 * 2.0 * 1.5


def test_a_phase_that_is_always_long_excuses_no_other() -> None:
    job = Job()
    for _ in range(20):
        job.train(1)
        for seat in range(3):
            job.set(seat, step=job.step, entered=job.seq, phase=Phase.CAPTURE)
        assert job.look(1.5) == [] or job.step < 115
    job.hang(1, 0, 2)
    after, _ = job.named(within=5)
    assert after <= 1.2


def test_who_has_no_history_is_not_suspected() -> None:
    job = Job()
    job.train(5)
    job.hang(1, 0, 2)
    assert job.look(CONFIG.max_stall_s - 1) == []


def test_while_anybody_moves_nobody_is_suspected() -> None:
    job = Job(size=4)
    job.train(40)
    job.hang(1, 0, 2)
    for _ in range(50):
        job.set(3, step=job.step, entered=job.seq - 1)
        assert job.tick(LOOK) == []


def test_a_late_observer_gives_more_time() -> None:
    job = Job()
    job.train(40)
    job.hang(1, 0, 2)
    job.look(0.5)
    job.detector.ingest(ObserverLate(by_s=2.0))
    assert job.look(1.5) == []
    assert job.look(1.5) != []


def test_a_repair_is_no_tempo() -> None:
    job = Job()
    job.train(40)
    job.hang(1, 0, 2)
    job.look(3.0)
    for seat in range(3):
        job.set(seat, phase=Phase.RECOVERY, step=job.step)
    job.tick(LOOK)
    job.world = world(3, generation=2)
    job.detector.ingest(WorldChanged(world=job.world, at=job.clock.now()))
    for seat in range(3):
        job.set(seat, step=job.step, entered=0, generation=2)
    job.tick(LOOK)
    job.set(1, step=job.step, entered=0, generation=2)
    job.wait(0, 2, entered=1, step=job.step, generation=2)
    after, _ = job.named(within=5)
    assert after <= 1.2


def test_all_who_wait_together_are_suspected_of_a_broken_network() -> None:
    job = Job()
    job.train(40)
    job.seq += 1
    job.wait(0, 1, 2, entered=job.seq, step=job.step)
    after, said = job.named(within=5)
    assert after <= 1.2
    assert {v.fault for v in said} == {Fault.HANG_COMM}
    assert all(v.suspected for v in said)


def test_a_heartbeat_that_stands_still_tells_who_keeps_the_interpreter() -> None:
    job = Job()
    job.train(40)
    job.seq += 1
    job.wait(0, 1, 2, entered=job.seq, step=job.step)
    job.beating[1] = False
    job.busy[1] = 1.0
    _, said = job.named(within=5)
    job.look(0.5)
    said = job.tick(LOOK)
    assert [(v.seat, v.fault) for v in said] == [(1, Fault.HANG_BUSY)]


def test_a_broken_path_is_told_by_who_waits_for_whose_bytes() -> None:
    job = Job()
    job.train(40)
    job.seq += 1
    job.wait(0, 1, 2, entered=job.seq, step=job.step)
    # All have sent to all; only what 2 sent to 0 never came.
    for seat, senders in {0: (102,), 1: (), 2: ()}.items():
        job.awaited[seat] = Awaited(
            group=0, seq=job.seq, at_ns=1, members=tuple(MemberId(m) for m in senders)
        )
    _, said = job.named(within=5)
    assert {v.fault for v in said} == {Fault.HANG_COMM}
    assert said[0].evidence["silent_paths"] == [[2, 0]]
    assert "no bytes come from seat 2 to seat 0" in said[0].reason


def test_in_a_ring_where_all_wait_no_path_is_told() -> None:
    assert roots({Seat(0): [Seat(2)], Seat(1): [Seat(0)], Seat(2): [Seat(1)]}) == []
