"""Retention: which checkpoints to keep (pure). Policies are small values, and add up."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ftkit.core.ids import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One good checkpoint, as retention sees it."""

    step: Step
    metrics: Mapping[str, float | None] = field(default_factory=dict)


class Policy(Protocol):
    """Says which of the good checkpoints it wants to keep."""

    def keep(self, found: Sequence[Kept]) -> set[Step]:
        """Steps to keep out of `found`, which ascends."""


@dataclass(frozen=True, slots=True)
class KeepLast:
    """The newest `count`."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"KeepLast({self.count}): the newest checkpoint is always kept")

    def keep(self, found: Sequence[Kept]) -> set[Step]:
        return {k.step for k in found[-self.count :]}


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Those whose step is a multiple of `interval_steps`."""

    interval_steps: int

    def __post_init__(self) -> None:
        if self.interval_steps < 1:
            raise ValueError(f"KeepEvery({self.interval_steps}): an interval is at least 1 step")

    def keep(self, found: Sequence[Kept]) -> set[Step]:
        return {k.step for k in found if k.step % self.interval_steps == 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepBest:
    """The `count` best by a metric; of equals the newer. Those without the metric are not rated."""

    metric: str
    count: int = 1
    largest: bool = False
    """Whether more is better; a loss is better when it is less."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"KeepBest(count={self.count}) would keep none")

    def keep(self, found: Sequence[Kept]) -> set[Step]:
        sign = -1 if self.largest else 1
        rated = [
            (sign * v, -k.step) for k in found if (v := k.metrics.get(self.metric)) is not None
        ]
        return {Step(-step) for _, step in sorted(rated)[: self.count]}


def to_keep(found: Iterable[Kept], policies: Iterable[Policy]) -> set[Step]:
    """The steps that some policy wants, and always the newest.

    Args:
      found: the good checkpoints, in any order.
      policies: without any, all are kept.
    """
    ordered = sorted(found, key=lambda k: k.step)
    asked = list(policies)
    if not asked:
        return {k.step for k in ordered}
    newest = {k.step for k in ordered[-1:]}
    return newest.union(*(policy.keep(ordered) for policy in asked))
