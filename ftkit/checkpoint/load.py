"""Load a state from wherever its boxes are, whatever world saved it.

`reshard` plans which elements come from which source; this reads them into the live tensors,
and goes to the next source for what one cannot give.
"""

from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.ports import BoxSource
from ftkit.checkpoint.reshard import Holdings, check_names
from ftkit.checkpoint.state import ProtectedState, bytes_of
from ftkit.core.errors import IntegrityError, StateChanged, WireError
from ftkit.core.ids import Seat


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """A read that failed and was made good by another source."""

    source: str
    name: str
    box: Box
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `load_state` did."""

    tensors: int
    """Tensors of which some box was loaded here."""
    bytes_by_source: tuple[int, ...]
    """Bytes read well, by place in the sequence of sources."""
    fallbacks: tuple[Fallback, ...]

    @property
    def bytes(self) -> int:
        return sum(self.bytes_by_source)


def load_state(
    state: ProtectedState,
    sources: Sequence[BoxSource],
    *,
    small: Mapping[str, Any] | None = None,
    names: str | None = None,
    strict: bool = True,
    per_seat: Collection[str] = (),
    stage: bool = False,
) -> LoadReport:
    """Load the boxes this rank holds from sources of any other layout. Blocks.

    In place, as `ProtectedState.load`. Reads only what this rank holds, each element once, from
    the first source that has it undamaged. When it raises after reading began, the state is
    partly loaded: load again before going on.

    Args:
      state: what to load into.
      sources: parts of one step's state, cheapest first. They may overlap.
      small: small state to load too, from `small_of_seats`; None to leave hyperparameters and
        other objects as they are.
      names: load only the tensors whose full names match ("model/encoder.*"), as a shell would
        match file names; nothing else is touched. Not together with `small`.
      strict: whether tensors only saved or only live are an error.
      per_seat: other objects that are a seat's own (`small_of_seats`). Tensors inside their
        values come from the first source or not at all.
      stage: what is live is a part of what is saved; what is only saved is other ranks'. `small`
        is then from `small_of_stages`.

    Raises:
      StateChanged: names, dtypes or shapes differ; each is named. Nothing was changed.
      IntegrityError: some elements are in no source (nothing was changed), or in none that
        proved whole; the message lists tensors and boxes.
    """
    if names is not None and small is not None:
        raise ValueError("a part of the tensors cannot be loaded with the small state of all")
    holdings = Holdings([source.entries() for source in sources])
    targets = state.targets()
    if small is not None:
        small = targets.narrow(small) if stage else small
        targets.check_small(small)
    wanted = targets.wanted(holdings.kinds, small)
    held = {
        name: kind
        for name, kind in holdings.kinds.items()
        if name in wanted or not (stage or targets.inside_value(name))
    }
    chosen = check_names(wanted, held, pattern=names, strict=strict)
    tensors = targets.tensors({name: held[name] for name in chosen})
    boxes = [
        (TensorBox(name, *held[name], box), view)
        for name, tensor in tensors.items()
        for box, view in targets.boxes(name, tensor)
    ]
    with torch.no_grad():
        report = _Reader(sources, holdings, per_seat).read(boxes)
    targets.finish(tensors, small)
    return report


def small_of_seats(
    smalls: Mapping[Seat, Mapping[str, Any]], seat: Seat, *, per_seat: Collection[str] = ()
) -> dict[str, Any]:
    """The small state that a seat of a new world loads.

    All seats hold the same hyperparameters and schedules: the first seat's count. What is a
    seat's own (random generators) comes from the same seat, and stays as it is on a seat that
    the old world did not have.

    Args:
      smalls: small state by the seat that saved it.
      seat: who loads.
      per_seat: names of the other objects that are a seat's own.

    Raises:
      IntegrityError: there is none, or one is not that of a job.
    """
    if not smalls:
        raise IntegrityError("no seat's small state is known")
    for of, small in smalls.items():
        if not isinstance(small, dict) or not isinstance(small.get("others"), dict):
            raise IntegrityError(f"what was saved as the small state of seat {of} is none")
    first = smalls[min(smalls)]
    own = smalls.get(seat, {}).get("others", {})
    others = {n: own.get(n) if n in per_seat else value for n, value in first["others"].items()}
    return {**first, "others": others}


def small_of_stages(smalls: Mapping[Seat, Mapping[str, Any]], seat: Seat) -> dict[str, Any]:
    """The small state of a whole pipeline, of whose optimizers each seat has other parameters.

    Groups of the same number belong together. For the rest, as `small_of_seats`.

    Raises:
      IntegrityError: there is none, or one is not that of a job.
      StateChanged: stages have other numbers of groups.
    """
    whole = small_of_seats(smalls, seat)
    ordered = [smalls[s] for s in sorted(smalls)]
    optimizers = dict[str, Any]()
    for name, first in whole["optimizers"].items():
        parts = [small["optimizers"][name] for small in ordered]
        if len(counts := {len(part["groups"]) for part in parts}) > 1:
            raise StateChanged(
                f"{name} has {min(counts)} groups in one stage and {max(counts)} in another: give "
                "every stage the same groups, empty ones too"
            )
        groups = [
            {
                **group,
                "params": list(
                    dict.fromkeys(p for part in parts for p in part["groups"][i]["params"])
                ),
            }
            for i, group in enumerate(first["groups"])
        ]
        other = {key: value for part in parts for key, value in part["other"].items()}
        optimizers[name] = {**first, "groups": groups, "other": other}
    return {**whole, "optimizers": optimizers}


class _Read(NamedTuple):
    """A box to be read from one source."""

    want: TensorBox
    view: torch.Tensor
    """The memory of the box."""
    source: int
    tried: frozenset[int]
    """Sources that failed at it."""

    @property
    def nbytes(self) -> int:
        return self.view.numel() * self.view.element_size()


class _Reader:
    """Carries out a plan, and plans again around what fails."""

    def __init__(
        self, sources: Sequence[BoxSource], holdings: Holdings, per_seat: Collection[str]
    ) -> None:
        self._sources = sources
        self._holdings = holdings
        self._own = tuple(f"{name}/" for name in per_seat)
        self._gone = set[int]()
        self._bytes = [0] * len(sources)
        self._fallbacks = list[Fallback]()

    def read(self, boxes: Sequence[tuple[TensorBox, torch.Tensor]]) -> LoadReport:
        """Fill the memory of each box. IntegrityError when some element cannot be had."""
        todo, missing = list[_Read](), list[TensorBox]()
        for want, view in boxes:
            missing += self._plan(want, view, frozenset(), todo)
        self._refuse(missing)
        while todo:
            now, todo = todo, []
            for read, fine in zip(now, self._attempt(now), strict=True):
                if fine:
                    self._bytes[read.source] += read.nbytes
                else:
                    tried = read.tried | {read.source}
                    self._refuse(self._plan(read.want, read.view, tried, todo))
        return LoadReport(
            tensors=len({want.name for want, _ in boxes if want.box.elements}),
            bytes_by_source=tuple(self._bytes),
            fallbacks=tuple(self._fallbacks),
        )

    def _plan(
        self, want: TensorBox, view: torch.Tensor, tried: frozenset[int], todo: list[_Read]
    ) -> list[TensorBox]:
        """Add the reads that fill `view` to `todo`; returns what nobody holds."""
        own = want.name.startswith(self._own)
        made = self._holdings.plan(
            [want], lambda s: s not in tried and s not in self._gone and (s == 0 or not own)
        )
        todo += [
            _Read(
                want._replace(box=read.box),
                view[read.box.within(want.box).slices],
                read.source,
                tried,
            )
            for read in made.reads
        ]
        return [want._replace(box=box) for _, box in made.missing]

    def _attempt(self, reads: Sequence[_Read]) -> list[bool]:
        """Carry out reads; which of them went well. Those of one source may run at once."""
        found = list[bool]()
        for source, some in groupby(reads, key=lambda read: read.source):
            threads = self._sources[source].threads
            if threads == 1:
                found += map(self._succeeds, some)
            else:
                with ThreadPoolExecutor(threads, "ftkit-load") as pool:
                    found += pool.map(self._succeeds, some)
        return found

    def _succeeds(self, read: _Read) -> bool:
        if read.source in self._gone:
            return False
        view = read.view
        in_place = view.is_contiguous() and view.device.type == "cpu"
        host = view if in_place else torch.empty(view.shape, dtype=view.dtype)
        memory = bytes_of(host)
        try:
            self._sources[read.source].read(read.want.name, read.want.box, memory)
        except (IntegrityError, WireError, OSError) as error:
            if not isinstance(error, IntegrityError):
                # A source that is gone would make every other read wait for it as well.
                self._gone.add(read.source)
            self._fallbacks.append(
                Fallback(
                    source=str(self._sources[read.source]),
                    name=read.want.name,
                    box=read.want.box,
                    reason=str(error),
                )
            )
            return False
        if host is not view:
            with torch.no_grad():  # which holds for the thread that said so
                view.copy_(host)
        return True

    def _refuse(self, missing: Sequence[TensorBox]) -> None:
        if not missing:
            return
        lost = "; ".join(f"{want.name}: {want}" for want in missing[:10])
        more = f"; and {len(missing) - 10} more" if len(missing) > 10 else ""
        why = "; ".join(f"{f.source}: {f.reason}" for f in self._fallbacks[-5:])
        raise IntegrityError(
            f"no good copy is left of {len({want.name for want in missing})} tensors in "
            f"{len(self._sources)} sources ({lost}{more}). {why or 'Add the sources that have it'}"
        )
