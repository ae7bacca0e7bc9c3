"""Feed: what a slot holds, read once or twice, on one rank or another."""

import random
from collections import UserDict
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ftkit.core.errors import UsageError
from ftkit.core.ids import Slot, Step
from ftkit.session.feed import DatasetFeed, Feed, LoaderFeed, feed_of
from ftkit.session.loader import reading_of


class Numbers(Dataset[torch.Tensor]):
    """0..n-1."""

    def __init__(self, length: int = 10, *, noisy: bool = False) -> None:
        self.length, self.noisy = length, noisy

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.noisy:
            return index + torch.rand(()) + random.random() + float(numpy.random.rand())
        return torch.tensor(index)


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return (torch.tensor(i) for i in range(4))


def feed(
    source: Any,
    *,
    slots: int = 2,
    slot_size: int | None = None,
    seed: int = 0,
    told: list[dict[str, Any]] | None = None,
) -> Feed:
    def tell(kind: str, **fields: object) -> None:
        assert kind == "catch-up"
        if told is not None:
            told.append(fields)

    return feed_of(
        source,
        slots=slots,
        slot_size=slot_size,
        seed=seed,
        shuffle=True,
        collate=None,
        tell=tell,
    )


def play(source: Feed, steps: int, *, slots: int = 2) -> list[list[Any]]:
    out = []
    for step in range(1, steps + 1):
        out.append([source.batch(Step(step), Slot(s)).tolist() for s in range(slots)])
        source.committed(Step(step))
    return out


