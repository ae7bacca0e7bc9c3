"""The coordinator decides how often parity is made, says why, and its successor goes on with that."""

from types import SimpleNamespace
from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.ids import Step
from ftkit.launch.choices import seconds_or_auto
from ftkit.launch.config import JobConfig
from ftkit.launch.parity_interval import ParityInterval
from ftkit.recovery.costs import Costs
from ftkit.recovery.failure_rate import FailureRate
from ftkit.recovery.intervals import tier_intervals
from ftkit.recovery.saving import LONGEST_S
from tests.recovery.stories import training


class Job:
    """Steps of half a second; a round makes them twice as long."""

    def __init__(self, *, auto: bool = True, mtbf_s: float = 3600.0) -> None:
        self.events: list[dict[str, Any]] = []
        self.parity = ParityInterval(self.tell, auto=auto)
        self.known: Any = SimpleNamespace(
            saving=Costs(world=3).with_measured(step_s={3: 0.5}),
            rate=FailureRate(prior_mtbf_s=mtbf_s),
            step=Step(1),
        )
        self.plan, self.now = training(step=1).plan, 0.0
        self.report: dict[str, Any] = {"making": False, "round_s": None, "every_s": None}

    def tell(self, kind: str, /, **fields: object) -> None:
        self.events.append(fields)

    def train(self, steps: int) -> bool:
        changed = False
        for _ in range(steps):
            self.now += 1.0 if self.report["making"] else 0.5
            self.known.step = Step(self.known.step + 1)
            changed |= self.parity.look(self.plan, self.known, [self.report], now=self.now)
        return changed


def test_from_what_is_assumed_to_what_was_measured() -> None:
    job = Job()
    assert job.train(10)
    (first,) = job.events
    assert first["before"] is None
    assert "assumed" in first["reason"]
    by_model = next(
        i for i in tier_intervals(job.known.saving, job.known.rate) if i.name == "parity"
    )
    assert job.parity.told == pytest.approx(by_model.seconds)
    assert not job.train(10), "nothing else is known"
    job.report["making"] = True
    job.train(4)
    job.report |= {"making": False, "round_s": 4.0}
    assert job.train(4)
    last = job.events[-1]
    assert 1.5 <= last["held_s"] <= 2.5, "four steps took half a second more each"
    assert last["round_s"] == 4.0
    assert last["seconds"] > 5 * first["seconds"], "what costs a thousand times as much"
    assert {"parity_block_s", "parity_round_s"} <= set(last["measured"])
    assert "assumed" not in last["reason"]


def test_it_is_never_more_often_than_a_round_takes_nor_less_than_hourly() -> None:
    often = Job(mtbf_s=1.0)
    often.report["round_s"] = 9.0
    often.train(10)
    assert often.parity.told == pytest.approx(9.0)
    rare = Job(mtbf_s=1e12)
    rare.train(10)
    assert rare.parity.told == LONGEST_S


def test_a_successor_goes_on_with_what_agents_were_told() -> None:
    job = Job()
    job.parity.adopt([None, {"every_s": 40.0}, {"every_s": "x"}])
    assert job.parity.told == 40.0
    fixed = Job(auto=False)
    fixed.parity.adopt([{"every_s": 40.0}])
    assert not fixed.train(10)
    assert fixed.parity.told is None
    assert not fixed.events


def test_what_is_no_interval_is_refused() -> None:
    assert seconds_or_auto("2.5") == 2.5
    assert seconds_or_auto("auto") == "auto"
    with pytest.raises(UsageError, match="neither a number of seconds nor auto"):
        seconds_or_auto("often")
    for wrong in (-1, "often", float("nan")):
        with pytest.raises(UsageError, match="neither seconds nor auto"):
            JobConfig(job="a", command=("x",), nodes=3, parity="2+1", parity_every=wrong)
    with pytest.raises(UsageError, match="needs --parity"):
        JobConfig(job="a", command=("x",), parity_every="auto")
