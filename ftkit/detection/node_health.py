"""Node health: what checks of a node found, against its own history and against its peers. Pure.

A check either holds or not, and may have a figure. A figure that is 5 % worse than the median of
the node's last ones is a warning (the variance rule of SuperBench, ATC '24), one that is under half
of it a failure. A result that must be the same everywhere, and is not, makes those fail that
differ from most.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from statistics import median

from ftkit.core.errors import ProtocolError

#: Worse than the node's own median by this share: a warning, or a failure.
WARN, FAIL = 0.05, 0.5
#: Earlier results of a node that make its history.
_LAST = 5


class Health(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    ABSENT = "absent"
    """There is nothing to check: no GPU, say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of one node."""

    name: str
    health: Health
    value: float | None = None
    """Its figure; None where it has none."""
    unit: str = ""
    """Rates are better the higher they are, seconds the lower. Of "" nothing is compared."""
    digest: str = ""
    """A result that must be the same on every node of a job, and every time."""
    note: str = ""
    """For people: what was found, with the numbers."""

    @property
    def less_is_better(self) -> bool:
        return self.unit == "s"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResult:
    """What all checks of a node came to at one time."""

    node: str
    """The machine's own name."""
    at: float
    """Unix seconds."""
    checks: tuple[Check, ...] = field(default=())

    @property
    def failed(self) -> bool:
        return any(c.health is Health.FAILED for c in self.checks)

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "NodeResult":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping):
            raise ProtocolError(f"not the result of a node's checks: {value!r}")
        try:
            checks = tuple(
                Check(
                    name=str(c["name"]),
                    health=Health(c["health"]),
                    value=None if c["value"] is None else float(c["value"]),
                    unit=str(c["unit"]),
                    digest=str(c["digest"]),
                    note=str(c["note"]),
                )
                for c in value["checks"]
            )
            return cls(node=str(value["node"]), at=float(value["at"]), checks=checks)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not the result of a node's checks: {value!r}") from error


def against_history(
    now: NodeResult, before: Sequence[NodeResult], *, usual_is: str = "its median of"
) -> NodeResult:
    """`now`, with a warning or failure where it is worse than the same node's last results.

    Args:
      now: what was found.
      before: earlier results, the oldest first; those of other nodes are passed over.
      usual_is: what the figures of `before` are, in words.
    """
    mine = [r for r in before if r.node == now.node][-_LAST:]
    checks = []
    for check in now.checks:
        same = [c for r in mine for c in r.checks if c.name == check.name]
        usual = [c.value for c in same if c.value and c.unit == check.unit]
        digests = {c.digest for c in same if c.digest}
        if check.digest and digests and check.digest not in digests:
            check = _worse(check, Health.FAILED, "computes something else than it did")
        elif check.value is not None and check.unit and usual:
            middle = median(usual)
            drop = (check.value / middle - 1) if check.less_is_better else 1 - check.value / middle
            if drop > WARN:
                # Half of a rate is twice the seconds.
                bad = drop > (1.0 if check.less_is_better else FAIL)
                health = Health.FAILED if bad else Health.WARNING
                text = f"{100 * drop:.0f} % worse than {usual_is} {middle:.4g} {check.unit}"
                check = _worse(check, health, text)
        checks.append(check)
    return replace(now, checks=tuple(checks))


def against_peers(results: Sequence[NodeResult]) -> list[NodeResult]:
    """The results, in which those fail that compute something else than most nodes do."""
    names = dict.fromkeys(c.name for r in results for c in r.checks if c.digest)
    for name in names:
        votes = Counter(c.digest for r in results for c in r.checks if c.name == name and c.digest)
        (usual, most), *others = votes.most_common()
        if not others:
            continue
        tie = others[0][1] == most
        text = "computes something else than other nodes, and nobody can tell who is right"
        text = text if tie else "computes something else than most nodes"
        results = [
            replace(
                r,
                checks=tuple(
                    _worse(c, Health.FAILED, text)
                    if c.name == name and c.digest and (tie or c.digest != usual)
                    else c
                    for c in r.checks
                ),
            )
            for r in results
        ]
    return list(results)


def complaints(results: Iterable[NodeResult], *, least: Health = Health.FAILED) -> list[str]:
    """What is wrong with which node, a sentence each."""
    grave = (Health.FAILED,) if least is Health.FAILED else (Health.WARNING, Health.FAILED)
    return [
        f"{r.node}: {c.name} {c.note or c.health.value}"
        for r in results
        for c in r.checks
        if c.health in grave
    ]


def _worse(check: Check, health: Health, text: str) -> Check:
    if check.health is Health.FAILED:
        health = Health.FAILED
    return replace(check, health=health, note=f"{check.note}; {text}" if check.note else text)
