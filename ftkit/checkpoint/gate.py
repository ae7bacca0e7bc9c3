"""Gate: who says when bytes that are not training's may travel; `core.governor`, behind a port."""

import time
from collections.abc import Callable
from typing import Protocol


class Gate(Protocol):
    """Asked before bytes travel, told when they are there. Any thread."""

    def ask(self, nbytes: int) -> float:
        """0: so many bytes may go, and count as gone. Else seconds, after which to ask again."""

    def arrived(self, nbytes: int, seconds: float) -> None:
        """They are there, so many seconds after they were let go."""


class OpenGate:
    """Lets everything through at once."""

    def ask(self, nbytes: int) -> float:
        return 0.0

    def arrived(self, nbytes: int, seconds: float) -> None:
        pass


def go_through(
    gate: Gate,
    nbytes: int,
    *,
    check: Callable[[], None] = lambda: None,
    rest: Callable[[float], None] = time.sleep,
) -> None:
    """Block until `gate` lets so many bytes through; `check`, called meanwhile, may raise."""
    while nbytes and (seconds := gate.ask(nbytes)):
        check()
        rest(seconds)
