"""Tuning: into how many chunks an overlapped operation is cut, from what it was measured to take.

Pure. With C seconds to compute, M to send, and o more for each message, on n ranks

    T(k) = max(C, M + f(k) C / n) + (n - 1) k o

where plain compute-then-send takes C + M, and f(k) is the part of a rank's rows in the smallest of
k chunks (`parts.graded`). Measured at first calls, C and M unoverlapped, and M once in one piece and
once in eight, which gives o; then the best k, less of them, more, and plain take turns, and what was
fastest stays: the model knows nothing of cores that computing and sending share. All ranks must cut
alike: what one measured is agreed on by the maximum over ranks, at calls that they count alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from ftkit.collectives.overlap.parts import graded

#: Beyond these, more chunks only add messages.
CHOICES = (1, 2, 3, 4, 6, 8, 12)

#: Pieces of the exchange by which the cost of a message is found.
MANY = 8

#: Overlap is kept where it gains more than this.
GAIN = 0.02
#: Halves, where they gain more than this: a few calls on a busy machine differ by less.
SPLIT_GAIN = 0.05


@dataclass(frozen=True, slots=True)
class Cut:
    """How to run one call."""

    chunks: int
    eager: bool
    """Whether chunks go as they are made."""


PLAIN = Cut(1, eager=False)

#: The first calls of a shape: one to warm up, then C and M, in one piece and in several.
_MEASURE = (PLAIN, PLAIN, Cut(MANY, eager=False), PLAIN, Cut(MANY, eager=False))
#: How often each of what is compared is tried. In turns: a machine is not always equally busy.
_TRIES = 3


def predicted(chunks: int, size: int, compute_s: float, exchange_s: float, each_s: float) -> float:
    """Seconds of one call; see the module."""
    through = exchange_s + compute_s / size * graded(1.0, size, chunks)[0]
    return max(compute_s, through) + (size - 1) * chunks * each_s


def best(size: int, compute_s: float, exchange_s: float, each_s: float) -> int:
    """The number of chunks that is predicted to be fastest."""
    return min(CHOICES, key=lambda k: predicted(k, size, compute_s, exchange_s, each_s))


class ChunkTuner:
    """Decides for one shape of one operation on one rank. Told of each call, in order."""

    def __init__(self, size: int) -> None:
        """Begin to measure, on `size` ranks."""
        self._size = size
        self._calls = 0
        self._plan: list[Cut] = list(_MEASURE)
        self._noted: list[tuple[Cut, float, float]] = []
        self._compared: list[Cut] = []
        """What is tried, once something is; plain first."""

    @property
    def cut(self) -> Cut:
        """How to run the next call."""
        return self._plan[min(self._calls, len(self._plan) - 1)]

    @property
    def settled(self) -> bool:
        """Whether nothing is measured any more."""
        return self._calls >= len(self._plan)

    def note(self, compute_s: float, total_s: float) -> list[float]:
        """How the call went.

        Args:
          compute_s: of a call that was not eager, what computing took; the rest is exchange.
          total_s: of the whole call.

        Returns:
          What ranks must agree on now, by the maximum, and hand to `agree`; mostly nothing.
        """
        if self._calls >= len(self._plan):
            return []
        self._noted.append((self.cut, compute_s, total_s - compute_s))
        self._calls += 1
        if self._calls < len(self._plan):
            return []
        noted, self._noted = self._noted, []
        if self._compared:
            return [
                min(compute + exchange for cut, compute, exchange in noted if cut == one)
                for one in self._compared
            ]
        _, *warm = noted
        return [
            min(compute for _, compute, _ in warm),
            min(exchange for cut, _, exchange in warm if cut.chunks == 1),
            min(exchange for cut, _, exchange in warm if cut.chunks == MANY),
        ]

    def agree(self, values: Sequence[float]) -> None:
        """What `note` returned, or what a slower rank did, in each place."""
        if self._compared:
            plain_s, *tried = values
            fastest = min(range(len(tried)), key=tried.__getitem__)
            gains = tried[fastest] < (1 - GAIN) * plain_s
            self._settle(self._compared[1 + fastest] if gains else PLAIN)
            return
        compute_s, exchange_s, many_s = values
        each_s = max(0.0, many_s - exchange_s) / ((MANY - 1) * max(1, self._size - 1))
        k = best(self._size, compute_s, exchange_s, each_s)
        plain_s = compute_s + exchange_s
        if predicted(k, self._size, compute_s, exchange_s, 0.0) >= (1 - GAIN) * plain_s:
            self._settle(PLAIN)  # not even if messages were free
            return
        at = CHOICES.index(k)
        # What a message costs may have hidden behind sending, or was the machine's own noise.
        counts = {
            CHOICES[max(0, at - 2)],
            CHOICES[max(0, at - 1)],
            k,
            CHOICES[min(at + 1, len(CHOICES) - 1)],
        }
        self._compared = [PLAIN, *(Cut(count, eager=True) for count in sorted(counts))]
        self._plan, self._calls = self._compared * _TRIES, 0

    def _settle(self, cut: Cut) -> None:
        self._plan, self._calls = [cut], 1


class SplitTuner:
    """Decides whether a batch is woven in two halves. Told of each call, in order, as `ChunkTuner`.

    A call takes C to compute and W to wait for what it sends. In halves, one half's sending hides
    behind the other's computing, except at both ends. Where even all of W hidden would be no gain,
    halves are not tried; otherwise both take turns. Halves are kept where both the fastest and the
    median of them are faster: the fastest alone may be one lucky call, and they are to cost nothing.
    """

    def __init__(self) -> None:
        """Begin to measure."""
        self._plan = [False] * _TRIES
        self._calls = 0
        self._noted: list[tuple[bool, float, float]] = []
        self._tries = False

    @property
    def split(self) -> bool:
        """Whether to split the next call."""
        return self._plan[min(self._calls, len(self._plan) - 1)]

    @property
    def settled(self) -> bool:
        """Whether nothing is measured any more."""
        return self._calls >= len(self._plan)

    def note(self, waited_s: float, total_s: float) -> list[float]:
        """How long the call took, and how much of that it waited; as `ChunkTuner.note`."""
        if self._calls >= len(self._plan):
            return []
        self._noted.append((self.split, waited_s, total_s))
        self._calls += 1
        if self._calls < len(self._plan):
            return []
        (_, *warm), self._noted = self._noted, []
        if self._tries:
            took = [
                [total for split, _, total in warm if split is which] for which in (False, True)
            ]
            return [*map(min, took), *map(median, took)]
        return [min(waited for _, waited, _ in warm), min(total for _, _, total in warm)]

    def agree(self, values: Sequence[float]) -> None:
        """As `ChunkTuner.agree`."""
        if self._tries:
            whole_s, halves_s, whole_median_s, halves_median_s = values
            gains = halves_s < (1 - SPLIT_GAIN) * whole_s
            gains &= halves_median_s < (1 - SPLIT_GAIN) * whole_median_s
            self._plan, self._calls = [gains], 1
            return
        waited_s, total_s = values
        if waited_s > SPLIT_GAIN * total_s:
            self._tries = True
            self._plan, self._calls = [True, *([False, True] * _TRIES)], 0
        else:
            self._plan, self._calls = [False], 1
