"""Feed: the batches of a step, slot by slot, the same for whoever asks.

Two kinds of source. A data set with `__len__` and `__getitem__` is read by the cursor: which
samples a slot holds is a pure function of (seed, step, slot), and only what is asked for is
read. A DataLoader (or any iterable that can be iterated again) is read in order by every
rank, one batch a slot; its batches are kept until their step is committed, so that a step
played again sees the same ones, and a digest of them is compared between ranks by the vote.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Protocol, runtime_checkable

import numpy
import torch
import xxhash
from torch.utils.data import default_collate

from ftkit.core.errors import UsageError
from ftkit.core.ids import Slot, Step
from ftkit.recovery.data_cursor import DataCursor, derive
from ftkit.session.loader import reading_of

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
    if isinstance(source, MapStyle):
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
    if isinstance(loader, Iterable) and not isinstance(loader, Iterator):
        return LoaderFeed(loader, slots=slots, seed=seed, tell=tell)
    raise UsageError(
        f"cannot read batches from a {type(source).__name__}: give a data set with __len__ and "
        "__getitem__, or a DataLoader (an iterator cannot be read again after a failure)"
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

    A newcomer leaves out what was consumed before the step it joins at (`loader.Reading`), and
    where that means to read it, says so in `catch-up` events.
    """

    def __init__(self, loader: Iterable[Any], *, slots: int, seed: int, tell: Tell) -> None:
        self._reading = reading_of(loader, seed)
        self._tell = tell
        self._slots = slots
        self._seed = seed
        self._kept: dict[tuple[Step, Slot], Any] = {}
        self._digests: dict[Step, int] = {}
        self._read_steps = 0

    def batch(self, step: Step, slot: Slot) -> Any:
        self._read_to(step)
        return self._kept[step, slot]

    def digest(self, step: Step) -> int:
        self._read_to(step)
        return self._digests[step]

    def samples(self, step: Step, slot: Slot) -> list[int]:
        return [(step - 1) * self._slots + slot]

    def committed(self, step: Step) -> None:
        for slot in range(self._slots):
            self._kept.pop((step, Slot(slot)), None)
        self._digests.pop(step, None)

    def _read_to(self, step: Step) -> None:
        if step <= self._read_steps:
            return
        self._leave_out(Step(step - 1))
        hasher = xxhash.xxh3_64(seed=derive(self._seed, "loader", step))
        for slot in range(self._slots):
            batch = self._reading.next()
            _update(hasher, batch)
            self._kept[step, Slot(slot)] = batch
        self._digests[step] = hasher.intdigest() or 1
        self._read_steps = step

    def _leave_out(self, until: Step) -> None:
        """Come to the end of step `until`, which was committed without us."""
        first, count = self._read_steps, until - self._read_steps
        for done in range(count):
            for _ in range(self._slots):
                self._reading.skip()
            # A tenth at a time: to load what was consumed before may take hours.
            if (done + 1) * 10 // count > done * 10 // count:
                self._tell(
                    "catch-up",
                    step=first + done + 1,
                    until=until,
                    loaded=self._reading.loads_what_it_skips,
                )
        self._read_steps = until


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
