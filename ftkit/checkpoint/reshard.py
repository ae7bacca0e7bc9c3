"""Reshard: which saved boxes make up the boxes a new world wants (pure).

A want is covered by intersecting it with what sources hold, cheapest source first, and going
on with what is left. Holdings are indexed by tensor and by their first index in the dimension
that tells most of them apart, so a plan costs the boxes it touches, not all pairs: a rank of
an FSDP world looks at its neighbours' shards, whatever the number of ranks.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.core.errors import StateChanged

Kind = tuple[str, tuple[int, ...]]
"""What all boxes of a tensor share: dtype and global shape."""


class Read(NamedTuple):
    """One read: elements `box` of a tensor, from one source to one want."""

    want: int
    """Its place among the wants."""
    source: int
    """Its place among the sources."""
    box: Box
    """In elements of the whole tensor; `Box.within` a want or a holding gives its place there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReshardPlan:
    """Reads that fill each wanted element at most once, and the elements nobody has."""

    reads: tuple[Read, ...]
    missing: tuple[tuple[int, Box], ...]
    """Place of the want, and the box of it that no source holds."""


class _Shelf:
    """The boxes that sources hold of one tensor, found by where they begin on one axis."""

    def __init__(self, kind: Kind, source: int) -> None:
        self.kind = kind
        self.first = source
        """The source that is named when another disagrees about `kind`."""
        self.holders = dict[Box, list[int]]()
        """Sources by box, ascending: replicas hold the same one."""
        self._sorted: tuple[int, int, list[int], list[Box]] | None = None

    def near(self, box: Box) -> Iterable[Box]:
        """Every box held that can intersect `box`, and few others."""
        if len(self.holders) == 1 or not box.shape:
            return self.holders
        axis, longest, starts, boxes = self._sorted or self._sort()
        low, count = box.offsets[axis], box.shape[axis]
        return boxes[bisect_left(starts, low - longest + 1) : bisect_left(starts, low + count)]

    def _sort(self) -> tuple[int, int, list[int], list[Box]]:
        ranks = range(len(self.kind[1]))
        axis = max(ranks, key=lambda d: len({box.offsets[d] for box in self.holders}))
        boxes = sorted(self.holders, key=lambda box: box.offsets[axis])
        longest = max(box.shape[axis] for box in boxes)
        self._sorted = axis, longest, [box.offsets[axis] for box in boxes], boxes
        return self._sorted


class Holdings:
    """What a sequence of sources holds, earlier sources being preferred."""

    def __init__(self, sources: Sequence[Iterable[TensorBox]]) -> None:
        """Index the boxes of each source.

        Raises:
          StateChanged: two sources disagree about a tensor's dtype or global shape: they are
            not of one state.
        """
        self._shelves = dict[str, _Shelf]()
        for source, held in enumerate(sources):
            for name, dtype, global_shape, box in held:
                shelf = self._shelves.get(name)
                if shelf is None:
                    shelf = self._shelves[name] = _Shelf((dtype, global_shape), source)
                elif shelf.kind != (dtype, global_shape):
                    raise StateChanged(
                        f"sources are of different states: {name} is {_words(shelf.kind)} in "
                        f"source {shelf.first} and {_words((dtype, global_shape))} in {source}"
                    )
                found = shelf.holders.setdefault(box, [])
                if not found or found[-1] != source:
                    found.append(source)
        self.kinds: Mapping[str, Kind] = {n: shelf.kind for n, shelf in self._shelves.items()}
        """Dtype and global shape of each tensor that some source has, by name."""

    def plan(
        self,
        wants: Sequence[TensorBox],
        usable: Callable[[int], bool] | None = None,
    ) -> ReshardPlan:
        """Cover each wanted box, or say what of it nobody holds.

        Args:
          wants: of any sizes; empty ones need nothing. They may overlap: each is covered.
          usable: whether a source may be used; None for all.
        """
        reads, missing = list[Read](), list[tuple[int, Box]]()
        for place, (name, _, _, wanted) in enumerate(wants):
            if not wanted.elements:
                continue
            shelf = self._shelves.get(name)
            left = [wanted]
            for source, held in _ranked(shelf, wanted, usable) if shelf else ():
                rest = list[Box]()
                for box in left:
                    common = box.intersect(held)
                    if common is None:
                        rest.append(box)
                    else:
                        reads.append(Read(place, source, common))
                        rest += box.without(common)
                left = rest
                if not left:
                    break
            missing += [(place, box) for box in left]
        return ReshardPlan(reads=tuple(reads), missing=tuple(missing))


def _ranked(
    shelf: _Shelf, wanted: Box, usable: Callable[[int], bool] | None
) -> list[tuple[int, Box]]:
    """Each box near the wanted one with the best source that has it, best source first."""
    ranked = list[tuple[int, Box]]()
    for box in shelf.near(wanted):
        for source in shelf.holders[box]:
            if usable is None or usable(source):
                ranked.append((source, box))
                break
    # Of one source, the larger box first: fewer reads.
    ranked.sort(key=lambda found: (found[0], -found[1].elements))
    return ranked


def check_names(
    wanted: Mapping[str, Kind],
    held: Mapping[str, Kind],
    *,
    pattern: str | None = None,
    strict: bool = True,
) -> list[str]:
    """The names to load, after judging that what is saved fits what is live.

    Args:
      wanted: the live tensors.
      held: the saved ones.
      pattern: load only names that match it, as a shell would match file names ("*" and "?",
        "*" also across "/"); the others are not judged.
      strict: whether names on one side only are an error.

    Returns:
      The names on both sides, sorted.

    Raises:
      StateChanged: names are missing or unexpected, listed as `load_state_dict` does; or a
        tensor has another dtype or global shape; or the pattern matches no saved name.
    """

    def chosen(names: Collection[str]) -> set[str]:
        return set(names) if pattern is None else {n for n in names if fnmatchcase(n, pattern)}

    mine, saved = chosen(wanted.keys()), chosen(held.keys())
    if pattern is not None and not mine & saved:
        raise StateChanged(
            f"no tensor that is both saved and live matches {pattern!r}; saved are "
            f"{_some(sorted(held))}"
        )
    wrong = list[str]()
    if strict and mine - saved:
        wrong.append(f"missing: {_some(sorted(mine - saved))}")
    if strict and saved - mine:
        wrong.append(f"unexpected: {_some(sorted(saved - mine))}")
    common = sorted(mine & saved)
    wrong += [
        f"{name} is {_words(held[name])} where it was saved and {_words(wanted[name])} here"
        for name in common
        if held[name] != wanted[name]
    ]
    if wrong:
        raise StateChanged(
            f"the saved state is of another model: {'; '.join(wrong[:10])}. Build the model as "
            "the job that saved it did, or load a part of it (names=...)"
        )
    return common


def _words(kind: Kind) -> str:
    return f"{kind[0]}{list(kind[1])}"


def _some(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"
