"""MeanStage: a lost pipeline stage as a source of boxes, each the mean of its neighbours' (CheckFree).

arXiv 2506.15461: each neighbour's weights count by the squared norm of its last gradient. The paper's
stages are all alike. Ours are runs of numbered layers, and layer p of a lost stage of n is made of layer
p of the stage before and of the stage behind; of layers as they would be, were those stages as long
(`p * theirs // n`), where they are not. Only layers whose tensors have its shapes count. The
optimizer's moments are not averaged: they begin anew.
"""

from collections.abc import Iterable, Mapping
from typing import Any

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


def layers_in(names: Iterable[str]) -> list[int]:
    """The numbers of the layers that tensors with these names are of, in order; pure."""
    return sorted({found[1] for name in names if (found := layer_of(name))})


class MeanStage:
    """What the two neighbours of a lost stage make of it. Fits `BoxSource`; one thread's."""

    threads = 1

    def __init__(
        self,
        before: SnapshotSource,
        behind: SnapshotSource,
        wanted: Mapping[str, Kind],
        *,
        norms: tuple[float | None, float | None],
        stage: int,
    ) -> None:
        """Find the layers that each tensor is made of.

        Args:
          before: the stage before the lost one, as captured.
          behind: the stage behind it.
          wanted: tensors that this rank holds; those of lost layers are offered.
          norms: of each neighbour's last gradient. Both 0, or one of them unknown: an even mean.
          stage: the lost one's number, for messages.

        Raises:
          UsageError: a tensor has no counterpart of its shape on one side.
        """
        sides = before, behind
        held = [{e.name: e.signature for e in side.head.layout.entries} for side in sides]
        numbers = [layers_in(names) for names in held]
        if not all(numbers):
            raise UsageError(
                f"stage {stage} cannot be made of its neighbours: number the layers in their names"
            )
        self.first, self.end = numbers[0][-1] + 1, numbers[1][0]
        """The lost layers: [first, end)."""
        self._sides: tuple[BoxSource, BoxSource] = sides
        left, right = norms
        self._share = share_of((0.0, 0.0) if left is None or right is None else (left, right))
        self._made: dict[str, tuple[Kind, tuple[str, str]]] = {}
        for name, kind in wanted.items():
            found = layer_of(name)
            if found is None or not self.first <= found[1] < self.end:
                continue
            partners = [_partner(*found, kind, theirs, self.first, self.end) for theirs in held]
            if None in partners:
                side = "before" if partners[0] is None else "behind"
                raise UsageError(
                    f"stage {stage} cannot be made of its neighbours: the one {side} it has nothing "
                    f"like {name} of {kind[0]} {list(kind[1])}"
                )
            self._made[name] = kind, (str(partners[0]), str(partners[1]))

    def entries(self) -> Iterable[TensorBox]:
        """Every tensor of the lost layers that this rank holds, whole."""
        for name, ((dtype, shape), _) in self._made.items():
            yield TensorBox(name, dtype, shape, Box.whole(shape))

    @torch.no_grad()
    def read(self, name: str, box: Box, out: memoryview, /) -> None:
        """See `BoxSource.read`. Integers are the stage's before."""
        (dtype, _), partners = self._made[name]
        kind: torch.dtype = getattr(torch, dtype)
        read = []
        for side, partner in zip(self._sides, partners, strict=True):
            host = bytearray(len(out))
            side.read(partner, box, memoryview(host))
            read.append(torch.frombuffer(host, dtype=kind))
        one, other = read
        if kind.is_floating_point:
            # In float32 where the type is narrower: a mean in it would be rounded three times.
            wide = torch.promote_types(kind, torch.float32)
            one = (self._share * one.to(wide) + (1 - self._share) * other.to(wide)).to(kind)
        out[:] = one.contiguous().view(torch.uint8).numpy().data

    def small(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """Small state of the lost stage: its parameters, in the groups that the stage before has theirs in."""
        optimizers = dict[str, Any]()
        for key, kept in before["optimizers"].items():
            groups = [
                {
                    **g,
                    "params": [n for n, (_, (one, _)) in self._made.items() if one in g["params"]],
                }
                for g in kept["groups"]
            ]
            optimizers[key] = {**kept, "groups": groups, "other": {}}
        return {**before, "optimizers": optimizers}

    def __str__(self) -> str:
        return f"the mean of {self._sides[0]} and {self._sides[1]}"


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
