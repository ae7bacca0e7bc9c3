"""Stateful loaders: put back to a place they read on alike, and read no more than they must."""

import json
import logging
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ftkit.checkpoint.plain import decode, encode
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError, NotDeterministic, UsageError
from ftkit.core.ids import Slot, Step
from ftkit.session.feed import LoaderFeed
from ftkit.session.stateful import STATE_BYTES_MAX, Place, Places, packed, state_of, unpacked
from tests.session.alone import alone, learn, net


class Stream(IterableDataset[torch.Tensor]):
    """Seven numbers an epoch; says where it stands."""

    def __init__(self) -> None:
        self.at = self.epoch = self.reads = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 7:
            self.at += 1
            yield self.read(self.at)
        self.at, self.epoch = 0, self.epoch + 1

    def read(self, at: int) -> torch.Tensor:
        self.reads += 1
        return torch.tensor(self.epoch * 100.0 + at)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.epoch = state["at"], state["epoch"]


class Endless:
    """An iterator; its order is drawn from generators that are part of its state."""

    def __init__(self) -> None:
        self.python, self.torch, self.reads = random.Random(3), torch.Generator(), 0

    def __iter__(self) -> "Endless":
        return self

    def __next__(self) -> torch.Tensor:
        self.reads += 1
        return torch.rand(2, generator=self.torch) + self.python.random()

    def state_dict(self) -> dict[str, Any]:
        return {"python": self.python.getstate(), "torch": self.torch.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.python.setstate(state["python"])
        self.torch.set_state(state["torch"])


class Global(Stream):
    """Draws from the global generators, which are the reader's."""

    def read(self, at: int) -> torch.Tensor:
        return super().read(at) + torch.rand(()) + random.random()


class Ahead(Stream):
    """Reads two ahead of what it gives, and knows the difference."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead: list[torch.Tensor] = []

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.ahead = []
        while self.at < 7:
            last = min(7, self.at + 3)
            while self.at + len(self.ahead) < last:
                self.ahead.append(self.read(self.at + len(self.ahead) + 1))
            self.at += 1
            yield self.ahead.pop(0)
        self.at, self.epoch = 0, self.epoch + 1


#: What to read, and where its reads are counted.
KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "stream": lambda: (of := Stream(), of),
    "iterator": lambda: (of := Endless(), of),
    "global draws": lambda: (of := Global(), of),
    "reads ahead": lambda: (of := Ahead(), of),
    # Its epochs end in a batch of one.
    "DataLoader": lambda: (DataLoader(of := Stream(), batch_size=2), of),
}


def feed(loader: Any, slots: int = 2, told: list[dict[str, Any]] | None = None) -> LoaderFeed:
    def tell(kind: str, **fields: object) -> None:
        assert kind == "catch-up"
        if told is not None:
            told.append(fields)

    return LoaderFeed(loader, slots=slots, seed=0, tell=tell)


def read(source: LoaderFeed, steps: range, slots: int = 2) -> list[tuple[list[Any], int]]:
    seen = []
    for step in map(Step, steps):
        batches = [source.batch(step, Slot(slot)).tolist() for slot in range(slots)]
        seen.append((batches, source.digest(step)))
        source.committed(step)
    return seen


def hand_over(source: LoaderFeed, to: LoaderFeed, step: int) -> None:
    """As a snapshot of `step` does."""
    assert source.places is not None
    assert to.places is not None
    source.places.step = Step(step)
    kept = json.dumps(encode(source.places.state_dict(), "loader", {}))
    to.places.load_state_dict(decode(json.loads(kept), lambda name: torch.empty(0)))


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_newcomer_goes_on_from_any_step_and_reads_one_batch_again(kind: str, slots: int) -> None:
    steps = 12
    loader, _ = KINDS[kind]()
    undisturbed = read(feed(loader, slots), range(1, steps + 1), slots)
    old = feed(KINDS[kind]()[0], slots)
    for step in range(1, steps):
        read(old, range(step, step + 1), slots)
        torch.manual_seed(step)
        loader, counts = KINDS[kind]()
        told: list[dict[str, Any]] = []
        new = feed(loader, slots, told)
        hand_over(old, new, step)
        assert read(new, range(step + 1, steps + 1), slots) == undisturbed[step:], step
        assert told == [{"step": step, "until": step, "loaded": False}]
        batches, ahead = 1 + (steps - step) * slots, 2 if kind == "reads ahead" else 0
        each = 2 if kind == "DataLoader" else 1
        assert counts.reads <= (batches + ahead) * each


def test_the_place_of_a_step_is_kept_while_an_attempt_at_the_next_has_read_on() -> None:
    old = feed(Stream())
    expected = read(feed(Stream()), range(1, 7))
    read(old, range(1, 4))
    old.batch(Step(4), Slot(0))  # and rolled back: its world breaks
    new = feed(Stream())
    hand_over(old, new, 3)
    assert read(new, range(4, 7)) == read(old, range(4, 7)) == expected[3:]


def test_a_rank_may_be_taken_back_or_forward_in_the_same_process() -> None:
    loader = Stream()
    source, other = feed(loader), feed(Stream())
    expected = read(other, range(1, 21))
    assert read(source, range(1, 6)) == expected[:5]
    source.batch(Step(6), Slot(0))
    reads = loader.reads
    hand_over(source, source, 5)
    assert read(source, range(6, 7)) == expected[5:6]
    assert loader.reads == reads, "its batches were kept"
    hand_over(other, source, 20)  # evicted meanwhile, a spare, let in again
    assert read(source, range(21, 23)) == read(other, range(21, 23))
    assert not source._kept


def test_an_older_place_than_asked_for_is_read_on_from() -> None:
    old, told = feed(Stream()), list[dict[str, Any]]()
    read(old, range(1, 5))
    loader = Stream()
    new = feed(loader, told=told)
    hand_over(old, new, 4)
    assert read(new, range(7, 9)) == read(old, range(5, 9))[2:]
    assert loader.reads == 1 + 4 * 2
    assert [(t["step"], t["loaded"]) for t in told] == [(4, False), (5, True), (6, True)]


def test_places_are_let_go_with_their_steps() -> None:
    source = feed(Stream())
    read(source, range(1, 30))
    assert source.places is not None
    assert sorted(source.places._places) == [0, 29]


def test_a_snapshot_without_a_place_is_caught_up_with_by_reading() -> None:
    loader, new = Stream(), Places()
    new.load_state_dict(Places().state_dict())
    assert new.newest(Step(9)) is None
    assert read(feed(loader), range(4, 6)) == read(feed(Stream()), range(1, 6))[3:]
    assert loader.reads == 5 * 2


# ---- reading fails, and the script tries again


class Flaky(Stream):
    """Fails to read its fifth number, the first time."""

    failed = False

    def read(self, at: int) -> torch.Tensor:
        if at == 5 and not self.failed:
            self.failed = True
            raise OSError("the network")
        return super().read(at)


class Stateless:
    """Any loader, without what it knows of its place."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __iter__(self) -> Iterator[Any]:
        self.of.at = self.of.epoch = 0
        return iter(self.of)


#: The loader, and the stream it reads.
READERS: dict[str, Callable[[Flaky], Any]] = {
    "stateful": lambda stream: stream,
    "stateless": Stateless,
    "DataLoader": lambda stream: DataLoader(stream, batch_size=1),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_what_was_read_of_a_step_that_failed_halfway_is_not_lost(kind: str, slots: int) -> None:
    whole = Flaky()
    whole.failed = True
    expected = read(feed(READERS[kind](whole), slots), range(1, 4), slots)
    source = feed(READERS[kind](Flaky()), slots)
    seen, failures = list[Any](), 0
    while len(seen) < 3:
        try:
            seen += read(source, range(len(seen) + 1, len(seen) + 2), slots)
        except OSError:
            failures += 1
    assert failures == 1
    assert seen == expected


# ---- states that are not good enough


class CountsLate(Stream):
    """Counts after `yield`: its state names the batch it has given."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 7:
            yield self.read(self.at + 1)
            self.at += 1
        self.at, self.epoch = 0, self.epoch + 1


class SaysWhatIsRead(Ahead):
    """Its state is of what was read, not of what was given."""

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at + len(self.ahead), "epoch": self.epoch}


class BeginsAnew(Stream):
    """Forgets on iter() what was loaded."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.at = 0
        return super().__iter__()


class Unseeded(Stream):
    """Augments from a generator that is no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = random.Random(5)

    def read(self, at: int) -> torch.Tensor:
        return super().read(at) + self.draws.random()


@pytest.mark.parametrize("kind", [CountsLate, SaysWhatIsRead, BeginsAnew, Unseeded])
def test_a_state_that_does_not_bring_its_batches_back_is_refused_and_all_is_read_again(
    kind: type[Stream], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)  # whatever a test before has set
    old, loader, told = feed(kind()), kind(), list[dict[str, Any]]()
    expected = read(feed(kind()), range(1, 8))
    read(old, range(1, 4))
    new = feed(loader, told=told)
    hand_over(old, new, 3)
    if kind is Unseeded:
        # Nor does its first state: one draw of this process is gone.
        with pytest.raises(NotDeterministic, match="did not bring it either"):
            read(new, range(4, 5))
        return
    assert read(new, range(4, 8)) == expected[3:]
    assert [(t["step"], t["loaded"]) for t in told] == [(1, True), (2, True)]
    refused, cost = (record.getMessage() for record in caplog.records)
    assert re.search(rf"in step 3, after 5 batches, .*{kind.__name__}\.state_dict", refused)
    assert re.search(r"^4 batches before step 3 are loaded again .*its state was refused$", cost)


def test_what_a_state_leaves_out_may_be_come_to_from_the_first_batch() -> None:
    class Fresh(Unseeded):
        """As a shuffle buffer that is empty after a load."""

        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            self.draws = random.Random(5)

    old, new = feed(Fresh()), feed(Fresh())
    read(old, range(1, 3))
    hand_over(old, new, 2)
    assert read(new, range(3, 5)) == read(old, range(3, 5))


def test_a_job_that_began_without_places_has_the_beginning_in_its_snapshots() -> None:
    old, loader = feed(CountsLate()), CountsLate()
    expected = read(feed(CountsLate()), range(1, 7))
    read(old, range(4, 5))  # restored from a snapshot without
    new = feed(loader)
    hand_over(old, new, 4)
    assert read(new, range(5, 7)) == expected[4:]


def test_a_loader_that_does_not_begin_its_next_epoch_is_told_how() -> None:
    class Ends(Stream):
        def __iter__(self) -> Iterator[torch.Tensor]:
            while self.at < 7:
                self.at += 1
                yield self.read(self.at)

    with pytest.raises(UsageError, match="gave 7 batches and then no more"):
        read(feed(Ends()), range(1, 5))
    with pytest.raises(UsageError, match="the loader is empty"):
        read(feed(DataLoader(Stateful([]))), range(1, 2))


class Stateful(IterableDataset[Any]):
    """Gives `values`, and has any state."""

    def __init__(self, values: list[Any], state: Any = None) -> None:
        self.values, self.state = values, state

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"reader": {"file": open}}, r"state/reader/file is a builtin.*nothing is ever pickled"),
        ({"rest": b"bytes"}, "state/rest is a bytes, which cannot be stored"),
        ({"buffer": "x" * STATE_BYTES_MAX}, "bytes of JSON.*not hold what was read"),
    ],
)
def test_a_state_that_cannot_be_kept_is_refused_at_the_first_step(state: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        feed(Stateful([1], state)).batch(Step(1), Slot(0))


STATES: dict[str, Any] = {
    "none": None,
    "empty": {},
    "plain": {"n": 2**70, "f": float("inf"), "t": (1, (2, [3])), "d": {4: None, "$tensor": "no"}},
    "generators": {"rng": random.Random(1).getstate(), "torch": torch.Generator().get_state()},
    "tensors": [torch.tensor(3), torch.empty(0, 2), torch.tensor([[1.5], [2.0]]).bfloat16().t()],
    "kinds": {"mask": torch.tensor([True, False]), "c": torch.tensor([1j])},
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_comes_back_as_it_was(kind: str) -> None:
    state = STATES[kind]
    back = unpacked(packed(state))
    assert type(back) is type(state)
    assert packed(back) == packed(state)
    assert str(back) == str(state)


TORN: dict[str, Any] = {
    "empty": {},
    "no tensor": {"value": {"$tensor": "x"}, "tensors": {}},
    "short tensor": {"value": {"$tensor": "x"}, "tensors": {"x": ["int64", [3], "AAAA"]}},
    "odd tensor": {"value": {"$tensor": "x"}, "tensors": {"x": 7}},
    "odd dtype": {"value": {"$tensor": "x"}, "tensors": {"x": ["odd", [0], ""]}},
    "odd mark": {"value": {"$odd": 1}, "tensors": {}},
}


@pytest.mark.parametrize("kind", TORN)
def test_damaged_places_are_told(kind: str) -> None:
    with pytest.raises(IntegrityError):
        unpacked(json.dumps(TORN[kind]))
    with pytest.raises(IntegrityError):
        Place.from_json(TORN[kind])


# ---- which loaders


def test_whose_state_counts() -> None:
    stream = Stream()
    assert state_of(stream) is state_of(DataLoader(stream)) is stream
    assert state_of(DataLoader(stream, num_workers=1)) is None
    assert state_of(Stateless(stream)) is None

    class Own(DataLoader[torch.Tensor]):
        """May read however it likes."""

    assert state_of(Own(stream)) is None

    class Samples(Dataset[int]):
        """Map-style: read in an order that is known anyway."""

        state_dict = load_state_dict = None

    assert state_of(DataLoader(Samples(), sampler=[0])) is None


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (Stateless(Stream()), r"a Stateless cannot say where it stands: give it state_dict\(\)"),
        (DataLoader(Stream(), num_workers=1), "StatefulDataLoader, or a DataLoader with num_w"),
    ],
)
def test_what_is_read_again_says_what_that_costs_and_how_to_avoid_it(
    loader: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        feed(loader).batch(Step(4), Slot(0))
    (record,) = caplog.records
    said = record.getMessage()
    assert re.match(r"6 batches before step 4 are loaded again .* for about \d+\.\d s: ", said)
    assert re.search(words, said)


def test_a_loader_is_not_protected_twice() -> None:
    model, stream = net(), Stream()
    with alone() as session:
        session.protect(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), stream=stream
        )
        with pytest.raises(UsageError, match=r"do not give it to protect\(\) as well"):
            session.steps(DataLoader(stream), slots=1, until=1)


def test_a_session_of_one_trains_on_a_stateful_loader() -> None:
    class Points(Stream):
        def read(self, at: int) -> Any:
            x = torch.tensor([[float(at), 1.0], [1.0, float(at)]])
            return x / 7, x.sum(dim=1, keepdim=True)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    points = Points()
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(points, slots=2, until=5):
            with step:
                learn(model, step)
                optimizer.step()
    assert points.epoch * 7 + points.at == 10


def test_what_is_kept_besides_may_be_missing_on_either_side() -> None:
    def state() -> ProtectedState:
        torch.manual_seed(0)
        return ProtectedState(model=nn.Linear(2, 2))

    def load(into: ProtectedState, of: ProtectedState) -> None:
        layout = of.layout()
        into.load(layout, [bytes(layout.total_bytes)], of.small())

    without, other = state(), state()
    source = feed(Stream())
    read(source, range(1, 3))
    assert source.places is not None
    source.places.step = Step(2)
    kept, taken = state(), Places()
    kept.also("loader", source.places)
    other.also("loader", taken)
    load(without, kept)
    load(other, without)
    assert taken.newest(Step(2)) is None
    load(other, kept)
    assert taken.newest(Step(2)) == source.places.newest(Step(2)) is not None


# ---- torchdata's

NINE: Callable[[], list[int]] = partial(list, range(9))


def stateful_data_loader(data: Any, workers: int) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    torch.manual_seed(7)  # the order is drawn when it is made
    shuffle = None if isinstance(data, IterableDataset) else True
    return torchdata.StatefulDataLoader(data, batch_size=2, shuffle=shuffle, num_workers=workers)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("data", [Stream, NINE])
def test_torchdatas_loader_goes_on_where_it_was(data: Any, workers: int) -> None:
    # Four or five batches an epoch, two a step.
    undisturbed = read(feed(stateful_data_loader(data(), workers)), range(1, 7))
    for step in (4, 5) if workers else range(1, 6):
        old = feed(stateful_data_loader(data(), workers))
        read(old, range(1, step + 1))
        told: list[dict[str, Any]] = []
        new = feed(stateful_data_loader(data(), workers), told=told)
        hand_over(old, new, step)
        assert read(new, range(step + 1, 7)) == undisturbed[step:], step
        assert told == [{"step": step, "until": step, "loaded": False}]
