"""Gate: who says when bytes that are not training's may travel; `core.governor`, behind a port."""

import time
from collections.abc import Callable
from typing import Protocol

from ftkit.core.governor import TOUCHES, Grant, Pause

#: A piece of what is paced: of a shard, or of a file.
GATED_BYTES = 1 << 20


class Gate(Protocol):
    """Asked before bytes travel, told what became of them. Any thread."""

    def ask(self, nbytes: int, *, whole: bool = True, touches: float = TOUCHES) -> Grant | Pause:
        """Whether so many bytes may go; granted, they count as gone.

        All of them or none; but as many of them as there is room for, without `whole`.
        `touches`: how often each is read or written in memory on its way.
        """

    def withdraw(self) -> None:
        """This thread, which was told to pause, does not ask again."""

    def arrived(self, grant: Grant, seconds: float) -> None:
        """They are there, so many seconds after they were let go."""

    def given_up(self, grant: Grant) -> None:
        """Nobody will say when they arrive: sending failed, or nothing acknowledges them."""


class OpenGate:
    """Lets everything through at once."""

    def ask(self, nbytes: int, *, whole: bool = True, touches: float = TOUCHES) -> Grant | Pause:
        return Grant(nbytes)

    def withdraw(self) -> None:
        pass

    def arrived(self, grant: Grant, seconds: float) -> None:
        pass

    def given_up(self, grant: Grant) -> None:
        pass


def go_through(
    gate: Gate,
    nbytes: int,
    *,
    touches: float = TOUCHES,
    check: Callable[[], None] = lambda: None,
    rest: Callable[[float], None] = time.sleep,
) -> Grant:
    """Block until `gate` lets so many bytes through; `check`, called meanwhile, may raise.

    Returns:
      What to tell the gate by, once they have arrived or were given up.
    """
    if not nbytes:
        return Grant(0)
    try:
        while isinstance(decision := gate.ask(nbytes, touches=touches), Pause):
            check()
            rest(decision.seconds)
    except BaseException:
        gate.withdraw()
        raise
    return decision
