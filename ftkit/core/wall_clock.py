"""The wall clock: for what people read, and for finding out whose is off. Nothing is judged by it."""

import time
from collections.abc import Callable, Mapping

from ftkit.core.errors import UsageError

#: For a drill: NODE:SECONDS by which a node's clock is ahead.
VARIABLE = "FTKIT_DRILL_CLOCK"


def wall_clock(environ: Mapping[str, str], *, node: int) -> Callable[[], float]:
    """Unix seconds as `node` sees them. UsageError when a drill's offset cannot be read."""
    text = environ.get(VARIABLE)
    if not text:
        return time.time
    try:
        whose, by = text.split(":")
        ahead_s = float(by) if int(whose) == node else 0.0
    except ValueError as error:
        raise UsageError(f"{VARIABLE} is {text!r}, not NODE:SECONDS") from error
    return lambda: time.time() + ahead_s
