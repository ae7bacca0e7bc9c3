"""TrafficGate: an agent's governor. It sees training's transfers on the node's status board.

Parity and checkpoints are sent by agents, training's bytes by ranks: what an agent knows of them
is what ranks leave in shared memory about each collective.
"""

import logging
import threading
from collections.abc import Callable

from ftkit.core.clock import Clock, MonotonicClock
from ftkit.core.governor import TOUCHES, Governor, Grant, Pause, TrafficLimits
from ftkit.core.idle_windows import IdleWindows
from ftkit.core.trace import Trace
from ftkit.launch.arenas import Arenas

logger = logging.getLogger(__name__)

#: Between two looks at the rings of collectives: what they say changes with the model, not within.
RELEARN_S = 0.25

#: At least between two looks of who waits for training's transfers to end. A look takes some 50 us.
LOOK_S = 0.001

#: Who finds no window for so long is news, once a minute.
SAY_AFTER_S, SAY_EVERY_S = 2.0, 60.0


class TrafficGate:
    """A `checkpoint.gate.Gate`. Any thread may ask; they share one governor."""

    def __init__(
        self,
        arenas: Arenas,
        limits: TrafficLimits,
        tell: Callable[..., None] | Trace,
        *,
        clock: Clock | None = None,
    ) -> None:
        """Watch a node's board.

        Args:
          arenas: whose board it is.
          limits: what may be taken of training's time.
          tell: told ("traffic-stretched") when what is to be sent does not fit.
          clock: that of the board's times.
        """
        self._arenas = arenas
        self._tell = tell.event if isinstance(tell, Trace) else tell
        self._clock = clock or MonotonicClock()
        self._windows = IdleWindows()
        self._lock = threading.Lock()
        # ---- under the lock ----
        now = self._clock.now()
        self._governor = Governor(limits, self._windows, now, look_s=LOOK_S)
        self._relearn_at = now
        self._open = True
        self._waiting: dict[int, float] = {}
        self._say_at = now

    def set_open(self, open_: bool) -> None:
        """Whether everything goes through: while the job is repaired nothing is in the way."""
        with self._lock:
            self._open = open_
            self._waiting.clear()

    def ask(self, nbytes: int, *, whole: bool = True, touches: float = TOUCHES) -> Grant | Pause:
        """As `Gate.ask`."""
        with self._lock:
            if self._open:
                return Grant(nbytes)
            now = self._clock.now()
            if now >= self._relearn_at:
                self._relearn_at = now + RELEARN_S
                transfers, keep_after = self._arenas.transfers(now)
                self._windows.relearn(transfers, keep_after=keep_after)
            busy, since = self._arenas.transferring(now)
            self._windows.look(busy=busy, since=since)
            decision = self._governor.decide(now, nbytes, whole=whole, touches=touches)
            me = threading.get_ident()
            if isinstance(decision, Grant) and not decision.intrudes:
                self._waiting.pop(me, None)
                return decision
            # Small pieces go one by one within the slow-down that is allowed: that is waiting, too.
            waited = now - self._waiting.setdefault(me, now)
            if waited > SAY_AFTER_S and now >= self._say_at:
                self._say_at = now + SAY_EVERY_S
                said = (
                    decision.reason if isinstance(decision, Pause) else "no window is long enough"
                )
                self._say(nbytes, touches, said)
            return decision

    def withdraw(self) -> None:
        """As `Gate.withdraw`."""
        with self._lock:
            self._waiting.pop(threading.get_ident(), None)

    def arrived(self, grant: Grant, seconds: float) -> None:
        """As `Gate.arrived`."""
        with self._lock:
            self._governor.arrived(grant, seconds=seconds)

    def given_up(self, grant: Grant) -> None:
        """As `Gate.given_up`."""
        with self._lock:
            self._governor.given_up(grant)

    def _say(self, nbytes: int, touches: float, reason: str) -> None:
        forecast = self._governor.forecast(nbytes, within_s=SAY_AFTER_S, touches=touches)
        logger.info("parity and checkpoints wait for idle moments: %s (%s)", forecast, reason)
        self._tell(
            "traffic-stretched",
            bytes=nbytes,
            seconds=forecast.seconds,
            idle_share=round(self._windows.idle_share(), 4),
            rate=self._governor.rate,
            reason=reason,
        )
