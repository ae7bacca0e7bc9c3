"""PathWatch: a suspicion that a path has become slow, from what training itself sends. Pure.

Each rank tells how fast its large messages go to each of its neighbours (`PathsSeen`). A path is
suspect when twice in a row it was under half of its own median, or, as long as it has no
history, under a third of the median of all paths. A suspicion is worth a probe and no more: a
sender that is starved looks the same from here.
"""

from collections import deque
from statistics import median

from ftkit.core.ids import Seat
from ftkit.detection.observations import Observation, WorldChanged
from ftkit.detection.paths import OF_HISTORY, OF_MEDIAN, Pair
from ftkit.detection.signals import PathsSeen

#: Looks kept of a path, and how many make a history.
_LOOKS, _HISTORY_MIN = 32, 5
#: Slow looks in a row: one may be a pause.
_IN_A_ROW = 2
#: Paths that are compared with each other while they have no history.
_PEERS_MIN = 3
_SAMPLE = 64


class PathWatch:
    """Told what is seen; asked which paths are suspect. Owned by one thread."""

    def __init__(self) -> None:
        self._looks: dict[Pair, deque[float]] = {}
        self._slow: dict[Pair, int] = {}
        self._times: dict[Pair, float] = {}
        #: A sample of all paths: comparing each with every other one would be quadratic.
        self._lately: deque[tuple[Pair, float]] = deque(maxlen=_SAMPLE)
        self._generation = -1

    @property
    def in_use(self) -> frozenset[Pair]:
        """Paths that carried large messages in this generation: (sender, receiver) seats."""
        return frozenset(self._looks)

    @property
    def suspects(self) -> tuple[Pair, ...]:
        """Paths that are slow now, in order."""
        return tuple(sorted(p for p, count in self._slow.items() if count >= _IN_A_ROW))

    @property
    def times(self) -> float:
        """How many times slower than usual the worst of them is; 0 while nothing is suspect."""
        return max((self._times[p] for p in self.suspects), default=0.0)

    def ingest(self, observation: Observation) -> None:
        """Take in what was seen."""
        match observation:
            case WorldChanged(world=world):
                self._generation = world.generation
                self._looks.clear()
                self._slow.clear()
                self._lately.clear()
            case PathsSeen() if observation.generation == self._generation:
                for receiver, rate in observation.rates.items():
                    self._look((observation.seat, Seat(int(receiver))), float(rate))
            case _:
                pass

    def forgive(self) -> None:
        """They were probed, and are healthy: what they did is a little more usual now."""
        for path in self.suspects:
            usual = median(self._looks[path]) if self._looks[path] else 0.0
            self._looks[path].append(usual / self._times[path])
        self._slow.clear()

    def _look(self, path: Pair, rate: float) -> None:
        if not rate > 0:
            return
        looks = self._looks.setdefault(path, deque(maxlen=_LOOKS))
        if len(looks) >= _HISTORY_MIN:
            usual, limit = median(looks), OF_HISTORY
        else:
            others = [known for p, known in self._lately if p != path]
            usual, limit = (median(others) if len(others) >= _PEERS_MIN else 0.0), OF_MEDIAN
        slow = rate < limit * usual
        self._slow[path] = self._slow.get(path, 0) + 1 if slow else 0
        self._times[path] = usual / rate
        if not slow:
            looks.append(rate)  # what is slow would become its own excuse
        self._lately.append((path, rate))
