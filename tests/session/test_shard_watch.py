"""A shard that changes while nothing trains it is named with its rank and tensor."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftkit.core.errors import IntegrityError
from ftkit.core.world import World
from ftkit.session.replicas import OnDiverged
from ftkit.session.shard_watch import CLEAN_MIN, TENSORS_MAX, ShardWatch
from tests.detection.scene import world


class Rank:
    """Rank 1 of two, with five shards; `steps` trains them."""

    def __init__(self, *, every: int = 1, on_diverged: OnDiverged = OnDiverged.REPAIR) -> None:
        self.told: list[dict[str, Any]] = []
        self.shards = {f"model/{i}.weight": torch.randn(8) for i in range(5)}
        self.group = SimpleNamespace(rank=1, size=2, world=world(2))
        parts: Any = SimpleNamespace(
            group=self.group,
            control=SimpleNamespace(report=lambda m: self.told.append(m["signal"])),
        )
        snapshots: Any = SimpleNamespace(steady=lambda: self.shards)
        self.watch = ShardWatch(parts, snapshots, every=every, on_diverged=on_diverged)
        self.step = 0

    def steps(self, count: int, *between: int) -> None:
        """Train; before each step one bit flips in each of the shards `between`."""
        for _ in range(count):
            for i in between:
                self.shards[f"model/{i}.weight"].view(torch.int32)[3] ^= 1
            self.step += 1
            self.watch.look(self.step)
            for shard in self.shards.values():
                shard.mul_(0.99)  # an optimizer
            self.watch.committed(self.step)


def test_a_bit_that_flips_between_two_steps_is_named() -> None:
    rank = Rank()
    rank.steps(CLEAN_MIN + 1)
    assert rank.told == []
    rank.steps(1, 2)
    (found,) = rank.told
    assert (found["fault"], found["seat"], found["step"]) == ("sdc", 1, CLEAN_MIN + 1)
    assert found["evidence"] == {"kind": "shard", "tensors": ["model/2.weight"]}
    assert "model/2.weight of rank 1 changed after step 4" in found["reason"]
    rank.steps(CLEAN_MIN + 1)
    rank.steps(1, 3)
    assert len(rank.told) == 2


def test_who_is_to_be_replaced_for_it_ends() -> None:
    rank = Rank(on_diverged=OnDiverged.EVICT)
    rank.steps(CLEAN_MIN + 1)
    with pytest.raises(IntegrityError, match=r"model/0\.weight"):
        rank.steps(1, 0)
    assert rank.told, "said before it ends"


@pytest.mark.parametrize("changed", [range(1), range(TENSORS_MAX + 1)])
def test_a_script_that_changes_its_weights_is_not_accused(changed: range) -> None:
    rank = Rank()
    if len(changed) > TENSORS_MAX:
        rank.steps(2 * CLEAN_MIN)  # a rare event, but of many tensors
    rank.steps(20, *changed)
    rank.steps(20)
    rank.steps(1, 4)
    assert rank.told == [], "shards are not watched any more"


def test_another_world_or_a_step_without_a_look_is_compared_with_nothing() -> None:
    rank = Rank(every=4)
    rank.steps(20)
    rank.steps(1, 1)  # the 21st: between looks
    assert rank.told == []
    rank.steps(2)
    shrunk: World = world(1, generation=2)
    rank.group.world = shrunk
    rank.steps(1, 1)
    assert rank.told == []
    never = Rank(every=0)
    never.steps(10, 0)
    assert never.told == []
