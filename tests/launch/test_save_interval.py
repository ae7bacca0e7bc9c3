"""The coordinator decides how often to save, says why, and its successor goes on with that."""

from types import SimpleNamespace
from typing import Any

from ftkit.core.ids import Step
from ftkit.launch.save_interval import SaveInterval
from ftkit.recovery.costs import Costs
from ftkit.recovery.failure_rate import FailureRate
from tests.recovery.stories import training


class Job:
    """Steps of 0.5 s, looked at one by one; saves take four steps, which are twice as long."""

    def __init__(self, *, auto: bool = True) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.saves = SaveInterval(self.tell, auto=auto, report_s=0.1)
        self.story, self.now, self.step = training(step=5), 50.0, 6
        self.known: Any = SimpleNamespace(
            saving=Costs(world=3), rate=FailureRate(prior_mtbf_s=3 * 3600.0)
        )
        self.written: Step | None = None
        self.order: Any = None
        self.changed: list[int] = []

    def tell(self, kind: str, /, **fields: object) -> None:
        self.events.append((kind, fields))

    def look(self) -> None:
        self.known.step = Step(self.step)
        changed = self.saves.look(
            self.story.plan, self.known, order=self.order, written=self.written, now=self.now,
        )  # fmt: skip
        if changed:
            self.changed.append(self.step)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.now += 1.0 if self.order else 0.5
            self.step += 1
            self.look()

    def save(self) -> None:
        self.order = SimpleNamespace(step=Step(self.step))
        self.look()
        self.train(4)
        self.order, self.written = None, self.order.step
        self.look()
        self.train(3)

    def paced(self) -> None:
        self.known.saving = Costs(world=3).with_measured(step_s={3: 0.5})

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [fields for k, fields in self.events if k == kind]


def test_from_what_is_assumed_to_what_was_measured() -> None:
    job = Job()
    job.train(10)
    (first,) = job.told("checkpoint-interval")
    assert first["before"] is None
    assert "assumed" in first["reason"]
    assert job.saves.told == {"every": first["every"], "first": first["first"]}
    job.paced()
    job.train(2)
    second = job.told("checkpoint-interval")[-1]
    assert 0 < second["first"] - job.step <= 10, "one is made at once"
    job.save()
    (cost,) = job.told("checkpoint-cost")
    assert 1.5 <= cost["held_s"] <= 2.5
    last = job.told("checkpoint-interval")[-1]
    assert last["held_s"] == cost["held_s"]
    assert last["before"] == second["every"]
    assert "checkpoint_block_s" in last["measured"]
    assert len(job.changed) == 3
    # Nothing else changes, and nothing is decided anew.
    for _ in range(5):
        job.train(10)
        job.save()
    assert len(job.changed) == 3


def test_where_the_user_has_said_it_is_only_measured() -> None:
    job = Job(auto=False)
    job.paced()
    job.train(10)
    job.save()
    assert job.told("checkpoint-cost")
    assert not job.changed
    assert job.saves.told is None


def test_a_save_that_is_given_up_says_nothing() -> None:
    job = Job()
    job.paced()
    job.train(10)
    job.order = SimpleNamespace(step=Step(job.step))
    job.train(4)
    job.order = None
    job.train(4)
    assert not job.told("checkpoint-cost")


def test_a_new_coordinator_goes_on_with_what_agents_were_told() -> None:
    job = Job()
    job.saves.adopt([None, {"every": 40, "first": 120}, {"every": 50, "first": 90}, {"every": "?"}])
    assert job.saves.told == {"every": 40, "first": 120}
    job.look()
    assert job.told("checkpoint-interval")[0]["before"] == 40