def scramble(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


def test_the_kind_of_the_source_decides() -> None:
    assert isinstance(feed(Numbers(), slot_size=2), DatasetFeed)
    assert isinstance(feed([1, 2, 3], slot_size=2), DatasetFeed)
    assert isinstance(feed(DataLoader(Numbers())), LoaderFeed)
    assert isinstance(feed(DataLoader(Stream())), LoaderFeed)


@pytest.mark.parametrize(
    ("source", "slot_size", "words"),
    [
        (iter([1, 2]), None, "cannot be read again"),
        ((x for x in [1]), None, "from a generator"),
        (7, None, "from a int"),
        ([1, 2], None, "needs slot_size="),
        ([], 2, "nothing to train on"),
        ([1], 0, "slot_size=0"),
    ],
)
def test_what_cannot_be_read_is_refused(source: Any, slot_size: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        feed(source, slot_size=slot_size)


def test_an_empty_loader_is_refused_when_it_is_read() -> None:
    with pytest.raises(UsageError, match="the loader is empty"):
        feed(DataLoader(Numbers(0))).batch(Step(1), Slot(0))


def test_a_data_set_gives_every_sample_once_an_epoch() -> None:
    seen = play(feed(Numbers(8), slot_size=2), 4)
    flat = [v for step in seen for slot in step for v in slot]
    assert sorted(flat[:8]) == sorted(flat[8:]) == list(range(8))
    assert flat[:8] != flat[8:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_is_read_epoch_after_epoch_across_steps(shuffle: bool) -> None:
    # Five batches an epoch, two a step: epochs end in the middle of steps.
    seen = play(feed(DataLoader(Numbers(10), batch_size=2, shuffle=shuffle)), 5)
    flat = [v for step in seen for slot in step for v in slot]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert (flat[:10] == flat[10:]) is not shuffle


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_ranks_read_alike_whatever_their_random_state(noisy: bool, workers: int) -> None:
    if workers and noisy:
        pytest.skip("workers seed numpy by themselves, from the same base seed")

    def read(seed: int) -> tuple[list[Any], list[int]]:
        loader = DataLoader(Numbers(8, noisy=noisy), batch_size=2, shuffle=True,
                            num_workers=workers)  # fmt: skip
        source = feed(loader)
        batches, digests = [], []
        for step in (Step(1), Step(2), Step(3)):
            for slot in (Slot(0), Slot(1)):
                scramble(seed + step * 10 + slot)  # as the slots of another rank would have it
                batches.append(source.batch(step, slot).tolist())
            digests.append(source.digest(step))
        return batches, digests

    steps = 1 if workers else 100
    assert read(steps) == read(steps + 1)


@pytest.mark.parametrize("shuffle", [False, True])
def test_reading_leaves_the_random_state_as_it_was(shuffle: bool) -> None:
    source = feed(DataLoader(Numbers(8, noisy=True), batch_size=2, shuffle=shuffle))
    for step in (Step(1), Step(2), Step(3)):  # the last one begins an epoch
        scramble(step)
        expected = (torch.rand(3).tolist(), random.random(), float(numpy.random.rand()))
        scramble(step)
        source.batch(step, Slot(0))
        got = (torch.rand(3).tolist(), random.random(), float(numpy.random.rand()))
        assert got == expected


def test_asked_again_it_gives_the_same_and_a_newcomer_reads_the_same() -> None:
    loader = DataLoader(Numbers(8, noisy=True), batch_size=2, shuffle=True)
    old = feed(loader)
    for step in (Step(1), Step(2)):
        first = [old.batch(step, Slot(s)) for s in (0, 1)]
        again = [old.batch(step, Slot(s)) for s in (1, 0)]
        assert first[0] is again[1]
        assert first[1] is again[0]
        old.committed(step)
    new = feed(loader)
    assert torch.equal(old.batch(Step(3), Slot(1)), new.batch(Step(3), Slot(1)))
    assert old.digest(Step(3)) == new.digest(Step(3)) != 0


class Counted(Numbers):
    """Counts what is loaded."""

    loaded = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded += 1
        return super().__getitem__(index)


def noisy_collate(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples) + torch.rand(())


class Lazy(Sampler[int]):
    """Draws as it goes, from the global generator."""

    def __iter__(self) -> Any:
        return (int(torch.randint(9, ())) for _ in range(9))


LOADERS: dict[str, Callable[[Any], Any]] = {
    "in order": lambda d: DataLoader(d, batch_size=2),
    "shuffled": lambda d: DataLoader(d, batch_size=2, shuffle=True, drop_last=True),
    "own generator": lambda d: DataLoader(
        d, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "own sampler": lambda d: DataLoader(d, batch_size=2, sampler=Lazy()),
    "unbatched": lambda d: DataLoader(d, batch_size=None, shuffle=True),
    "random collation": lambda d: DataLoader(d, batch_size=2, collate_fn=noisy_collate),
    "workers": lambda d: DataLoader(d, batch_size=2, shuffle=True, num_workers=2),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_newcomer_loads_nothing_of_what_was_consumed_and_reads_on_alike(kind: str) -> None:
    # Nine samples and random draws: epochs end in the middle of steps.
    old, data = feed(LOADERS[kind](Numbers(9, noisy=True))), Counted(9, noisy=True)
    new = feed(LOADERS[kind](data))
    scramble(3)
    before = play(old, 7)
    scramble(4)
    for step in (Step(8), Step(9), Step(12)):
        for slot in (Slot(0), Slot(1)):
            there, here = old.batch(step, slot), new.batch(step, slot)
            assert torch.equal(there, here), f"step {step}"
        assert old.digest(step) == new.digest(step)
    assert before[:2] != before[2:4], "the draws differ from batch to batch"
    if kind != "workers":  # their counts are their own
        loaded_for_three_steps = 2 * 3 * 2
        assert data.loaded <= loaded_for_three_steps + 2 * 2 * 2, "of two steps of twelve at most"


def test_what_has_to_be_read_to_be_left_out_says_how_far_it_is() -> None:
    class Source:
        def __iter__(self) -> Any:
            return iter([torch.tensor(i) for i in range(7)])

    told: list[dict[str, Any]] = []
    source = feed(Source(), told=told)
    source.batch(Step(101), Slot(0))
    assert [t["step"] for t in told] == list(range(10, 101, 10))
    assert all((t["until"], t["loaded"]) == (100, True) for t in told)
    source.batch(Step(102), Slot(0))
    assert len(told) == 10, "there was nothing to catch up with"


def test_what_was_left_out_without_loading_is_told_too() -> None:
    told: list[dict[str, Any]] = []
    feed(DataLoader(Numbers(8), batch_size=2), told=told).batch(Step(4), Slot(0))
    assert [(t["step"], t["loaded"]) for t in told] == [(1, False), (2, False), (3, False)]


class Own(DataLoader[torch.Tensor]):
    """A subclass may read however it likes."""


@pytest.mark.parametrize(
    ("loader", "loads"),
    [
        (DataLoader(Numbers()), False),
        (Own(Numbers()), True),
        (DataLoader(Stream()), True),
        (DataLoader(Numbers(), num_workers=1, worker_init_fn=print), True),
        (DataLoader(Numbers(), worker_init_fn=print), False),
    ],
)
def test_only_what_is_known_to_have_an_order_is_skipped_unread(loader: Any, loads: bool) -> None:
    assert reading_of(loader, 0).loads_what_it_skips is loads


def test_an_empty_order_is_refused_when_it_is_skipped() -> None:
    with pytest.raises(UsageError, match="the loader is empty"):
        feed(DataLoader(Numbers(0))).batch(Step(3), Slot(0))


def test_the_seed_changes_the_order_and_committed_batches_are_let_go() -> None:
    loader = DataLoader(Numbers(100), batch_size=5, shuffle=True)
    source = feed(loader)
    assert source.batch(Step(1), Slot(0)).tolist() != (
        feed(loader, seed=1).batch(Step(1), Slot(0)).tolist()
    )
    source.committed(Step(1))
    assert isinstance(source, LoaderFeed)
    assert not source._kept
    assert not source._digests


def test_a_data_set_has_no_digest() -> None:
    source = feed(Numbers(), slot_size=1)
    source.committed(Step(1))
    assert source.digest(Step(2)) == 0


class Named:
    """A batch of a user's own class, without a text of its own."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


BATCHES: dict[str, Any] = {
    "vector": lambda v: torch.tensor([v, 2.0]),
    "scalar": lambda v: torch.tensor(v),
    "bfloat16": lambda v: torch.tensor([v], dtype=torch.bfloat16),
    "strided": lambda v: torch.tensor([[v, 1.0], [2.0, 3.0]]).t(),
    "empty and more": lambda v: [torch.empty(0), torch.tensor([v])],
    "array": lambda v: numpy.array([0.0] * 5000 + [v] + [0.0] * 5000),
    "dict": lambda v: {"b": 1, "a": torch.tensor(v)},
    "mapping": lambda v: UserDict({"a": torch.tensor([0.0] * 5000 + [v] + [0.0] * 5000)}),
    "object": lambda v: Named(torch.tensor(v)),
    "text": lambda v: f"text {v}",
    "nested": lambda v: [(1, {"k": [torch.tensor(v)]})],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_the_digest_is_of_the_content(kind: str) -> None:
    def digest(value: float) -> int:
        made = [BATCHES[kind](value), BATCHES[kind](0.0)]

        class Source:
            def __iter__(self) -> Any:
                return iter(made)

        return feed(Source()).digest(Step(1))

    assert digest(1.0) == digest(1.0)
    assert digest(1.0) != digest(3.0)


def test_a_loader_that_differs_between_ranks_is_told_by_the_digest() -> None:
    ranks = [feed(DataLoader(Numbers(9 + r), batch_size=2)) for r in (0, 1)]
    digests = [[r.digest(Step(s)) for s in (1, 2, 3)] for r in ranks]
    assert digests[0][:2] == digests[1][:2]
    assert digests[0][2] != digests[1][2]
