"""RecutTrigger: whether the stages of a pipeline should be cut anew while it trains. Pure.

With every vote all ranks tell what their layers take, so all hear the same figures and, by the same
rules, come to the same answer at the same step: nobody has to ask anybody. A cut is *looked at* every
`window` votes, by the median of each layer over them. It is proposed when two looks in a row find it

* faster in its slowest stage by `gain_min` at least, and
* worth it: what it saves in the steps that are left is `pays` times what the switch costs.

A layer's time is taken to be the layer's, wherever it runs. Of a rank that is slow that is wrong,
and the next look corrects it: its layers are quicker where they went, and more of them follow. A cut
that did not keep its promise makes the next one harder to come by (`gain_min` doubles), so layers do
not go to and fro. Looks that find nothing become rarer: one costs stages times layers squared.
"""

import statistics
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ftkit.recovery.recut import Layer, Stage, holder, recut, slowest

#: Looks that find nothing are at most so many windows apart.
RARELY = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Caution:
    """How sure one has to be."""

    settle: int = 8
    """Votes after a new cut that are not looked at: the first passes of a layer take longer."""
    window: int = 8
    """Votes whose median is looked at."""
    gain_min: float = 0.1
    """The part of the slowest stage's time that must be saved."""
    pays: float = 2.0
    """How many times its cost a switch must save in the steps that are left."""

    def __post_init__(self) -> None:
        if self.window < 1 or self.settle < 0 or not 0 < self.gain_min < 1 or self.pays < 0:
            raise ValueError(f"a cut is not chosen by such rules: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Another cut, and what it is expected to bring."""

    id: int
    """Tells it from all others of its world; not 0, and of 63 bits at most."""
    step: int
    """The step at whose vote it was found."""
    before: tuple[int, ...]
    """The bounds in force: stage s holds layers before[s] to before[s + 1]."""
    bounds: tuple[int, ...]
    slowest_s: float
    """A micro-batch in the slowest stage, as it is."""
    expected_s: float
    """And as it would be."""

    @property
    def moves(self) -> tuple["Move", ...]:
        """Which layers go from which stage to which."""
        found: dict[tuple[int, int], list[int]] = {}
        for layer in range(self.bounds[-1]):
            path = holder(self.before, layer), holder(self.bounds, layer)
            if path[0] != path[1]:
                found.setdefault(path, []).append(layer)
        return tuple(
            Move(source=a, target=b, layers=tuple(layers))
            for (a, b), layers in sorted(found.items())
        )

    @property
    def reason(self) -> str:
        return (
            f"the slowest stage takes {self.slowest_s * 1e3:.3g} ms a micro-batch, and would take "
            f"{self.expected_s * 1e3:.3g}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Layers that go from one rank to another."""

    source: int
    target: int
    layers: tuple[int, ...]


class RecutTrigger:
    """Of one rank; all ranks of a world feed theirs alike, from its first vote on."""

    def __init__(self, *, slots: int, caution: Caution | None = None) -> None:
        """No cut is in force yet.

        Args:
          slots: micro-batches of a step.
          caution: the same on all ranks.
        """
        self._slots = slots
        self._caution = caution or Caution()
        self._bounds: tuple[int, ...] = ()
        self._gain_min = self._caution.gain_min
        self._promised: float | None = None
        """What the slowest stage took before the cut in force was proposed."""
        self._votes = 0
        self._heard: list[Sequence[Mapping[int, float]]] = []
        self._candidate: tuple[int, ...] | None = None
        """What the last look found."""
        self._skip = self._rest = 0
        """Windows to leave out now, and after the next look that finds nothing."""
        self._dropped = 0
        """Migrations in a row that came to nothing."""

    def begin(self, bounds: Sequence[int], *, recut: bool) -> None:
        """This cut is in force from here on: of a new world, or (`recut`) of the same one."""
        self._dropped = 0
        if not recut:
            self._gain_min, self._promised = self._caution.gain_min, None
        self._bounds = tuple(bounds)
        self._reset()

    def abandoned(self) -> None:
        """What was proposed did not come about: the cut is what it was, for longer each time."""
        self._promised = None
        self._reset()
        self._dropped += 1
        self._skip = min(2**self._dropped, RARELY)

    def hear(
        self,
        step: int,
        costs: Sequence[Mapping[int, float]],
        *,
        remaining: int,
        switch_s: float,
        busy: bool,
    ) -> Proposal | None:
        """A vote passed; whether to cut anew.

        Args:
          step: voted on.
          costs: by rank, the seconds a micro-batch takes in each layer it holds, forward and back.
          remaining: steps that are left.
          switch_s: what a switch costs, as all ranks know it.
          busy: the world is about to change: nothing is proposed, and looking begins anew.
        """
        if busy or len(costs) != len(self._bounds) - 1 or len(costs) < 2:
            self._reset()
            return None
        self._votes += 1
        if self._votes <= self._caution.settle:
            return None
        self._heard.append(costs)
        if len(self._heard) < self._caution.window:
            return None
        heard, self._heard = self._heard, []
        if self._skip:
            self._skip -= 1
            return None
        seconds = self._medians(heard)
        if seconds is None:
            return None
        return self._look(step, seconds, remaining, switch_s)

    def _look(
        self, step: int, seconds: Sequence[float], remaining: int, switch_s: float
    ) -> Proposal | None:
        now = slowest(seconds, self._bounds)
        if self._promised is not None:
            if now > self._promised * (1 - self._gain_min / 2):
                self._gain_min = min(2 * self._gain_min, 0.9)
            self._promised = None
        bounds = self._candidate or self._best(seconds, now)
        then = slowest(seconds, bounds) if bounds else now
        saved_s = self._slots * (now - then) * remaining
        good = now - then >= self._gain_min * now and saved_s > self._caution.pays * switch_s
        if not bounds or not good:
            self._candidate = None
            self._skip = self._rest
            self._rest = min(2 * self._rest + 1, RARELY)
            return None
        if self._candidate is None:
            self._candidate = bounds
            return None
        self._promised = now
        self._candidate = None
        return Proposal(
            id=(step << 32 | zlib.crc32(repr(bounds).encode())) & ((1 << 63) - 1),
            step=step,
            before=self._bounds,
            bounds=bounds,
            slowest_s=now,
            expected_s=then,
        )

    def _best(self, seconds: Sequence[float], now: float) -> tuple[int, ...] | None:
        """The best cut of all; None where none can save enough, whatever it is."""
        stages = len(self._bounds) - 1
        if max(max(seconds), sum(seconds) / stages) > now * (1 - self._gain_min):
            return None
        layers = [Layer(seconds=s, state_bytes=1) for s in seconds]
        return recut(layers, [Stage()] * stages, now=self._bounds).bounds

    def _medians(self, heard: Sequence[Sequence[Mapping[int, float]]]) -> list[float] | None:
        """Of each layer, on the rank that holds it; None where one was not measured each time."""
        found = list[float]()
        for layer in range(self._bounds[-1]):
            rank = holder(self._bounds, layer)
            told = [costs[rank].get(layer, 0.0) for costs in heard]
            if not all(0 < s < float("inf") for s in told):
                return None
            found.append(statistics.median(told))
        return found

    def _reset(self) -> None:
        self._votes = 0
        self._heard, self._candidate = [], None
        self._skip = self._rest = 0
