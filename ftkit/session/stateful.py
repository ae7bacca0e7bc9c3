"""Stateful loaders: those that can say where they stand, and be put there again.

What a snapshot keeps is the place before the last batch of its step, together with that batch's
digest. Who takes a place over reads that one batch again and compares: a loader that names another
place than it stands at, having read ahead or counted too late, is found out there and then. The
very first place is kept as well, to begin from again.
"""

import base64
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch.utils.data import DataLoader, IterableDataset

from ftkit.checkpoint.layout import SMALL_BYTES
from ftkit.checkpoint.plain import decode, encode
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import Step
from ftkit.recovery.data_cursor import derive
from ftkit.session.loader import END, Randomness, Reading

#: What the state of a loader may take as JSON. A snapshot keeps two, beside those of optimizers and
#: schedulers.
STATE_BYTES_MAX = SMALL_BYTES // 8


@runtime_checkable
class Stateful(Protocol):
    """The two methods of torch's `Stateful` and torchdata's `StatefulDataLoader`.

    Called by the training thread, between two batches, on every rank alike: each reads the whole
    stream, and keeps the batches of its slots.
    """

    def state_dict(self) -> dict[str, Any]:
        """Where the batch that comes next lies, whatever has been read ahead of it.

        Called once a step. None, bool, int, float, str, tensors, and lists, tuples and dicts of
        them; as JSON no more than `STATE_BYTES_MAX`.
        """

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object:
        """Stand there again: the next `iter()` goes on with that batch.

        An `iter()` after the end of an epoch begins anew.
        """


def state_of(loader: Iterable[Any]) -> Stateful | None:
    """What says and takes the place of `loader`, if anything does.

    That is the loader itself, or the stateful data set of torch's own DataLoader. Not where that
    has workers: they read ahead, each with a copy of the data set.
    """
    if isinstance(loader, Stateful):
        return loader
    if type(loader) is DataLoader and not loader.num_workers:
        dataset: object = loader.dataset
        if isinstance(dataset, IterableDataset) and isinstance(dataset, Stateful):
            return dataset
    return None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a loader stood in `step`, before the last of its batches."""

    step: Step
    epoch: int
    batches: int
    """Read before, in all epochs together."""
    state: str
    """The loader's, as `packed`."""
    digest: int
    """Of the batch that comes next; 0 when nothing was read yet."""

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batches": self.batches,
            "state": self.state,
            "digest": f"{self.digest:016x}",
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """IntegrityError: `to_json` never wrote this."""
        try:
            step, epoch, batches = (int(value[key]) for key in ("step", "epoch", "batches"))
            return cls(Step(step), epoch, batches, str(value["state"]), int(value["digest"], 16))
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"a loader's place cannot be read: {error!r}") from error


class Places:
    """The places of the last steps. Snapshots keep that of `step`, as one more stateful object."""

    def __init__(self) -> None:
        self.step = Step(0)
        """Which step `state_dict` is asked for."""
        self._places: dict[Step, Place] = {}

    def note(self, place: Place) -> None:
        self._places[place.step] = place

    def newest(self, until: Step) -> Place | None:
        """The place of step `until`, or the last one known before."""
        steps = [step for step in self._places if step <= until]
        return self._places[max(steps)] if steps else None

    def forget(self, before: Step) -> None:
        """No step before `before` will be gone back to, but for the very beginning."""
        for step in [s for s in self._places if 0 < s < before]:
            del self._places[step]

    def state_dict(self) -> dict[str, Any]:
        kept = (self._places.get(step) for step in (Step(0), self.step))
        return {"places": [place.to_json() for place in kept if place is not None]}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Know more places; whoever reads decides whether to go there."""
        for place in state_dict["places"]:
            self.note(Place.from_json(place))


class StatefulReading(Reading):
    """A loader that can say and take its place.

    What is drawn from the global generators for a batch has a key of its own, so that it does not
    depend on which batches were read before it in this process.
    """

    loads_what_it_skips = True

    def __init__(self, loader: Iterable[Any], state: Stateful, seed: int) -> None:
        super().__init__()
        self._loader, self._state, self._seed = loader, state, seed
        self._batches: Iterator[Any] = iter(())
        self._read = 0

    def begin(self, epoch: int) -> None:
        self._batches = iter(())
        with Randomness(derive(self._seed, "epoch", epoch)):
            self._batches = iter(self._loader)

    def take(self) -> Any:
        with Randomness(derive(self._seed, "batch", self._read)):
            batch = next(self._batches, END)
        if batch is not END:
            self._read += 1
        return batch

    def leave_out(self) -> bool:
        return self.take() is not END

    def place(self, step: Step, digest: int = 0) -> Place:
        """Where it stands now; the rest is as told. UsageError when that cannot be kept."""
        if self._epoch < 0:
            # Before it is iterated a loader need not know where it will begin.
            self._following()
        return Place(step, self._epoch, self._read, packed(self._state.state_dict()), digest)

    def resume(self, place: Place) -> None:
        """Stand at `place`, wherever it stood before."""
        # A generator that is left may still change the state, and does it now.
        self._batches = iter(())
        self._epoch, self._read, self._found = place.epoch, place.batches, True
        self._state.load_state_dict(unpacked(place.state))
        self.begin(place.epoch)

    def _nothing(self) -> str:
        if not self._read:
            return super()._nothing()
        return (
            f"the loader gave {self._read} batches and then no more. When it is iterated after the "
            "end of an epoch it has to begin anew: set its place back at the end of __iter__"
        )


def packed(state: object) -> str:
    """A loader's state as JSON, its tensors (generators, mostly) among it.

    One text, so that whoever keeps it need not walk through it with every step.

    Raises:
      UsageError: it holds something that cannot be stored, or too much.
    """
    tensors = dict[str, torch.Tensor]()
    value = encode(state, "the loader's state", tensors)
    bits = {
        name: [str(t.dtype).removeprefix("torch."), list(t.shape), _text(t)]
        for name, t in tensors.items()
    }
    done = json.dumps({"value": value, "tensors": bits}, separators=(",", ":"))
    if len(done) > STATE_BYTES_MAX:
        raise UsageError(
            f"the loader's state is {len(done)} bytes of JSON, and {STATE_BYTES_MAX} are kept with every "
            "step. state_dict() should say where the next batch lies, not hold what was read: draw "
            "a shuffle buffer anew, from a seed and a position"
        )
    return done


def unpacked(state: str) -> Any:
    """What `packed` was given. IntegrityError when it never wrote this."""

    def tensor(name: str) -> torch.Tensor:
        dtype, shape, text = whole["tensors"][name]
        raw = torch.frombuffer(bytearray(base64.b64decode(text)) or bytearray(1), dtype=torch.uint8)
        count = len(raw) if text else 0
        return raw[:count].view(getattr(torch, dtype)).reshape(shape)

    try:
        whole = json.loads(state)
        return decode(whole["value"], tensor)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(f"a loader's state cannot be read: {error!r}") from error


def _text(tensor: torch.Tensor) -> str:
    flat = tensor.cpu().contiguous().reshape(-1)
    return base64.b64encode(flat.view(torch.uint8).numpy().tobytes()).decode()
