"""Transfers that grow slow, seen in what steps waited at least."""

import random

import pytest

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.observations import WorldChanged
from ftkit.detection.signals import StepSeen
from ftkit.detection.transfer_watch import TransferWatch
from tests.detection.scene import world

SIZE = 4


def step_seen(seat: int, step: int, waited_s: float, *, generation: int = 1) -> StepSeen:
    return StepSeen(
        member=MemberId(100 + seat),
        seat=Seat(seat),
        generation=Generation(generation),
        step=Step(step),
        at=0.0,
        waited_s=waited_s,
    )


class Run:
    def __init__(self) -> None:
        self.watch = TransferWatch()
        self.watch.ingest(WorldChanged(world=world(SIZE), at=0.0))
        self.rng = random.Random(1)
        self.step = 0

    def play(self, transfer_s: float, steps: int, *, late: float = 0.0) -> str:
        """Steps in which a member of its own choice comes last, and seat 2 `late` more."""
        for _ in range(steps):
            self.step += 1
            arrival = [self.rng.random() * 0.05 + late * (seat == 2) for seat in range(SIZE)]
            for seat, at in enumerate(arrival):
                self.watch.ingest(step_seen(seat, self.step, max(arrival) - at + transfer_s))
        return self.watch.suspicion


def test_twice_the_time_three_times_in_a_row_is_a_suspicion():
    run = Run()
    assert run.play(0.02, 20) == ""
    assert run.play(0.06, 2) == ""
    assert run.play(0.02, 1) == ""
    assert run.play(0.06, 2) == ""
    assert "60 ms" in run.play(0.06, 1)
    assert run.watch.times == pytest.approx(3.0)
    assert run.play(0.02, 1) == ""


def test_a_late_member_and_less_than_the_schedulers_noise_are_none():
    run = Run()
    run.play(0.02, 20)
    assert run.play(0.02, 20, late=1.0) == "", "it is late: the transfer takes what it takes"
    assert run.play(0.03, 20) == ""
    quick = Run()
    quick.play(0.001, 20)
    assert quick.play(0.005, 20) == ""


def test_it_says_nothing_of_a_step_that_not_all_have_told_of():
    run = Run()
    run.play(0.02, 20)
    for step in range(1000, 3000):
        for seat in range(SIZE - 1):
            run.watch.ingest(step_seen(seat, step, 5.0))
    assert run.watch.suspicion == ""
    assert len(run.watch._open) <= 64


def test_what_was_probed_begins_anew_and_so_does_a_world():
    run = Run()
    run.play(0.02, 20)
    assert run.play(0.2, 5)
    run.watch.forgive()
    assert run.play(0.2, 2) == ""
    forgiven = 0
    while run.play(0.2, 3):
        run.watch.forgive()
        forgiven += 1
    assert 3 <= forgiven <= 12, "it becomes usual, in time"
    run.play(1.0, 1)
    run.watch.ingest(WorldChanged(world=world(SIZE, generation=2), at=1.0))
    run.watch.ingest(step_seen(0, 1, 9.0, generation=1))
    assert run.watch.suspicion == ""
