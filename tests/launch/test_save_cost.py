"""What a save costs training: the pace of steps beside a write, and without one."""

import pytest

from ftkit.core.ids import Generation, Step
from ftkit.launch.save_cost import RESOLUTION, SaveCost


class Job:
    """Steps of 0.1 s that are looked at every few; while something is written they take longer."""

    def __init__(self) -> None:
        self.cost, self.now, self.step, self.generation = SaveCost(), 100.0, 1, 1
        self.found: list[float] = []

    def train(self, looks: int, *, step_s: float = 0.1, writing: bool = False) -> "Job":
        for _ in range(looks):
            self.now += 3 * step_s
            self.step += 3
            self.look(writing=writing)
        return self

    def look(self, *, writing: bool = False, saved: bool = True) -> None:
        held = self.cost.look(
            Generation(self.generation), Step(self.step), writing=writing, saved=saved, now=self.now
        )
        if held is not None:
            self.found.append(held)


def test_slower_steps_are_what_it_costs() -> None:
    job = Job().train(10)
    job.look(writing=True)
    job.train(4, step_s=0.25, writing=True)
    job.look()
    job.train(2)
    # Twelve steps took 0.15 s more each; the three in which the end was seen, nothing.
    assert job.found == [pytest.approx(1.8)]
    assert job.cost.held_s == pytest.approx(1.8)
    assert job.cost.wrote_s == pytest.approx(3.0)


def test_looks_that_see_no_new_step_are_no_stretch_of_their_own() -> None:
    job = Job().train(10)
    job.look(writing=True)
    for _ in range(3):
        job.now += 0.5
        job.look(writing=True)
    job.step += 3
    job.look(writing=True)
    job.look()
    job.train(1)
    assert job.found == [pytest.approx(1.5 - 0.3)]


def test_what_cannot_be_seen_is_not_taken_for_nothing() -> None:
    job = Job().train(10).train(10, writing=True).train(2)
    assert job.found == [pytest.approx(RESOLUTION * 2.7, rel=0.2)]


def test_a_world_that_changes_meanwhile_tells_nothing() -> None:
    job = Job().train(10).train(3, step_s=0.3, writing=True)
    job.generation = 2
    job.train(3, step_s=0.3, writing=True).train(5)
    assert job.found == []
    job.train(10).train(3, step_s=0.3, writing=True).train(2)
    assert len(job.found) == 1, "the next one does"


def test_a_write_that_was_given_up_tells_nothing() -> None:
    job = Job().train(10).train(3, step_s=0.3, writing=True)
    job.look(saved=False)
    job.train(3)
    assert job.cost.held_s is None


def test_before_the_pace_is_known_nothing_is_told() -> None:
    job = Job().train(1).train(3, step_s=0.3, writing=True).train(3)
    assert job.found == []


def test_the_median_of_the_last_saves_counts() -> None:
    job = Job()
    for step_s in (5.0, 0.2, 0.2, 0.2, 0.3, 0.3, 0.3):
        job.train(10).train(4, step_s=step_s, writing=True).train(3)
    assert len(job.found) == 7
    assert job.cost.held_s == pytest.approx(12 * 0.2, rel=0.2)
