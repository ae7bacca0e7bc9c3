"""When a pipeline is cut anew: the same on all ranks, only where it pays, and not for noise."""

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ftkit.recovery.recut_trigger import Caution, Move, Proposal, RecutTrigger

SLOTS = 8
Costs = Sequence[Mapping[int, float]]


def told(bounds: Sequence[int], seconds: Sequence[float], speeds: Sequence[float] = ()) -> Costs:
    """What ranks measure: their layers' times, each on its own rank."""
    speeds = speeds or [1.0] * (len(bounds) - 1)
    return [
        {i: seconds[i] / speed for i in range(a, b)}
        for speed, (a, b) in zip(speeds, pairwise(bounds), strict=True)
    ]


def slowest(costs: Costs) -> float:
    return max(sum(rank.values()) for rank in costs)


def play(
    trigger: RecutTrigger,
    bounds: tuple[int, ...],
    seconds: Sequence[float],
    *,
    steps: int,
    speeds: Sequence[float] = (),
    noise: float = 0.0,
    seed: int = 0,
    switch_s: float = 0.0,
) -> list[Proposal]:
    """A job in which every proposal is carried out at once."""
    rng, found = random.Random(seed), list[Proposal]()
    trigger.begin(bounds, recut=False)
    for step in range(1, steps + 1):
        noisy = [s * rng.lognormvariate(0, noise) for s in seconds]
        costs = told(bounds, noisy, speeds)
        proposal = trigger.hear(step, costs, remaining=steps - step, switch_s=switch_s, busy=False)
        if proposal is not None:
            found.append(proposal)
            bounds = proposal.bounds
            trigger.begin(bounds, recut=True)
    return found


def test_a_slow_layer_makes_room_and_then_it_is_quiet() -> None:
    seconds = [4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    (only,) = play(RecutTrigger(slots=SLOTS), (0, 2, 4, 6, 8), seconds, steps=400)
    assert only.bounds == (0, 1, 4, 6, 8)
    assert only.moves == (Move(source=0, target=1, layers=(1,)),)
    assert (only.slowest_s, only.expected_s) == (5.0, 4.0)
    assert only.step == 8 + 2 * 8, "settled, and looked at twice"


def test_moves_may_be_chains() -> None:
    proposal = Proposal(
        id=1, step=1, before=(0, 2, 4, 6), bounds=(0, 1, 2, 6), slowest_s=2.0, expected_s=1.0
    )
    assert proposal.moves == (
        Move(source=0, target=1, layers=(1,)),
        Move(source=1, target=2, layers=(2, 3)),
    )


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.5, 2.0), min_size=4, max_size=12),
    st.integers(2, 4),
    st.integers(0, 1000),
)
def test_noise_moves_nothing_that_is_balanced(seconds: list[float], stages: int, seed: int) -> None:
    """From the best cut on, times that scatter by 30 % never lead to a cut that is worse, truly."""
    first = RecutTrigger(slots=SLOTS, caution=Caution(settle=0, window=1, gain_min=0.001))
    bounds = (*range(stages), len(seconds))
    for _ in range(3):
        found = play(first, bounds, seconds, steps=40)
        bounds = found[-1].bounds if found else bounds
    best = slowest(told(bounds, seconds))
    for proposal in play(
        RecutTrigger(slots=SLOTS), bounds, seconds, steps=300, noise=0.3, seed=seed
    ):
        # The median of eight such times is off by a seventh now and then.
        assert slowest(told(proposal.bounds, seconds)) < 1.5 * best


@settings(max_examples=25)
@given(st.integers(0, 200))
def test_equal_layers_stay_where_they_are_whatever_the_noise(seed: int) -> None:
    found = play(
        RecutTrigger(slots=SLOTS), (0, 4, 8, 12), [1.0] * 12, steps=400, noise=0.1, seed=seed
    )
    assert not found


