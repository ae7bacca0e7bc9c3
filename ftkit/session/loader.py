"""Reading: the batches of a loader, epoch after epoch, alike on every rank, from any batch on.

Everything random about reading is drawn from generators of the reader's own, keyed by the seed
and the epoch, so that a shuffling loader gives every rank the same order. To begin late means
to skip what came before. Of a DataLoader over a map-style data set only the order is drawn for
what is skipped, and nothing is loaded: there each batch has a key of its own for what its
samples and its collation draw, whether or not the batches before it were loaded. Any other
loader has to be read.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ftkit.core.errors import UsageError
from ftkit.recovery.data_cursor import derive


class Reading(ABC):
    """A loader's batches. One thread's object.

    Either epoch by epoch (`begin`, then `take` and `leave_out` until its end), or as one
    endless row (`next` and `skip`).
    """

    loads_what_it_skips: bool

    def __init__(self) -> None:
        self._epoch = -1
        self._found = True
        """Whether the present epoch had a batch."""

    @abstractmethod
    def begin(self, epoch: int) -> None:
        """Stand before the first batch of `epoch`, whatever was read before."""

    @abstractmethod
    def take(self) -> Any:
        """The next batch of the epoch; `END` when there is none."""

    @abstractmethod
    def leave_out(self) -> bool:
        """Pass over the next batch of the epoch; False when there is none."""

    def next(self) -> Any:
        """The next batch of any epoch. UsageError when the loader gives none at all."""
        while self._epoch < 0 or (batch := self.take()) is END:
            self._following()
        self._found = True
        return batch

    def skip(self) -> None:
        """Leave the next batch of any epoch out."""
        while not self.leave_out():
            self._following()
        self._found = True

    def _following(self) -> None:
        if not self._found:
            raise UsageError(self._nothing())
        self._found = False
        self._epoch += 1
        self.begin(self._epoch)

    def _nothing(self) -> str:
        return "the loader is empty: there is nothing to train on"


def reading_of(loader: Iterable[Any], seed: int) -> Reading:
    """How to read `loader`."""
    if _has_order(loader):
        return OrderedReading(loader, seed)
    return PlainReading(loader, seed)


def _has_order(loader: Iterable[Any]) -> TypeGuard[DataLoader[Any]]:
    """Whether `loader` is torch's own, no subclass that might read otherwise, by index.

    A `worker_init_fn` may look for the data set in its worker, where ours would stand.
    """
    return (
        type(loader) is DataLoader
        and not isinstance(loader.dataset, IterableDataset)
        and not (loader.num_workers and loader.worker_init_fn is not None)
    )


class PlainReading(Reading):
    """Any iterable that can be iterated again."""

    loads_what_it_skips = True

    def __init__(self, loader: Iterable[Any], seed: int) -> None:
        super().__init__()
        self._loader = loader
        self._seed = seed
        self._randomness = Randomness(seed)
        self._batches: Iterator[Any] = iter(())

    def begin(self, epoch: int) -> None:
        self._randomness = Randomness(derive(self._seed, "epoch", epoch))
        with self._randomness:
            self._batches = iter(self._loader)

    def take(self) -> Any:
        # A sampler may draw its order as late as with the first batch, and a data set may draw
        # with each: all of it from the reader's own generators.
        with self._randomness:
            return next(self._batches, END)

    def leave_out(self) -> bool:
        return self.take() is not END


class OrderedReading(Reading):
    """A DataLoader over a map-style data set: its order first, then its samples."""

    loads_what_it_skips = False

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        """Read what `loader` would, with a loader like it; the given one is not iterated."""
        super().__init__()
        self._seed = seed
        self._order = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._places = _Places()
        workers = loader.num_workers
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(loader.dataset, loader.collate_fn, batched=loader.batch_sampler is not None),
            sampler=self._places,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor if workers else None,
            persistent_workers=loader.persistent_workers,
        )
        #: For what the loader draws of its own: seeds for workers, which nothing depends on.
        self._randomness = Randomness(seed)
        self._batches: Iterator[Any] | None = None
        """Of the present epoch, once one of them was loaded."""

    def begin(self, epoch: int) -> None:
        self._batches = None
        self._places.begin(self._order, derive(self._seed, "epoch", epoch))

    def take(self) -> Any:
        if self._batches is None:
            with self._randomness:
                self._batches = iter(self._loader)
        with self._randomness:
            return next(self._batches, END)

    def leave_out(self) -> bool:
        if self._batches is not None:
            # Loaded ahead already, perhaps.
            return self.take() is not END
        return next(self._places.row, None) is not None


@dataclass(frozen=True, slots=True)
class _Place:
    """One batch of an epoch: what it holds, and the key of what it draws."""

    indices: Any
    key: int


class _Places:
    """The places of the present epoch that are still to come: the sampler of our loader."""

    def __init__(self) -> None:
        self.row: Iterator[_Place] = iter(())
        self.given = 0

    def begin(self, order: Iterable[Any], key: int) -> None:
        """Begin an epoch whose `order` and whose batches draw by `key`."""
        self.given = 0
        self.row = self._walk(order, key)

    def _walk(self, order: Iterable[Any], key: int) -> Iterator[_Place]:
        # A sampler may draw as it goes: never between what others draw.
        randomness = Randomness(key)
        with randomness:
            left = iter(order)
        while True:
            with randomness:
                indices = next(left, END)
            if indices is END:
                return
            yield _Place(indices, derive(key, self.given))
            self.given += 1

    def __iter__(self) -> Iterator[_Place]:
        return self.row


class _Batches(Dataset[Any]):
    """A data set whose items are the user's batches; lives in the workers, if there are any."""

    def __init__(self, samples: Any, collate: Any, *, batched: bool) -> None:
        self._samples, self._collate, self._batched = samples, collate, batched

    def __getitem__(self, place: _Place) -> Any:
        with Randomness(place.key):
            if not self._batched:
                return self._collate(self._samples[place.indices])
            if hasattr(self._samples, "__getitems__"):
                return self._collate(self._samples.__getitems__(place.indices))
            return self._collate([self._samples[i] for i in place.indices])


def _as_it_is(batch: Any) -> Any:
    """(collate_fn of our loader) The user's has collated it."""
    return batch


#: What `Reading.take` gives after the last batch of an epoch.
END = object()


class Randomness:
    """The global generators of torch, numpy and Python, keyed, while something is read.

    Reading must not disturb the slots' randomness, nor depend on it. Entered again, it goes on
    where it was left.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self._own: _States | None = None
        self._outer: _States | None = None

    def __enter__(self) -> None:
        self._outer = _states()
        if self._own is not None:
            _set_states(self._own)
        else:
            # Not `torch.manual_seed`, which would seed every GPU as well.
            torch.default_generator.manual_seed(self._key >> 1)
            random.seed(self._key)
            numpy.random.seed(self._key & 0xFFFFFFFF)

    def __exit__(self, *_: object) -> None:
        self._own = _states()
        assert self._outer is not None, "entered"
        _set_states(self._outer)


_States = tuple[torch.Tensor, Any, Any]


def _states() -> _States:
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()


def _set_states(states: _States) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])
