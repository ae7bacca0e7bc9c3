"""Schedule: the random moment of each interval. Pure: the seed and the wall clock decide.

Intervals are counted from the Unix epoch, so that a programme that is started again goes on in the
interval that it was stopped in: `--every 6h` begins one at 0, 6, 12 and 18 o'clock UTC.
"""

import math
import random
import re
from dataclasses import dataclass

from ftkit.core.errors import UsageError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """One interval: a drill may strike from `due` on, and before `ends`. Unix seconds."""

    number: int
    due: float
    ends: float


def interval(number: int, *, every_s: float, seed: int) -> Interval:
    """Interval `number`, with a moment that is uniform over it and depends on nothing but the seed."""
    begins = number * every_s
    part = random.Random(f"moment {seed} {number}").random()
    return Interval(number=number, due=begins + part * every_s, ends=begins + every_s)


def number_at(now: float, *, every_s: float) -> int:
    """Which interval `now` is in."""
    return math.floor(now / every_s)


def next_interval(now: float, *, every_s: float, seed: int, done: int | None = None) -> Interval:
    """The next interval whose moment is not over, and that is not `done` or before that."""
    number = number_at(now, every_s=every_s)
    if done is not None and number <= done:
        number = done + 1
    first = interval(number, every_s=every_s, seed=seed)
    # Whoever comes after the moment does not know whether others struck then.
    return first if first.due >= now else interval(number + 1, every_s=every_s, seed=seed)


def fault_of(number: int, faults: tuple[str, ...], *, seed: int) -> str:
    """What is done in an interval."""
    return random.Random(f"fault {seed} {number}").choice(faults)


def seconds_of(text: str, *, option: str) -> float:
    """A time as people write it, in seconds: 90, 90s, 15m, 6h, 1d, 1h30m.

    Raises:
      UsageError: it is no time above zero; names the `option` that it was given to.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if parts and "".join(n + u for n, u in parts) == text.strip():
        seconds = sum(float(n) * _UNITS[u] for n, u in parts)
    else:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"{option} {text!r} is no time above zero; write 90s, 15m, 6h or 1d")
    return seconds
