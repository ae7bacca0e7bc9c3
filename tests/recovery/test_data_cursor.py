"""Every sample exactly once in an epoch, whoever computes it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Slot, Step
from ftkit.recovery.data_cursor import DataCursor, derive, permute, rng_key


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(length: int, key: int) -> None:
    assert sorted(permute(i, length, key=key) for i in range(length)) == list(range(length))


def test_permutations_differ_by_key() -> None:
    orders = {tuple(permute(i, 50, key=derive("k", n)) for i in range(50)) for n in range(40)}
    assert len(orders) == 40


@given(st.integers(1, 60), st.integers(1, 6), st.integers(1, 5), st.integers(0, 9), st.booleans())
def test_every_epoch_holds_every_sample_once(
    length: int, slots: int, slot_size: int, seed: int, shuffle: bool
) -> None:
    cursor = DataCursor(length=length, slots=slots, slot_size=slot_size, seed=seed, shuffle=shuffle)
    batch = slots * slot_size
    count = 3 * length // batch + 1
    stream = [
        sample
        for step in range(1, count + 1)
        for slot in range(slots)
        for sample in cursor.samples(Step(step), Slot(slot))
    ]
    assert len(stream) == count * batch
    for epoch in range(len(stream) // length):
        assert sorted(stream[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert cursor.epoch(Step(count)) == pytest.approx(len(stream) / length)


def test_epochs_are_shuffled_differently_and_by_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        cursor = DataCursor(length=40, slots=1, slot_size=1, seed=seed)
        return [cursor.sample(epoch * 40 + i) for i in range(40)]

    assert len({tuple(order(s, e)) for s in range(4) for e in range(4)}) == 16
    assert order(0, 0) != list(range(40))


def test_random_keys_differ_by_step_and_slot_and_fit_63_bits() -> None:
    keys = {rng_key(7, Step(t), Slot(s)) for t in range(1, 50) for s in range(4)}
    assert len(keys) == 49 * 4
    assert rng_key(7, Step(1), Slot(0)) != rng_key(8, Step(1), Slot(0))
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize(("step", "slot"), [(0, 0), (1, 4), (1, -1)])
def test_there_is_no_slot_outside_the_batch_and_no_step_0(step: int, slot: int) -> None:
    with pytest.raises(ValueError, match="no slot"):
        DataCursor(length=10, slots=4, slot_size=1).samples(Step(step), Slot(slot))


@pytest.mark.parametrize("wrong", [(0, 2, 1), (4, 0, 1), (4, 2, 0)])
def test_an_empty_stream_is_refused(wrong: tuple[int, int, int]) -> None:
    length, slots, slot_size = wrong
    with pytest.raises(ValueError, match=r"empty|count from 1"):
        DataCursor(length=length, slots=slots, slot_size=slot_size)
