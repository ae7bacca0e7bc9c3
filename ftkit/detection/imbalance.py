"""Imbalance: work that is uneven by the job's own making. Reported, and nobody is at fault.

Three forms: the last one to finish is another one each step (sequence lengths, uneven samples);
one role has more to do than the others (often the last pipeline stage); and the members of one
role are of two kinds (two sorts of accelerator, two sorts of data).
"""

from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final

from ftkit.core.ids import MemberId
from ftkit.detection.cusum import median
from ftkit.detection.peers import PEERS_MIN

#: Steps that are looked back over, and how many there must be.
_WINDOW: Final = 32
_STEPS_MIN: Final = 16

#: It is uneven when this share of the steps is.
_USUAL: Final = 0.5

#: And the owner rotates when nobody is last in more than this share of those.
_OWNER_MAX: Final = 0.5

#: A role has more to do when it does in nearly every step.
_ROLE_USUAL: Final = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Unevenness:
    """What is uneven, and by how much."""

    kind: str
    """"rotating", "role" or "kinds"."""
    role: str
    members: frozenset[MemberId]
    """Of the role."""
    factor: float
    """The longest against the usual."""
    share: float
    """Of the steps looked at, those in which it was so."""


class Imbalance:
    """Looks over the last 32 steps."""

    def __init__(self, *, effect: float) -> None:
        """What is uneven by less than `effect` (0.1: 10 %) is even."""
        self._least = 1.0 + effect
        #: For each role: who was last, and by what factor over the median; 1.0 and below: even.
        self._last: dict[str, deque[tuple[MemberId, float]]] = {}
        #: For each role: its median over that of the other roles.
        self._heavier: dict[str, deque[float]] = {}

    def step(
        self,
        seconds: Mapping[MemberId, float],
        roles: Mapping[MemberId, str],
        *,
        kinds: Mapping[frozenset[MemberId], frozenset[MemberId]],
        slow: AbstractSet[MemberId],
    ) -> list[Unevenness]:
        """Take in what each member's work took in one step, waiting left out.

        Args:
          seconds: of work, above 0.
          roles: of those members.
          kinds: groups of two kinds -> the slower ones.
          slow: members that are slow by themselves: what they cause is no imbalance.
        """
        groups: dict[str, dict[MemberId, float]] = {}
        for member, spent in seconds.items():
            if member not in slow:
                groups.setdefault(roles[member], {})[member] = spent
        usual = {role: median(list(group.values())) for role, group in groups.items()}
        found: list[Unevenness] = []
        for role, group in groups.items():
            members = frozenset(group)
            upper = next((k & members for g, k in kinds.items() if g >= members), frozenset())
            lower = members - upper
            if upper and lower:
                factor = median([group[m] for m in upper]) / median([group[m] for m in lower])
                if factor >= self._least:  # in an odd step the slower kind may be no slower
                    found.append(_uneven("kinds", role, members, factor, 1.0))
            elif (one := self._rotating(role, group, usual[role])) is not None:
                found.append(one)
            if (one := self._role(role, members, usual)) is not None:
                found.append(one)
        return found

    def _rotating(
        self, role: str, group: Mapping[MemberId, float], usual: float
    ) -> Unevenness | None:
        if len(group) < PEERS_MIN:
            return None
        window = self._last.setdefault(role, deque(maxlen=_WINDOW))
        owner = max(group, key=lambda m: group[m])
        window.append((owner, group[owner] / usual))
        uneven = [(m, factor) for m, factor in window if factor >= self._least]
        share = len(uneven) / len(window)
        if len(window) < _STEPS_MIN or share < _USUAL:
            return None
        _, most = Counter(m for m, _ in uneven).most_common(1)[0]
        if most > _OWNER_MAX * len(uneven):
            return None
        return _uneven("rotating", role, frozenset(group), median([f for _, f in uneven]), share)

    def _role(
        self, role: str, members: frozenset[MemberId], usual: Mapping[str, float]
    ) -> Unevenness | None:
        others = [spent for other, spent in usual.items() if other != role]
        if not others:
            return None
        window = self._heavier.setdefault(role, deque(maxlen=_WINDOW))
        window.append(usual[role] / median(others))
        heavy = [factor for factor in window if factor >= self._least]
        share = len(heavy) / len(window)
        if len(window) < _STEPS_MIN or share < _ROLE_USUAL:
            return None
        return _uneven("role", role, members, median(heavy), share)


def _uneven(
    kind: str, role: str, members: frozenset[MemberId], factor: float, share: float
) -> Unevenness:
    return Unevenness(kind=kind, role=role, members=members, factor=factor, share=share)
