"""Norms: a rank whose gradients have become larger or smaller, against its peers' of the same step. Pure.

What is wrong in a gradient before it is summed is wrong on all ranks afterwards, and neither a vote
on the sum nor a comparison of replicas finds it. A value that is not finite, or a hundred times
too large, is seen in its step (`recovery.vote`). This is for what is less: a core that computes
everything a little wrong, or drops a part of it, step after step.

The logarithm of each rank's norm, taken before the sum, less the median of its peers': what an
optimizer, a schedule or the course of the training does to gradients, it does to all of a role. From that
the rank's own usual level is taken, for shards of one gradient are of different size for good, and so is
what different data give. What is left, as the mean of every eight steps, for neighbouring ones read
much the same data, adds up (`sums`), upwards and downwards, on a budget of false alarms. Data that only one rank reads do the same as an error of its arithmetic, so
this is a suspicion, which has its node checked; nobody is removed for it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ftkit.core.ids import MemberId
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.aligned import StepOf
from ftkit.detection.cusum import median, spread
from ftkit.detection.peers import PEERS_MIN, log_or_none, residuals
from ftkit.detection.signals import StepSeen
from ftkit.detection.sums import Sums

#: The smallest change that is to be found: half as large again, or two thirds of it.
EFFECT: Final = 0.5
#: Steps that are judged as one, by the mean of their logarithms.
BLOCK_STEPS: Final = 8
#: Blocks that make a rank's usual level, at least and at most; before it is known nothing is said.
_BLOCKS_MIN: Final = 8
_BLOCKS_MAX: Final = 128
#: It is known when its standard error is a tenth of the effect: what it is off by would add up.
_LEVEL_ERROR: Final = 0.1 * math.log1p(EFFECT)
#: Of a median, against a mean of normal values.
_MEDIAN_ERROR: Final = 1.25
#: How slowly that follows a rank which is no suspect.
_DRIFT: Final = 1 / 32
#: Of the effect, what the estimate must reach.
_EFFECT_SHARE: Final = 0.8
#: Of three ranks one that is far off moves the others' residuals by half of it, the other way.
_AHEAD: Final = 1.5
#: Blocks that an estimate is made from.
_RECENT: Final = 3
#: A finding stands until the evidence has fallen to this share.
_HOLDS: Final = 0.5
#: Of the job's budget of false alarms, each direction takes this.
_HALF: Final = 0.5


@dataclass(slots=True)
class _Usual:
    """One rank's level, for one role and one number of slots."""

    key: object
    block: list[float] = field(default_factory=list)
    """The steps of the block that is not full yet."""
    first: list[float] = field(default_factory=list)
    level: float | None = None

    def add(self, value: float) -> float | None:
        """Add a step; the mean of its block once that is full."""
        self.block.append(value)
        if len(self.block) < BLOCK_STEPS:
            return None
        mean = sum(self.block) / len(self.block)
        self.block.clear()
        return mean

    def learn(self, mean: float) -> None:
        """Add one of the blocks that make the level. Of what is too noisy it never becomes known."""
        if len(self.first) >= _BLOCKS_MAX:
            return
        self.first.append(mean)
        count = len(self.first)
        error = _MEDIAN_ERROR * spread(self.first) / math.sqrt(count)
        if count >= _BLOCKS_MIN and error <= _LEVEL_ERROR:
            self.level = median(self.first)


@dataclass(frozen=True, slots=True)
class _Finding:
    seen: StepSeen
    factor: float
    since: float
    others: int


