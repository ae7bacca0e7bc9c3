"""MeanStage: a lost pipeline stage as a source of boxes, each the mean of its neighbours' (CheckFree).

arXiv 2506.15461: each neighbour's weights count by the squared norm of its last gradient. The paper's
stages are all alike. Ours are runs of numbered layers, and layer p of a lost stage of n is made of layer
p of the stage before and of the stage behind; of layers as they would be, were those stages as long
(`p * theirs // n`), where they are not. Only layers whose tensors have its shapes count. The
optimizer's moments are not averaged: they begin anew.

The first stage and the last have one neighbour. In a pipeline that swaps its outer stages (CheckFree+)
its layers are taken as they are, and the first layer and the last of all from the copies that the
neighbour keeps (`Ends`).
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.ports import BoxSource
from ftkit.checkpoint.reshard import Kind
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.core.errors import UsageError
from ftkit.session.approximate import share_of


def layer_of(name: str) -> tuple[str, int] | None:
    """A tensor's name without its layer's number, and that number: the first one in it; pure.

    None where it has none, and for optimizer state.
    """
    module, _, rest = name.partition("/")
    if "/" in rest:
        return None
    parts = rest.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return f"{module}/{'.'.join([*parts[:place], '*', *parts[place + 1 :]])}", int(part)
    return None


def copied_name(name: str, group: int) -> str:
    """What a copy of another rank's tensor, of this group of its optimizer's, is captured as; pure."""
    return f"copied/{group}/{name}"


def of_copied_name(copied: str) -> tuple[str, int] | None:
    """The tensor that a copy is of, and its group; None for what is no copy. Pure."""
    kind, _, rest = copied.partition("/")
    group, _, name = rest.partition("/")
    return (name, int(group)) if kind == "copied" and group.isdecimal() else None


def layers_in(names: Iterable[str]) -> list[int]:
    """The numbers of the layers that tensors with these names are of, in order; pure."""
    return sorted({found[1] for name in names if (found := layer_of(name))})


class MeanStage:
    """What the neighbours of a lost stage make of it. Fits `BoxSource`; one thread's."""

    threads = 1

    def __init__(
        self,
        before: SnapshotSource | None,
        behind: SnapshotSource | None,
        wanted: Mapping[str, Kind],
        *,
        norms: tuple[float | None, float | None],
        stage: int,
    ) -> None:
        """Find the layers that each tensor is made of.

        Args:
          before: the stage before the lost one, as captured; None of the first one.
          behind: the stage behind it; None of the last one.
          wanted: tensors that this rank holds; those of lost layers are offered.
          norms: of each neighbour's last gradient. Both 0, or one of them unknown: an even mean.
          stage: the lost one's number, for messages.

        Raises:
          UsageError: a tensor has no counterpart of its shape on one side.
        """
        sides = [side for side in (before, behind) if side is not None]
        held = [{e.name: e.signature for e in side.head.layout.entries} for side in sides]
        copies = {
            name: (at, copied, group)
            for at, names in enumerate(held)
            for copied in names
            if (found := of_copied_name(copied)) is not None
            for name, group in [found]
        }
        numbers = [layers_in(names) for names in held]
        if not all(numbers):
            raise UsageError(
                f"stage {stage} cannot be made of its neighbours: number the layers in their names"
            )
        self.first = 0 if before is None else numbers[0][-1] + 1
        self.end = layers_in(copies)[-1] + 1 if behind is None and copies else numbers[-1][0]
        """The lost layers: [first, end)."""
        kept = layers_in(copies) if len(sides) == 1 else []
        first, end = self.first + (self.first in kept), self.end - (self.end - 1 in kept)
        self.made_of = dict[int, int]()
        """Where there is one neighbour: its layer that each lost one is, of those this rank holds."""
        self.copied = set[int]()
        """Of these, the lost ones that are copies."""
        self._sides: list[BoxSource] = [*sides]
        left, right = norms
        share = share_of((0.0, 0.0) if left is None or right is None else (left, right))
        shares = [share, 1 - share] if len(sides) > 1 else [1.0]
        self._made = dict[str, tuple[Kind, list[_Part]]]()
        self._groups = dict[str, int]()
        """Of the optimizer's, by copied tensor."""
        for name, kind in wanted.items():
            found = layer_of(name)
            if found is None or not self.first <= found[1] < self.end:
                continue
            if len(sides) == 1 and name in copies:
                at, copied, self._groups[name] = copies[name]
                self._made[name] = kind, [_Part(at, copied, 1.0)]
                self.copied.add(found[1])
                continue
            made = list[_Part]()
            for at, (theirs, weight) in enumerate(zip(held, shares, strict=True)):
                partner = _partner(*found, kind, theirs, first, end)
                if partner is None:
                    side = "before" if sides[at] is before else "behind"
                    raise UsageError(
                        f"stage {stage} cannot be made of its neighbours: the one {side} it has nothing "
                        f"like {name} of {kind[0]} {list(kind[1])}"
                    )
                made.append(_Part(at, partner, weight))
                if len(sides) == 1 and (of := layer_of(partner)) is not None:
                    self.made_of[found[1]] = of[1]
            self._made[name] = kind, made

    def entries(self) -> Iterable[TensorBox]:
        """Every tensor of the lost layers that this rank holds, whole."""
        for name, ((dtype, shape), _) in self._made.items():
            yield TensorBox(name, dtype, shape, Box.whole(shape))

    @torch.no_grad()
    def read(self, name: str, box: Box, out: memoryview, /) -> None:
        """See `BoxSource.read`. Integers are the stage's before."""
        (dtype, _), parts = self._made[name]
        kind: torch.dtype = getattr(torch, dtype)
        read = []
        for part in parts:
            host = bytearray(len(out))
            self._sides[part.side].read(part.name, box, memoryview(host))
            read.append(torch.frombuffer(host, dtype=kind))
        one = read[0]
        if kind.is_floating_point and len(read) > 1:
            # In float32 where the type is narrower: a mean in it would be rounded three times.
            wide = torch.promote_types(kind, torch.float32)
            first, second = (p.weight * r.to(wide) for p, r in zip(parts, read, strict=True))
            one = (first + second).to(kind)
        out[:] = one.contiguous().view(torch.uint8).numpy().data

    def small(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Small state of the lost stage: its parameters, in the groups that the first neighbour has theirs in.

        `before`: that neighbour's. What is copied is in the group it was in.
        """
        optimizers = dict[str, Any]()
        for key, kept in before["optimizers"].items():
            groups = [
                {
                    **g,
                    "params": [
                        name
                        for name, (_, parts) in self._made.items()
                        if parts[0].name in g["params"] or self._groups.get(name) == number
                    ],
                }
                for number, g in enumerate(kept["groups"])
            ]
            optimizers[key] = {**kept, "groups": groups, "other": {}}
        return {**before, "optimizers": optimizers}

    def __str__(self) -> str:
        return " and ".join(map(str, self._sides)) + ", in place of what lay beside"


class _Part(NamedTuple):
    """What a tensor is made of, or a part of it."""

    side: int
    name: str
    weight: float


def _partner(
    pattern: str, number: int, kind: Kind, theirs: Mapping[str, TensorBox], first: int, end: int
) -> str | None:
    """The tensor of a neighbour that a lost layer's is made of."""
    alike = {
        found[1]: name
        for name, box in theirs.items()
        if (found := layer_of(name))
        and found[0] == pattern
        and (box.dtype, tuple(box.global_shape)) == (kind[0], tuple(kind[1]))
    }
    if not alike:
        return None
    return alike[sorted(alike)[(number - first) * len(alike) // (end - first)]]
