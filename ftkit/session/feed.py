"""Feed: the batches of a step, slot by slot, the same for whoever asks.

Two kinds of source. A data set with `__len__` and `__getitem__` is read by the cursor: which
samples a slot holds is a pure function of (seed, step, slot), and only what is asked for is
read. A DataLoader (or any iterable that can be iterated again, or is stateful) is read in order
by every rank, one batch a slot; its batches are kept until their step is committed, so that a step
played again sees the same ones, and a digest of them is compared between ranks by the vote.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset, default_collate

from ftkit.core.errors import NotDeterministic, UsageError
from ftkit.core.ids import Slot, Step
from ftkit.recovery.data_cursor import DataCursor, derive
from ftkit.session.loader import Reading, reading_of
from ftkit.session.stateful import Place, Places, Stateful, StatefulReading, state_of

logger = logging.getLogger(__name__)

#: Writes an event of this kind with these fields: `Trace.event`.
Tell = Callable[..., None]


@runtime_checkable
class Feed(Protocol):
    """Where a step's batches come from."""

    def batch(self, step: Step, slot: Slot) -> Any:
        """The batch of one slot. Asking again gives the same."""

    def digest(self, step: Step) -> int:
        """64 bits over what every rank read alike at `step`; 0 where each reads its own."""

    def samples(self, step: Step, slot: Slot) -> list[int]:
        """What a slot holds, for people: places in the data set, or the number of a loader's batch."""

    def committed(self, step: Step) -> None:
        """`step` will not be asked for again."""


@runtime_checkable
class MapStyle(Sized, Protocol):
    """A data set that is read by index."""

    def __getitem__(self, index: int) -> Any: ...