class Norms:
    """Judges finished steps. Owned by one thread."""

    def __init__(self, *, alarms_per_day: float) -> None:
        """Cause at most so many false alarms a day, whatever the job's size."""
        self._budget = alarms_per_day
        self._ways = {+1: Sums(effect=EFFECT), -1: Sums(effect=EFFECT)}
        self._usual: dict[MemberId, _Usual] = {}
        self._standing: dict[MemberId, _Finding] = {}

    def step(self, step: StepOf, *, steps_a_day: float, at: float) -> None:
        """Take in one step.

        Args:
          step: what its members say; who measured no norm, or one that is not finite, is left out.
          steps_a_day: rank-steps that the whole job plays in a day.
          at: when it ended.
        """
        groups: dict[object, dict[MemberId, float]] = {}
        for member, one in step.items():
            norm = log_or_none(one.grad_norm or 0.0)
            if norm is not None:
                groups.setdefault((one.role, one.slots), {})[member] = norm
        changes: dict[MemberId, float] = {}
        for key, group in groups.items():
            if len(group) >= PEERS_MIN:
                changes |= self._changes(key, residuals(group))
        between = steps_a_day / BLOCK_STEPS / (_HALF * self._budget)
        for member in list(self._standing):
            if member in changes and self._share(member) < _HOLDS:
                del self._standing[member]
        for way, sums in self._ways.items():
            signed = {m: way * change for m, change in changes.items()}
            for member in sums.push(signed, at=at, steps_between=between):
                others = [m for m in changes if m != member and step[m].role == step[member].role]
                if (factor := self._ahead(member, way, others)) is not None:
                    since = sums.cusum(member).since
                    self._standing[member] = _Finding(step[member], factor, since, len(others))

    def tick(self) -> list[Verdict]:
        """What stands as of the last step."""
        return [self._verdict(member, found) for member, found in self._standing.items()]

    def forget(self, keep: frozenset[MemberId]) -> None:
        """Drop all but these members."""
        for sums in self._ways.values():
            sums.forget(keep)
        self._usual = {m: usual for m, usual in self._usual.items() if m in keep}
        self._standing = {m: found for m, found in self._standing.items() if m in keep}

    def _changes(self, key: object, group: Mapping[MemberId, float]) -> dict[MemberId, float]:
        """By how much each that has a level, and whose block is full, is off it."""
        found: dict[MemberId, float] = {}
        for member, value in group.items():
            usual = self._usual.get(member)
            if usual is None or usual.key != key:
                # Of another number of slots the mean is of another size.
                usual = self._usual[member] = _Usual(key)
            mean = usual.add(value)
            if mean is None:
                continue
            if usual.level is None:
                usual.learn(mean)
                continue
            found[member] = mean - usual.level
            if self._share(member) == 0.0:
                usual.level += _DRIFT * max(-EFFECT, min(EFFECT, found[member]))
        return found

    def _share(self, member: MemberId) -> float:
        return max(sums.share(member) for sums in self._ways.values())

    def _ahead(self, member: MemberId, way: int, others: list[MemberId]) -> float | None:
        """The factor it is off by, if that is enough, and nobody else is off by nearly as much."""
        sums = self._ways[way]
        mine = sums.level(member, _RECENT)
        levels = [abs(v) for m in others if (v := sums.level(m, _RECENT)) is not None]
        if mine is None or not levels or mine < _EFFECT_SHARE * math.log1p(EFFECT):
            return None
        return math.exp(way * mine) if mine >= _AHEAD * max(levels) else None

    def _verdict(self, member: MemberId, found: _Finding) -> Verdict:
        seat = found.seen.seat
        return Verdict(
            fault=Fault.SDC,
            member=member,
            seat=seat,
            reason=(
                f"seat {seat} (member {member}) has added gradients of {found.factor:.2f} times the norm "
                f"that it used to, beside {found.others} members of its role which did not change: "
                "its arithmetic, or the data that it alone reads"
            ),
            since_s=found.since,
            evidence={
                "kind": "gradient-norm",
                "factor": round(found.factor, 3),
                "others": found.others,
                "step": int(found.seen.step),
                "role": found.seen.role,
                "slots": found.seen.slots,
                "norm": found.seen.grad_norm,
            },
            confidence=0.5,
            suspected=True,
        )
