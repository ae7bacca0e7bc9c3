"""Slow: which members take longer for their work than members that do the same.

Two ways to tell, both on log residuals that add up over steps (`cusum`):

* against peers: the others of the same role, where there are at least two others and a majority.
  Two that are alone in their role have none; but where several such pairs are in a job (stages of
  two replicas), the slower one of the pair that differs is the odd one: nobody is too fast;
* against its own past, less what changed for everybody: for pipeline stages of one rank each,
  single pairs, and groups that are of two kinds.

Compared is work, never waiting: who waits for a slow member has done nothing more than usual. A
member is named when the evidence passes the threshold and what it shows is an outlier among its
group, not merely the last in a wide field.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ftkit.core.ids import MemberId
from ftkit.detection.cusum import STEPS_MIN, Threshold, median, spread
from ftkit.detection.peers import PEERS_MIN, residuals, split
from ftkit.detection.sums import Sums

#: So many pairs, of which most do not differ, make a majority.
PAIRS_MIN: Final = 3

#: Steps that make a member's past, and those that show of which kind it is.
LEVEL_STEPS: Final = 16

#: Of the effect that is looked for, what the estimate must reach. The sum begins to grow at half
#: of it, and no more than that is no finding.
_EFFECT_SHARE: Final = 0.9

#: In a group of two kinds a member is held against its past alone, which drifts: it takes more.
_MIXED_SHARE: Final = 2.0

#: What slows one rank down for less time than this is some other process having its turn. Peers would
#: show how common that is; a member's past does not.
_MOMENT_S: Final = 0.5

#: How many members of a healthy job may differ from their peers for good by so much that they
#: pass for outliers. Such differences last: this is for the job, not for a day.
_MISTAKEN: Final = 0.01

#: Whether a group is of two kinds is looked at so often, while nobody is suspect.
_KINDS_EVERY: Final = 8

#: In a group of so many one member moves neither the median nor the spread of the others.
_CROWD: Final = 64

#: How slowly a member's past follows it while it is no suspect.
_DRIFT: Final = 1 / 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One member is slow."""

    member: MemberId
    factor: float
    """By how much: 1.2 for +20 %."""
    since: float
    steps: int
    """How many speak for it."""
    against: str
    """"peers" or "past"."""
    others: int
    """How many it was compared with."""
    threshold: Threshold


@dataclass(slots=True)
class _Past:
    """What a member's work used to take, for one role and one number of slots."""

    key: object
    first: list[float]
    level: float | None = None
    steps: int = LEVEL_STEPS
    """That `level` is the mean of, or nearly."""


