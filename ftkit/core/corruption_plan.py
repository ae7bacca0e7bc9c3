"""CorruptionPlan: wrong numbers on purpose, as data. What a drill falsifies, where and when.

A rank finds its own in the environment and does them to itself, as with `fault_plan`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

from ftkit.core.errors import UsageError

VARIABLE = "FTKIT_DRILL_NUMBERS"


class Target(StrEnum):
    """What is falsified."""

    WEIGHT = "weight"
    """A parameter, before the forward pass."""
    OPTIMIZER = "optimizer"
    """A tensor of the optimizer's state, before the forward pass."""
    GRADIENT = "gradient"
    """A gradient of one slot, before it is summed with any other."""
    LOSS = "loss"
    """The loss of one slot, and with it the slot's gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedCorruption:
    """Wrong numbers of one rank."""

    target: Target
    seat: int
    member: int
    """The incarnation meant, so that the process that replaces it is spared."""
    step: int
    """It strikes at this step, or at the first one after it."""
    place: float = 0.0
    """Which tensor, or element of a bucket, from 0 to below 1."""
    bucket: int = 0
    """For `GRADIENT`: in which bucket, or the last where there are fewer."""
    bit: int | None = None
    """The bit that is flipped, of a value's lowest 32 or fewer; None: the value becomes NaN."""
    factor: float = 1.0
    """For `LOSS`: what it is multiplied with."""
    attempts: int = 1
    """It strikes in so many attempts at the step: one is a stroke of bad luck, all of them are
    what wrong data would do."""
    steps: int = 1
    """In how many steps, one after another."""

    @property
    def name(self) -> str:
        """What a drill calls it."""
        if self.target is Target.LOSS:
            return "loss-spike"
        return "nan" if self.bit is None else "bit-flip"


def to_environ(plan: Iterable[PlannedCorruption]) -> dict[str, str]:
    """The variable that tells ranks of it."""
    told = [asdict(one) for one in plan]
    return {VARIABLE: json.dumps(told)} if told else {}


def from_environ(environ: Mapping[str, str], *, member: int) -> list[PlannedCorruption]:
    """What is planned for `member`. Raises UsageError when it cannot be read."""
    text = environ.get(VARIABLE)
    if not text:
        return []
    try:
        plan = [PlannedCorruption(**{**f, "target": Target(f["target"])}) for f in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{VARIABLE} holds no corruption: {error}") from error
    return [one for one in plan if one.member == member]
