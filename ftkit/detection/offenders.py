"""Offenders: which nodes fail far more often than the others, from their history. Pure.

A node's rate of faults has a Gamma prior, whose mean is the present rate of all other nodes and
whose spread is estimated from their counts (method of moments: where faults come in clusters, one
fault says more). Faults are forgotten with a half-life, and so is the time in which none came. A
node is to be left out while P(rate > `factor` times theirs) is above `certainty`.

A conjugate model after the usual empirical Bayes (Robbins 1956); lemon-node detection in "Revisiting
reliability" (HPCA 2025) learns weights of signals instead, from labels which a small fleet has not.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OffenderConfig:
    """When a node is an offender."""

    half_life_s: float = 30 * DAY_S
    factor: float = 10.0
    """So many times the fleet's rate."""
    certainty: float = 0.95
    faults_min: int = 3
    """Fewer never make an offender: two may meet by chance, and a young fleet's rate is a guess."""

    def __post_init__(self) -> None:
        if not (self.half_life_s > 0 and self.factor >= 1 and 0 < self.certainty < 1):
            raise ValueError(f"no rule to judge offenders by: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One node, at one moment."""

    node: str
    faults: int
    """All of them."""
    recent: float
    """Faults, each halved with every half-life since."""
    rate_per_day: float
    """Mean of the posterior."""
    fleet_per_day: float
    """Of the other nodes."""
    certainty: float
    """P(rate > factor times the others')."""
    offender: bool

    def to_json(self) -> dict[str, object]:
        return {
            "node": self.node,
            "faults": self.faults,
            "recent": round(self.recent, 4),
            "rate_per_day": self.rate_per_day,
            "fleet_per_day": self.fleet_per_day,
            "certainty": round(self.certainty, 6),
            "offender": self.offender,
        }


#: Shape of the prior while there are too few faults to estimate it: a tenth of the nodes has
#: most of the faults. It is never taken for larger: a fleet whose nodes were alike so far may still
#: get one that is not.
SHAPE = 0.1
SHAPE_MIN = 0.02

#: Recent faults of the fleet from which on its spread is estimated.
ESTIMATE_FROM = 20.0


@dataclass(slots=True)
class _Node:
    since: float
    faults: int = 0
    recent: float = 0.0
    at: float = 0.0


@dataclass(slots=True)
class Offenders:
    """The history of a fleet, taken in in order of time. Times in seconds, of any one clock."""

    config: OffenderConfig = field(default_factory=OffenderConfig)
    _nodes: dict[str, _Node] = field(default_factory=dict)
    _at: float = float("-inf")
    _sum: float = 0.0
    """Of the nodes' recent faults, at `_at`."""
    _squares: float = 0.0
    """Of their squares."""
    _young: float = 0.0
    """Sum over nodes of what is left of a fault of the moment the node came, at `_at`."""

    def seen(self, node: str, at: float) -> None:
        """A node is part of the fleet from `at` on. It stays so, also when told again."""
        if node in self._nodes:
            return
        self._advance(at)
        self._nodes[node] = _Node(since=at, at=at)
        self._young += self._left(self._at - at)

    def fault(self, node: str, at: float) -> None:
        """A node has failed. Not before what was taken in last, or as if at that time."""
        self.seen(node, at)
        self._advance(at)
        one = self._nodes[node]
        recent = one.recent * self._left(self._at - one.at)
        self._sum += 1
        self._squares += 2 * recent + 1
        one.faults, one.recent, one.at = one.faults + 1, recent + 1, self._at

    def score(self, node: str, now: float) -> Score:
        """What is to be thought of a node. KeyError for one that was never seen."""
        self._advance(now)
        one = self._nodes[node]
        recent = one.recent * self._left(self._at - one.at)
        days = self._days(self._at - one.since)
        others_days = self._whole_days * (len(self._nodes) - self._young) - days
        # Half a fault more: nodes that have had none are not nodes that cannot have one.
        rate = (self._sum - recent + 0.5) / max(others_days, days, 1e-9)
        shape = self._shape(without=recent)
        a, b = shape + recent, shape / rate + days
        certainty = upper_gamma(a, b * self.config.factor * rate)
        return Score(
            node=node,
            faults=one.faults,
            recent=recent,
            rate_per_day=a / b,
            fleet_per_day=rate,
            certainty=certainty,
            offender=one.faults >= self.config.faults_min and certainty > self.config.certainty,
        )

    def scores(self, now: float) -> list[Score]:
        """Every node that has failed, the worst first."""
        found = [self.score(name, now) for name, one in self._nodes.items() if one.faults]
        return sorted(found, key=lambda s: (-s.certainty, -s.recent, s.node))

    @property
    def nodes(self) -> Mapping[str, int]:
        """Every node of the fleet, and how often it has failed."""
        return {name: one.faults for name, one in self._nodes.items()}

    def _advance(self, now: float) -> None:
        if now <= self._at:
            return
        if self._at > float("-inf"):
            left = self._left(now - self._at)
            self._sum, self._squares = self._sum * left, self._squares * left * left
            self._young *= left
        self._at = now

    def _left(self, seconds: float) -> float:
        """What is left of a fault after so long."""
        return math.exp2(-max(0.0, seconds) / self.config.half_life_s)

    def _days(self, seconds: float) -> float:
        """Time seen, forgotten at the same pace, in days."""
        return self._whole_days * (1 - self._left(seconds))

    @property
    def _whole_days(self) -> float:
        """What is remembered of an endless past, in days."""
        return self.config.half_life_s / math.log(2) / DAY_S

    def _shape(self, *, without: float) -> float:
        """Of the prior: Var(count) = mean + mean^2 / shape, if faults were not forgotten."""
        if self._sum - without < ESTIMATE_FROM:
            return SHAPE
        size = len(self._nodes) - 1
        mean = (self._sum - without) / size
        # A fault that is forgotten adds its weight to the mean and the square of it to the
        # variance: half as much, over all ages.
        spread = (self._squares - without * without) / size - mean * mean - mean / 2
        if spread <= 0:
            return SHAPE
        return min(max(mean * mean / spread, SHAPE_MIN), SHAPE)


def upper_gamma(a: float, x: float) -> float:
    """P(X > x) for X of a Gamma distribution with shape `a` and rate 1.

    By the series below a + 1 and by Lentz's continued fraction above (Numerical Recipes, 6.2).
    """
    if x <= 0:
        return 1.0
    scale = math.exp(-x + a * math.log(x) - math.lgamma(a))
    if x < a + 1:
        term = total = 1 / a
        n = a
        while abs(term) > abs(total) * 1e-15:
            n += 1
            term *= x / n
            total += term
        return max(0.0, 1 - scale * total)
    tiny = 1e-300
    b = x + 1 - a
    c, d = 1 / tiny, 1 / b
    h = d
    for i in range(1, 1000):
        an = -i * (i - a)
        b += 2
        d = 1 / (an * d + b or tiny)
        c = b + an / c or tiny
        h *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return scale * h