class Slowness:
    """Judges one measure of work, step by step. Pure."""

    def __init__(self, *, effect: float) -> None:
        """Look for members slower by `effect` (0.1: 10 %) or more."""
        self._effect = math.log1p(effect)
        self._peers = Sums(effect=effect)
        self._past = Sums(effect=effect)
        self._pasts: dict[MemberId, _Past] = {}
        self._groups: dict[MemberId, frozenset[MemberId]] = {}
        self._paired: frozenset[MemberId] = frozenset()
        self._steps = 0
        #: Each member -> what it did when it was last seen, and when that was.
        self._seen: dict[MemberId, tuple[object, int]] = {}
        #: For one step: a group and a number of steps -> the levels of its members, all of them.
        self._levels: dict[tuple[frozenset[MemberId], int], list[float]] = {}
        self.kinds: dict[frozenset[MemberId], frozenset[MemberId]] = {}
        """Groups of two kinds, as of the last step -> the slower ones."""

    def step(
        self,
        work: Mapping[MemberId, float],
        keys: Mapping[MemberId, object],
        *,
        at: float,
        steps_between: float,
    ) -> list[Finding]:
        """Take in one step; say who is slow as of now.

        Args:
          work: logarithm of each member's work, for one slot.
          keys: members with the same key do the same work.
          at: when the step ended.
          steps_between: rank-steps for each false alarm that is allowed.
        """
        # As of before this step: who is no suspect after it was low in it, by selection.
        calm = [m for m in work if self.suspicion(m) == 0.0]
        groups: dict[object, dict[MemberId, float]] = {}
        for member, value in work.items():
            groups.setdefault(keys[member], {})[member] = value
        against_peers: dict[MemberId, float] = {}
        paired = frozenset(m for group in groups.values() if len(group) == 2 for m in group)
        self._paired = paired if len(paired) >= 2 * PAIRS_MIN else frozenset()
        for group in groups.values():
            in_pairs = self._paired >= group.keys()
            if len(group) >= PEERS_MIN or in_pairs:
                against_peers |= residuals(group)
            together = self._paired if in_pairs else frozenset(group)
            self._groups.update(dict.fromkeys(group, together))
        over = self._peers.push(against_peers, at=at, steps_between=steps_between)
        self._steps += 1
        self._seen.update({m: (keys[m], self._steps) for m in work})
        if over or self._steps % _KINDS_EVERY == 0:
            self._look_for_kinds()
        self._levels.clear()
        mixed = {m for group in self.kinds for m in group}
        found = [f for m in sorted(over - mixed) if (f := self._outlier(m))]

        against_past = self._against_past(work, keys)
        over = self._past.push(against_past, at=at, steps_between=steps_between)
        alone = {m for m in work if m not in against_peers} | mixed
        found += [f for m in sorted(over & alone) if (f := self._changed(m, work, m in mixed, at))]
        self._follow({m: work[m] for m in calm})
        return found

    def suspicion(self, member: MemberId) -> float:
        """How far the evidence against it has come: 0 none, 1 enough."""
        return max(self._peers.share(member), self._past.share(member))

    def forget(self, keep: frozenset[MemberId]) -> None:
        """Drop all but these members."""
        self._peers.forget(keep)
        self._past.forget(keep)
        self._pasts = {m: past for m, past in self._pasts.items() if m in keep}
        self._seen = {m: seen for m, seen in self._seen.items() if m in keep}
        self._groups = {m: g for m, g in self._groups.items() if m in keep}

    def _look_for_kinds(self) -> None:
        """Of the groups as they have been lately: who is missing in one step is still of a kind."""
        groups: dict[object, list[MemberId]] = {}
        for member, (key, step) in self._seen.items():
            if step > self._steps - LEVEL_STEPS:
                groups.setdefault(key, []).append(member)
        self.kinds = {}
        for group in groups.values():
            if len(group) < PEERS_MIN:
                continue
            levels = {m: self._peers.usual(m, LEVEL_STEPS) for m in group}
            # In a noisy job a gap between two levels is noise up to some of these. Each member's
            # own, for what the two kinds differ by is no noise.
            noise = median([self._peers.noise(m, LEVEL_STEPS) for m in group])
            upper = split(levels, least=max(self._effect, 4 * noise / math.sqrt(LEVEL_STEPS)))
            if upper is not None:
                self.kinds[frozenset(group)] = upper

    def _outlier(self, member: MemberId) -> Finding | None:
        """The finding, if what speaks against it is more than the spread of its group."""
        # In powers of two, so that what is computed for one serves for others.
        steps = max(STEPS_MIN, 1 << (self._peers.cusum(member).steps.bit_length() - 1))
        others = self._others(member, steps)
        mine = self._peers.level(member, steps)
        if mine is None or not others:
            return None
        ahead = mine - median(others)
        far = outlying(len(self._groups), len(others)) * spread(others)
        if ahead < max(_EFFECT_SHARE * self._effect, far):
            return None
        return self._finding(member, self._peers, "peers", len(others))

    def _others(self, member: MemberId, steps: int) -> list[float]:
        """The levels of those that `member` is held against."""
        group = self._groups[member]
        known = self._levels.get((group, steps))
        if known is None or len(group) < _CROWD:
            # That the other pairs differ as much, whichever way, says that replicas do.
            size = abs if member in self._paired else float
            known = [
                size(level)
                for m in group
                if (m != member or len(group) >= _CROWD)
                and (level := self._peers.level(m, steps)) is not None
            ]
            self._levels[group, steps] = known
        return known

    def _changed(
        self, member: MemberId, work: Mapping[MemberId, float], mixed: bool, at: float
    ) -> Finding | None:
        """The finding against its past, if that is large enough and no mere moment."""
        if at - self._past.cusum(member).since < _MOMENT_S:
            return None
        finding = self._finding(member, self._past, "past", len(work) - 1)
        # A burst moves the mean of what came with it and after it; most of it has to be slow.
        usual = self._past.usual(member, max(STEPS_MIN, finding.steps))
        share = _MIXED_SHARE if mixed else _EFFECT_SHARE
        enough = min(usual, math.log(finding.factor)) >= share * self._effect
        return finding if enough else None

    def _finding(self, member: MemberId, sums: Sums, against: str, others: int) -> Finding:
        cusum = sums.cusum(member)
        level = sums.level(member, max(STEPS_MIN, cusum.steps))
        assert sums.threshold is not None, "a sum is over a threshold"
        assert level is not None, "a sum has residuals"
        return Finding(
            member=member,
            factor=math.exp(level),
            since=cusum.since,
            steps=cusum.steps,
            against=against,
            others=others,
            threshold=sums.threshold,
        )

    def _against_past(
        self, work: Mapping[MemberId, float], keys: Mapping[MemberId, object]
    ) -> dict[MemberId, float]:
        """How much more each takes than it used to, beyond what changed for all.

        Of the change and what it exceeds the others' by, the smaller one: that others became
        faster makes nobody slow.
        """
        changes: dict[MemberId, float] = {}
        for member, value in work.items():
            past = self._pasts.get(member)
            if past is None or past.key != keys[member]:
                past = self._pasts[member] = _Past(keys[member], [])
            if past.level is not None:
                changes[member] = value - past.level
                continue
            past.first.append(value)
            if len(past.first) == LEVEL_STEPS:
                past.level = median(past.first)
        if len(changes) < 2:
            return {}
        beyond = residuals(changes)
        return {m: min(change, beyond[m]) for m, change in changes.items()}

    def _follow(self, work: Mapping[MemberId, float]) -> None:
        """Let the past of these members become better known, and then drift with them."""
        for member, value in work.items():
            past = self._pasts[member]
            if past.level is not None:
                past.steps += 1
                change = max(-self._effect, min(self._effect, value - past.level))
                past.level += max(_DRIFT, 1 / past.steps) * change


def outlying(members: int, others: int) -> float:
    """Standard deviations beyond which one of `members` is no accident among `others` peers.

    From the tail of the normal distribution, exp(-z^2 / 2), and wider where a few peers have to
    tell what their deviation is.
    """
    return math.sqrt(2 * math.log(max(members, 1) / _MISTAKEN)) * (1 + 2 / max(others, 1))
