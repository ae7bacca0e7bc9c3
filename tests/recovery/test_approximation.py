"""What a job goes on from when part of its newest state is nowhere: the order, and the reasons."""

import json
from typing import Any

import pytest

from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory, Part
from ftkit.recovery.approximation import (
    Approximation,
    Judgement,
    OldShard,
    Remains,
    judge,
    remains,
)
from ftkit.recovery.costs import Costs
from ftkit.recovery.facts import Allowed
from ftkit.recovery.policy import Option

COSTS = Costs(world=5)  # a stale shard is taken to cost 10 steps, an average 60
SEATS = tuple(map(Seat, range(5)))


def copy(seat: int, step: int, *, generation: int = 1, cut: str = "", total: int = 100) -> Copy:
    part = Part(layout=f"stage{seat}{cut}", first=0, end=total, total=total, layouts=5)
    return Copy(
        seat=Seat(seat), node=NodeId(seat), path=f"{seat}", step=Step(step),
        generation=Generation(generation), part=part,
    )  # fmt: skip


def left_of(*lost: int, step: int = 200) -> Remains:
    found = remains(Inventory(copies=tuple(copy(s, step) for s in SEATS if s not in lost)))
    assert found is not None
    return found


def old(seat: int, step: int, **how: Any) -> OldShard:
    return OldShard(copy=copy(seat, step, **how), host="h", port=seat)


def judged(
    *lost: int, kept: tuple[OldShard, ...] = (), checkpoint: int | None = None, **other: Any
) -> Judgement:
    given: dict[str, Any] = {"allowed": Allowed.STAGES, "seats": SEATS, "costs": COSTS} | other
    at = None if checkpoint is None else Step(checkpoint)
    return judge(left_of(*lost), old=kept, checkpoint=at, **given)


def test_what_is_left_is_the_newest_step_that_all_survivors_have() -> None:
    copies = [copy(0, s) for s in (8, 9, 10)] + [copy(2, s) for s in (7, 8, 9)]
    found = remains(Inventory(copies=tuple(copies)))
    assert found is not None
    assert (found.step, found.layouts, found.of, sorted(found.present)) == (9, 2, 5, [0, 2])
    # A newer world that has hardly begun to capture does not count, one that has, does.
    newer = [copy(0, 9, generation=2, cut="b")]
    assert remains(Inventory(copies=(*copies, *newer))) == found
    newer.append(copy(2, 9, generation=2, cut="b"))
    again = remains(Inventory(copies=(*copies, *newer)))
    assert again is not None
    assert again.generation == 2
    assert remains(Inventory()) is None


def test_without_being_allowed_it_says_what_is_lost_and_takes_nothing() -> None:
    found = judged(2, kept=(old(2, 150),), allowed=Allowed.NOTHING)
    assert found.taken is None
    assert found.reason == "of step 200 the shards of seats [2] are lost"


def test_an_older_copy_comes_before_an_average() -> None:
    found = judged(2, kept=(old(2, 150), old(2, 120), old(1, 150)))
    assert found.taken is not None
    assert (found.taken.way, found.taken.age, found.taken.lost) == (Option.STALE_SHARD, 50, (2,))
    assert [o.copy.step for o in found.taken.old] == [150]
    assert "seats [2] are 50 steps older" in found.reason
    alone = judged(2)
    assert alone.taken is not None
    assert alone.taken.way is Option.CHECKFREE


def test_of_two_older_copies_the_newer_one_counts_whatever_keeps_it() -> None:
    on_disk = judged(2, kept=(old(2, 120),), checkpoint=180)
    assert on_disk.taken is not None
    assert (on_disk.taken.checkpoint, on_disk.taken.old) == (180, ())
    in_memory = judged(2, kept=(old(2, 180),), checkpoint=120)
    assert in_memory.taken is not None
    assert (in_memory.taken.checkpoint, len(in_memory.taken.old)) == (0, 1)