def feed_of(
    source: "MapStyle | Iterable[Any] | Feed",
    *,
    slots: int,
    slot_size: int | None,
    seed: int,
    shuffle: bool,
    collate: Callable[[list[Any]], Any] | None,
    tell: Tell,
) -> "Feed":
    """The feed for `source`; `tell` writes its events. UsageError when it is neither kind."""
    if isinstance(source, Feed):
        return source
    # Every torch data set has __getitem__, and an iterable one may have a length.
    if isinstance(source, MapStyle) and not isinstance(source, IterableDataset):
        if slot_size is None:
            raise UsageError("a data set needs slot_size=, the samples in one slot")
        try:
            cursor = DataCursor(
                length=len(source), slots=slots, slot_size=slot_size, seed=seed, shuffle=shuffle
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        return DatasetFeed(source, cursor, collate or default_collate)
    loader: object = source  # whatever the annotation says, it comes from a script
    if isinstance(loader, Iterable) and (
        isinstance(loader, Stateful) or not isinstance(loader, Iterator)
    ):
        return LoaderFeed(loader, slots=slots, seed=seed, tell=tell)
    raise UsageError(
        f"cannot read batches from a {type(source).__name__}: give a data set with __len__ and "
        "__getitem__, or a DataLoader (an iterator cannot be read again after a failure, unless it "
        "has state_dict() and load_state_dict())"
    )


class DatasetFeed:
    """Batches of a map-style data set, in the cursor's order."""

    def __init__(
        self, source: MapStyle, cursor: DataCursor, collate: Callable[[list[Any]], Any]
    ) -> None:
        self._source = source
        self._cursor = cursor
        self._collate = collate

    def batch(self, step: Step, slot: Slot) -> Any:
        return self.collate(self.read(step, slot))

    def read(self, step: Step, slot: Slot) -> list[Any]:
        """The samples of a slot, one by one."""
        return [self._source[i] for i in self._cursor.samples(step, slot)]

    def collate(self, samples: list[Any]) -> Any:
        """A batch of these samples."""
        return self._collate(samples)

    def digest(self, step: Step) -> int:
        return 0

    def samples(self, step: Step, slot: Slot) -> list[int]:
        return self._cursor.samples(step, slot)

    def committed(self, step: Step) -> None:
        return


class LoaderFeed:
    """Batches of a loader, read in order by every rank alike, epoch after epoch.

    A rank that takes up a step without having read the ones before puts a stateful loader at the
    place that the snapshot has of it. Any other it reads from the beginning, leaving out what was
    consumed (`loader.Reading`); that takes time where it means to load it, and a warning says so.
    """

    def __init__(self, loader: Iterable[Any], *, slots: int, seed: int, tell: Tell) -> None:
        self._loader = loader
        self._tell = tell
        self._slots = slots
        self._seed = seed
        self.state = state_of(loader)
        """What says and takes the loader's place; None when nothing does."""
        self.places = None if self.state is None else Places()
        """What snapshots are to keep of it."""
        self._reading = self._begun()
        self._at: Step | None = Step(0)
        """The last step whose batches were read or left out; None when nobody knows."""
        self._kept: dict[Step, list[Any]] = {}
        """Batches by slot, of the steps that may be played again."""
        self._digests: dict[Step, int] = {}

    def batch(self, step: Step, slot: Slot) -> Any:
        self._read(step)
        return self._kept[step][slot]

    def digest(self, step: Step) -> int:
        self._read(step)
        return self._digests[step]

    def samples(self, step: Step, slot: Slot) -> list[int]:
        return [(step - 1) * self._slots + slot]

    def committed(self, step: Step) -> None:
        for done in [s for s in self._kept if s <= step]:
            del self._kept[done], self._digests[done]
        if self.places is not None:
            self.places.forget(step)

    def _read(self, step: Step) -> None:
        if step in self._kept:
            return
        before = Step(step - 1)
        if self._at != before:
            self._go_to(before)
        # Whatever ends it halfway, the loader then stands between two steps.
        self._at = None
        if before == 0:
            self._note_beginning()
        batches, digests = list[Any](), list[int]()
        for slot in range(self._slots):
            last = slot == self._slots - 1
            place = self._stateful.place(step) if last and self.places is not None else None
            batches.append(self._reading.next())
            digests.append(digest_of(batches[-1]))
            if place is not None and self.places is not None:
                self.places.note(replace(place, digest=digests[-1]))
        self._kept[step] = batches
        self._digests[step] = derive(self._seed, "loader", step, *digests) or 1
        self._at = step

    def _go_to(self, until: Step) -> None:
        """Come to the end of step `until`, from wherever this loader stands."""
        at, self._at = self._at, None
        place = None if self.places is None else self.places.newest(until)
        if place is not None and (at is None or not place.step <= at <= until):
            self._resume(place)
            at = place.step
        elif at is None or at > until:
            self._reading, at = self._begun(), Step(0)
        if at == 0:
            self._note_beginning()
        self._leave_out(at, until)
        self._at = until

    def _note_beginning(self) -> None:
        if self.places is not None:
            self.places.note(self._stateful.place(Step(0)))

    def _resume(self, place: Place) -> None:
        """Stand at the end of the step that `place` is of."""
        reading = self._stateful
        reading.resume(place)
        if place.step == 0:
            return
        if digest_of(reading.next()) == place.digest:
            self._tell("catch-up", step=place.step, until=place.step, loaded=False)
            return
        assert self.places is not None, "one of them was given"
        first = self.places.newest(Step(0))
        assert first is not None, "snapshots have the beginning too"
        advice = _advice(type(self.state).__name__, place)
        logger.warning("%s. It is read from its first batch instead", advice)
        reading.resume(first)
        steps, rest = divmod(place.batches, self._slots)
        self._leave_out(Step(0), Step(steps), "its state was refused")
        for _ in range(rest):
            reading.skip()
        if digest_of(reading.next()) != place.digest:
            raise NotDeterministic(
                f"{advice}. To read from the first batch did not bring it either"
            )

    def _leave_out(self, at: Step, until: Step, why: str = "") -> None:
        """Pass over what was committed without us after step `at`."""
        count, start = until - at, time.monotonic()
        for done in range(1, count + 1):
            for _ in range(self._slots):
                self._reading.skip()
            loaded = self._reading.loads_what_it_skips
            if done == 1 and loaded:
                logger.warning(
                    "%d batches before step %d are loaded again while the others wait, for about "
                    "%.1f s: %s",
                    count * self._slots,
                    until + 1,
                    (time.monotonic() - start) * count,
                    why or _how_to_avoid(self._loader),
                )
            # A tenth at a time: to load what was consumed before may take hours.
            if done * 10 // count > (done - 1) * 10 // count:
                self._tell("catch-up", step=at + done, until=until, loaded=loaded)

    def _begun(self) -> Reading:
        if self.state is not None:
            return StatefulReading(self._loader, self.state, self._seed)
        return reading_of(self._loader, self._seed)

    @property
    def _stateful(self) -> StatefulReading:
        assert isinstance(self._reading, StatefulReading), "there are places"
        return self._reading


def _advice(kind: str, place: Place) -> str:
    """What is wrong with the state of a loader that did not come back to `place`."""
    return (
        f"the loader was put back to its place in step {place.step}, after {place.batches} batches, "
        f"and another batch came than was read there before. {kind}.state_dict() must say where "
        "the batch lies that comes next, whatever is read ahead (count before `yield`), and after "
        "load_state_dict() the next iter() must go on with it. What is drawn at random must come "
        "from a generator that is part of the state, or from a seed and the position"
    )


def _how_to_avoid(loader: Iterable[Any]) -> str:
    """Why a loader is read from its beginning, and what would spare that."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, Stateful):
        return (
            "the data set has state_dict(), and a DataLoader that reads ahead of it: use torchdata's "
            "StatefulDataLoader, or a DataLoader with num_workers=0"
        )
    return (
        f"a {type(loader).__name__} cannot say where it stands: give it state_dict() and "
        "load_state_dict() (torchdata's StatefulDataLoader has them), or pass a data set with "
        "__len__ and __getitem__"
    )


def digest_of(batch: Any) -> int:
    """64 bits over the content of a batch; what is on a GPU already is left out."""
    hasher = xxhash.xxh3_64()
    _update(hasher, batch)
    return hasher.intdigest()


def _update(hasher: xxhash.xxh3_64, value: Any) -> None:
    """Feed every byte of a batch to `hasher`, tensors by content."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            return
        flat = value.detach().contiguous().reshape(-1)
        hasher.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        hasher.update(numpy.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            hasher.update(str(key).encode())
            _update(hasher, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(hasher, item)
    elif hasattr(value, "__dict__") and not _has_text(value):
        # Its text would be its address, another one on every rank.
        _update(hasher, vars(value))
    else:
        hasher.update(repr(value).encode())


def _has_text(value: object) -> bool:
    """Whether the type of `value` says how it is written, which may say what is in it."""
    return any("__repr__" in vars(kind) for kind in type(value).__mro__[:-1])
