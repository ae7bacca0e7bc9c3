"""TransferWatch: a suspicion that collectives carry less than they did, from steps alone. Pure.

In a collective the last to arrive waits for nothing but the transfer itself, so the least wait
of all members is the transfer time of a step, without comparing any clocks. It is suspect when
for several steps in a row it is twice what it was, and by more than the scheduler's noise. What
it is that carries less, pair tests have to say (`inquiry`).
"""

from collections import deque
from statistics import median

from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.paths import FLOOR_S
from ftkit.detection.signals import StepSeen

#: Steps that make a history, and the first of a world, which warm connections up.
_KEPT, _HISTORY_MIN, _EXCLUDED = 32, 5, 2
#: Slow steps in a row that make a suspicion, and how much slower they are.
_IN_A_ROW, _TIMES = 3, 2.0
#: Steps of which not all members have told yet.
_OPEN = 64


class TransferWatch:
    """Told what is seen; asked whether transfers are slow. Owned by one thread."""

    def __init__(self) -> None:
        self._generation = self._size = -1
        #: step -> members that told, their least wait
        self._open: dict[int, tuple[int, float]] = {}
        self._done = 0
        self._history: deque[float] = deque(maxlen=_KEPT)
        self._slow: deque[float] = deque(maxlen=_IN_A_ROW)

    @property
    def suspicion(self) -> str:
        """What is suspect, in words; "" while nothing is."""
        if len(self._slow) < _IN_A_ROW:
            return ""
        return (
            f"the last {_IN_A_ROW} steps each waited {1e3 * min(self._slow):.0f} ms or more for "
            f"what collectives carry, {1e3 * median(self._history):.0f} ms before, though all "
            "members were there"
        )

    @property
    def times(self) -> float:
        """How many times slower than usual; 0 while nothing is suspect."""
        return min(self._slow) / max(median(self._history), 1e-6) if self.suspicion else 0.0

    def ingest(self, observation: Observation) -> None:
        """Take in what was seen."""
        match observation:
            case WorldChanged(world=world):
                self._generation, self._size = world.generation, world.size
                self._open.clear()
                self._slow.clear()
                self._history.clear()
                self._done = 0
            case StepSeen() if observation.generation == self._generation:
                told, least = self._open.pop(observation.step, (0, float("inf")))
                told, least = told + 1, min(least, observation.waited_s)
                if told < self._size:
                    self._open[observation.step] = told, least
                    if len(self._open) > _OPEN:
                        del self._open[min(self._open)]
                else:
                    self._finished(least)
            case _:
                pass

    def forgive(self) -> None:
        """It was probed, and the paths are healthy: what was slow is a little more usual now."""
        self._history.extend(self._slow)
        self._slow.clear()

    def _finished(self, transfer_s: float) -> None:
        self._done += 1
        if self._done <= _EXCLUDED:
            return
        usual = median(self._history) if len(self._history) >= _HISTORY_MIN else None
        if usual is not None and transfer_s > max(_TIMES * usual, usual + FLOOR_S):
            self._slow.append(transfer_s)
        else:
            self._slow.clear()
            self._history.append(transfer_s)
