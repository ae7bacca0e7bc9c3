"""The fastest slowest stage, by brute force; and what a new cut moves."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.recovery.recut import Cut, Layer, Stage, moves, recut

EVEN = [Layer(seconds=1.0, state_bytes=8, memory_bytes=10)] * 8


def test_equal_layers_are_cut_evenly() -> None:
    assert recut(EVEN, [Stage()] * 4) == Cut(bounds=(0, 2, 4, 6, 8), slowest_s=2.0)


def test_a_stage_that_lost_half_its_ranks_gives_layers_away() -> None:
    # Two of three stages whole: 1 layer at half speed takes 2 s, 3 and 4 take 3 and 4 s elsewhere.
    cut = recut(EVEN, [Stage(), Stage(speed=0.5), Stage()], now=(0, 3, 6, 8))
    assert cut.slowest_s == 4.0
    assert cut.bounds in {(0, 3, 4, 8), (0, 4, 5, 8), (0, 2, 4, 8), (0, 3, 5, 8), (0, 4, 6, 8)}
    old = max(3 / 1, 3 / 0.5, 2 / 1)
    assert old / cut.slowest_s == 1.5


def test_of_equal_cuts_the_one_that_moves_least_is_taken() -> None:
    layers = [Layer(seconds=1.0, state_bytes=8)] * 5
    # Five layers on two stages: 3 + 2 or 2 + 3 are as fast.
    assert recut(layers, [Stage()] * 2, now=(0, 3, 5)).bounds == (0, 3, 5)
    assert recut(layers, [Stage()] * 2, now=(0, 2, 5)).bounds == (0, 2, 5)


def test_memory_limits_a_stage() -> None:
    small = [Stage(memory_bytes=20), Stage(memory_bytes=60)]
    assert recut(EVEN, small).bounds == (0, 2, 8)
    with pytest.raises(ValueError, match="do not fit"):
        recut(EVEN, [Stage(memory_bytes=20)] * 2)
    with pytest.raises(ValueError, match="cannot fill"):
        recut(EVEN[:1], [Stage()] * 2)


@given(
    st.lists(
        st.builds(
            Layer,
            seconds=st.floats(0.1, 5),
            state_bytes=st.integers(1, 9),
            memory_bytes=st.integers(0, 5),
        ),
        min_size=3,
        max_size=8,
    ),
    st.lists(
        st.builds(Stage, speed=st.floats(0.3, 2), memory_bytes=st.none() | st.integers(5, 30)),
        min_size=2,
        max_size=3,
    ),
    st.data(),
)
def test_no_cut_is_faster_and_none_as_fast_moves_less(
    layers: list[Layer], stages: list[Stage], data: st.DataObject
) -> None:
    def pace(bounds: tuple[int, ...]) -> float:
        spans = list(itertools.pairwise(bounds))
        for (a, b), stage in zip(spans, stages, strict=True):
            held = sum(x.memory_bytes for x in layers[a:b])
            if stage.memory_bytes is not None and held > stage.memory_bytes:
                return math.inf
        return max(
            sum(x.seconds for x in layers[a:b]) / s.speed
            for (a, b), s in zip(spans, stages, strict=True)
        )

    every = [
        (0, *middle, len(layers))
        for middle in itertools.combinations(range(1, len(layers)), len(stages) - 1)
    ]
    now = data.draw(st.sampled_from(every))
    best = min(map(pace, every))
    if math.isinf(best):
        with pytest.raises(ValueError, match="do not fit"):
            recut(layers, stages, now=now)
        return
    cut = recut(layers, stages, now=now)
    assert cut.slowest_s == pytest.approx(best)
    assert pace(cut.bounds) == pytest.approx(best)

    def moved(bounds: tuple[int, ...]) -> float:
        return moves(layers, now, bounds, ranks=2).interleaved

    least = min(moved(b) for b in every if pace(b) <= best * (1 + 1e-13))
    assert moved(cut.bounds) <= least


# ---- what it moves


def test_one_layer_of_eight_moves_itself_or_all() -> None:
    layers = [Layer(seconds=1, state_bytes=8)] * 16
    told = moves(layers, (0, 8, 16), (0, 7, 16), ranks=8)
    assert told.layers == (7,)
    assert told.interleaved == 8
    assert told.interleaved_rank == 1.0
    # Flat rows shift: eight times the volume, and eight times as much from one rank.
    assert told.contiguous == pytest.approx(8 * 8, rel=0.15)
    assert told.contiguous_rank >= 8 * told.interleaved_rank


def test_no_change_moves_nothing() -> None:
    told = moves(EVEN, (0, 3, 8), (0, 3, 8), ranks=4)
    assert (told.layers, told.contiguous, told.interleaved, told.interleaved_rank) == ((), 0, 0, 0)