@settings(max_examples=25)
@given(
    st.lists(st.floats(0.1, 4.0), min_size=6, max_size=16),
    st.lists(st.sampled_from([0.4, 0.5, 1.0, 1.0, 1.0]), min_size=2, max_size=4),
    st.integers(0, 100),
)
@example(seconds=[0.5, 0.3125, 2.4375, 2.0, 1.5, 1.75, 0.5], speeds=[0.4, 0.4], seed=94)
def test_layers_do_not_go_to_and_fro(seconds: list[float], speeds: list[float], seed: int) -> None:
    """Slow ranks too, of which the model knows nothing: few moves, and hardly one at the end.

    A gain that is just as large as asked for may be found late, once noise adds what it lacks.
    """
    stages, count = len(speeds), len(seconds)
    bounds = tuple(s * count // stages for s in range(stages + 1))
    found = play(
        RecutTrigger(slots=SLOTS),
        bounds,
        seconds,
        steps=1200,
        speeds=speeds,
        noise=0.05,
        seed=seed,
    )
    assert len(found) <= 8
    assert len([p for p in found if p.step > 900]) <= 1


def test_a_slow_rank_is_relieved() -> None:
    speeds = [1.0, 0.5, 1.0, 1.0]
    bounds = (0, 8, 16, 24, 32)
    found = play(RecutTrigger(slots=SLOTS), bounds, [1.0] * 32, steps=400, speeds=speeds)
    before = slowest(told(bounds, [1.0] * 32, speeds))
    after = slowest(told(found[-1].bounds, [1.0] * 32, speeds))
    assert after <= 0.7 * before


@given(st.floats(0.01, 10.0), st.integers(1, 300))
def test_it_is_done_only_where_it_pays(switch_s: float, steps: int) -> None:
    seconds = [0.02, 0.01, 0.01, 0.01]
    found = play(RecutTrigger(slots=SLOTS), (0, 2, 3, 4), seconds, steps=steps, switch_s=switch_s)
    for proposal in found:
        saved = SLOTS * (proposal.slowest_s - proposal.expected_s) * (steps - proposal.step)
        assert saved > 2 * switch_s
    if steps - 24 > 2 * switch_s / (SLOTS * 0.01) + 1:
        assert found


def test_nothing_is_proposed_while_the_world_is_about_to_change() -> None:
    trigger = RecutTrigger(slots=SLOTS)
    trigger.begin((0, 3, 4), recut=False)
    costs = told((0, 3, 4), [1.0] * 4)
    found = [
        trigger.hear(step, costs, remaining=1000, switch_s=0.0, busy=step % 20 == 0)
        for step in range(200)
    ]
    assert not any(found), "looking begins anew each time"


def test_what_was_not_measured_is_not_looked_at() -> None:
    trigger = RecutTrigger(slots=SLOTS)
    trigger.begin((0, 3, 4), recut=False)
    costs = [{0: 1.0, 1: 1.0}, {3: 1.0}]
    assert not any(
        trigger.hear(step, costs, remaining=1000, switch_s=0.0, busy=False) for step in range(100)
    )
    assert trigger.hear(1, [{0: 1.0}], remaining=9, switch_s=0.0, busy=False) is None


def test_a_migration_that_was_dropped_is_tried_again_later_each_time() -> None:
    trigger, at = RecutTrigger(slots=SLOTS), list[int]()
    trigger.begin((0, 3, 4), recut=False)
    costs = told((0, 3, 4), [1.0] * 4)
    for step in range(400):
        if trigger.hear(step, costs, remaining=1000, switch_s=0.0, busy=False):
            at.append(step)
            trigger.abandoned()
    gaps = [b - a for a, b in pairwise(at)]
    assert len(at) > 3
    assert gaps == sorted(gaps)
    assert gaps[0] < gaps[-1]


@given(
    st.lists(st.lists(st.floats(0.1, 9.0), min_size=5, max_size=5), min_size=1, max_size=80),
    st.booleans(),
)
def test_all_ranks_come_to_the_same(heard: list[list[float]], busy: bool) -> None:
    """They hear the same, as doubles, and nothing else goes in."""
    ranks = [RecutTrigger(slots=SLOTS, caution=Caution(settle=1, window=2)) for _ in range(3)]
    for rank in ranks:
        rank.begin((0, 2, 4, 5), recut=False)
    for step, seconds in enumerate(heard):
        said = {
            r.hear(
                step, told((0, 2, 4, 5), seconds), remaining=99, switch_s=0.1,
                busy=busy and step % 7 == 3,
            )
            for r in ranks
        }  # fmt: skip
        assert len(said) == 1
        if proposal := said.pop():
            assert 0 < proposal.id < 1 << 63
            assert proposal.expected_s <= 0.9 * proposal.slowest_s


@pytest.mark.parametrize("wrong", [{"window": 0}, {"gain_min": 1.0}, {"settle": -1}, {"pays": -1}])
def test_rules_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="such rules"):
        Caution(**wrong)  # type: ignore[arg-type]