def test_a_checkpoint_that_is_young_enough_is_exact_and_taken_by_all() -> None:
    found = judged(2, kept=(old(2, 150),), checkpoint=191)
    assert found.taken is None
    assert "all go back 9 steps" in found.reason
    assert judged(2, checkpoint=190).taken is None, "of equal costs the exact way"
    assert judged(2, checkpoint=189).taken is not None


def test_costs_decide_and_not_the_order_alone() -> None:
    dear = Costs(world=5, stale_lost_steps=70.0)
    found = judged(2, kept=(old(2, 100),), costs=dear)
    assert found.taken is not None
    assert found.taken.way is Option.CHECKFREE
    # What is young cannot set back further than it is old.
    young = judged(2, kept=(old(2, 160),), costs=dear)
    assert young.taken is not None
    assert young.taken.way is Option.STALE_SHARD


@pytest.mark.parametrize(("stage", "which"), [(0, "first"), (4, "last")])
def test_an_outer_stage_has_one_neighbour_only(stage: int, which: str) -> None:
    refused = judged(stage)
    assert refused.taken is None
    assert f"stage {stage} is the {which}" in refused.reason
    assert "CheckFree+" in refused.reason
    from_copy = judged(stage, kept=(old(stage, 150),))
    assert from_copy.taken is not None
    assert from_copy.taken.way is Option.STALE_SHARD


@pytest.mark.parametrize("stages", [(0,), (4,), (0, 2), (0, 4)])
def test_an_outer_stage_that_changed_places_has_a_stand_in(stages: tuple[int, ...]) -> None:
    found = judged(*stages, allowed=Allowed.SWAPPED)
    assert found.taken is not None
    assert (found.taken.way, found.taken.lost) == (Option.CHECKFREE_PLUS, stages)
    assert "CheckFree+" in found.reason
    inner = judged(2, allowed=Allowed.SWAPPED)
    assert inner.taken is not None
    assert inner.taken.way is Option.CHECKFREE
    assert judged(0, 1, allowed=Allowed.SWAPPED).taken is None, "each lacks the other"
    alone = judge(left_of(1), allowed=Allowed.SWAPPED, seats=SEATS[:1], costs=COSTS)
    assert alone.taken is None


def test_neighbours_are_never_made_of_each_other() -> None:
    refused = judged(1, 2, kept=(old(2, 150),))
    assert refused.taken is None
    assert "nobody keeps an older copy of all of them" in refused.reason
    assert "stages [1, 2] are neighbours" in refused.reason
    both = judged(1, 2, kept=(old(1, 120), old(2, 150)))
    assert both.taken is not None
    assert (both.taken.way, both.taken.age) == (Option.STALE_SHARD, 80)
    apart = judged(1, 3)
    assert apart.taken is not None
    assert apart.taken.way is Option.CHECKFREE


def test_copies_of_another_cut_fit_nothing() -> None:
    assert judged(0, kept=(old(0, 150, generation=0),)).taken is None
    # Nor does the copy of a shard that is left.
    assert judged(0, kept=(old(1, 150),)).taken is None


def test_where_nobody_knows_the_stages_only_the_checkpoint_has_all_of_them() -> None:
    blind = judged(2, kept=(old(2, 150),), seats=())
    assert blind.taken is None
    assert "nobody does any more" in blind.reason
    assert judged(2, checkpoint=100, seats=()).taken is not None


def test_shards_of_tensors_have_no_neighbours() -> None:
    found = judged(2, allowed=Allowed.SHARDS)
    assert found.taken is None
    assert "CheckFree is for the stages of a pipeline" in found.reason


def test_it_comes_back_from_json() -> None:
    for found in (judged(2, kept=(old(2, 150),)), judged(2), judged(2, checkpoint=100)):
        assert found.taken is not None
        told = json.loads(json.dumps(found.taken.to_json()))
        assert Approximation.from_json(told) == found.taken
