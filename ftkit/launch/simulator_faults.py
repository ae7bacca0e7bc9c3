"""Faults as data: which one, when or at which point, on whom, for how long.

The schedule is drawn from the seed alone, so the seed is the whole bug report.
"""

import random
from dataclasses import dataclass
from enum import StrEnum, auto


class Kind(StrEnum):
    """What goes wrong."""

    KILL_RANK = auto()
    KILL_SEVERAL = auto()
    """Half of the ranks at once, the targeted one among them."""
    KILL_ALL = auto()
    KILL_JOINER = auto()
    """A process that is in no world yet."""
    KILL_COORDINATOR = auto()
    LOSE_NODE = auto()
    """The agent and its ranks die; a new agent comes up after `duration_s`."""
    LOSE_NODE_AND_COORDINATOR = auto()
    """As a host does that had both: nobody is left who knew the members of the node."""
    STOP_RANK = auto()
    """SIGSTOP, and SIGCONT after `duration_s`."""
    HANG_RANK = auto()
    """Code of its script hangs for good: its training thread does nothing more, and its control
    thread answers. Not in `schedule`: of a world that hangs altogether nobody waits for anybody."""
    CUT_LINK = auto()
    """Two living ranks lose their connection, and cannot connect for `duration_s`."""
    DEAF_NODE = auto()
    """Coordinator and agent do not hear each other; the ranks train on."""
    SLOW_PLANS = auto()
    """Plans to a node are late."""
    REFUSE = auto()
    """A rank votes with other gradients than the rest, so that its next step does not pass."""


#: What may take shards out of reach: of a job without enough parity, the state with them.
LOSE_SHARDS = frozenset({Kind.LOSE_NODE, Kind.LOSE_NODE_AND_COORDINATOR, Kind.DEAF_NODE})

#: Points that every step passes; the others come a few times in a job.
OFTEN = frozenset({"reduced", "ballot", "committed"})

#: Moments in a rank's life at which a fault may strike exactly.
POINTS = (
    "spawned",
    "hello",
    "entered",
    "restored",
    "reduced",
    "ballot",
    "committed",
    "halted",
    "gave-up",
    "agreed",
    "linked",
    "prepared",
    "switched",
    "admitted",
    "done",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault. It strikes at `at_s`, or the `nth` time any rank passes `point`."""

    kind: Kind
    target: int
    """Chooses seat or node, modulo how many there are. At a point: a multiple of 3 strikes whoever
    passes it, otherwise somebody else."""
    duration_s: float = 0.0
    at_s: float = 0.0
    point: str = ""
    nth: int = 0

    def __str__(self) -> str:
        when = f"at the {self.nth}. {self.point}" if self.point else f"at {self.at_s:.3f} s"
        return f"{self.kind.value} target={self.target} for {self.duration_s:.3f} s {when}"


def schedule(
    rng: random.Random, *, count: int, until_s: float, span: float = 1.0, ranks: int = 6
) -> list[Fault]:
    """`count` faults, the last of which begins before `until_s` virtual seconds.

    They last `span` times as long as in a small job, and come as late in the life of `ranks`.
    """
    passes = max(1, ranks // 6)
    weights = {
        Kind.KILL_RANK: 10,
        Kind.KILL_SEVERAL: 3,
        Kind.KILL_ALL: 1,
        Kind.KILL_JOINER: 4,
        Kind.KILL_COORDINATOR: 4,
        Kind.LOSE_NODE: 2,
        Kind.LOSE_NODE_AND_COORDINATOR: 2,
        Kind.STOP_RANK: 4,
        Kind.CUT_LINK: 4,
        Kind.DEAF_NODE: 2,
        Kind.SLOW_PLANS: 2,
        Kind.REFUSE: 1,
    }
    faults = []
    for kind in rng.choices(list(weights), list(weights.values()), k=count):
        at_point = rng.random() < 0.5
        point = rng.choice(POINTS)
        faults.append(
            Fault(
                kind=kind,
                target=rng.randrange(2 * max(ranks, 6)),
                duration_s=rng.choice((0.0, 0.05, 0.5, 2.0, 4.0)) * span,
                at_s=0.0 if at_point else rng.uniform(0.0, until_s),
                point=point if at_point else "",
                nth=rng.randrange(1, (40 if point in OFTEN else 12) * passes) if at_point else 0,
            )
        )
    return faults
