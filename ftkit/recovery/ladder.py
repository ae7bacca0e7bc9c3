"""Ladder: what to try next after an attempt to recover has failed, and how long to wait first.

Pure. Trying the same thing again seldom helps: on 504 GPUs blind retries worked about once in
eighteen (arXiv 2605.09370), so after two equal failures something changes: the next rung.
Waiting grows twofold from attempt to attempt, with jitter, so that many jobs whose shared
storage came back do not all knock at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Rung(StrEnum):
    """What an attempt changes, the least first."""

    IN_PROCESS = "in-process"
    """Survivors regroup; the dead are replaced."""
    NODE = "node"
    """The other ranks of the dead one's node are replaced too."""
    RESTART = "restart"
    """All processes anew, on the same nodes."""
    EXCLUDE = "exclude"
    """All processes anew, without the suspected nodes."""
    OLDER = "older"
    """From an older checkpoint: the newest may hold the cause."""
    STOP = "stop"
    """A person has to look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderConfig:
    """How patient the ladder is."""

    same_max: int = 2
    """Equal failures in a row on one rung, after which it is left."""
    tries_max: int = 4
    """Attempts on one rung, however they fail."""
    wait_s: float = 30.0
    """Before the second attempt; the first is made at once."""
    wait_max_s: float = 660.0
    jitter: float = 0.5
    """Share of a wait that chance takes off, at most."""

    def __post_init__(self) -> None:
        if min(self.same_max, self.tries_max) < 1 or not 0 <= self.jitter <= 1:
            raise ValueError(f"a ladder tries each rung at least once, got {self}")
        if not 0 <= self.wait_s <= self.wait_max_s:
            raise ValueError(f"waits rise from {self.wait_s} to {self.wait_max_s} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One attempt that failed."""

    rung: Rung
    failure: str
    """What ended it, as far as two are the same: fault, place, last line of the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Next:
    """What to try now."""

    rung: Rung
    wait_s: float
    reason: str


def climb(
    failed: Sequence[Attempt],
    *,
    chance: float,
    config: LadderConfig | None = None,
    barred: frozenset[Rung] = frozenset(),
) -> Next:
    """The next attempt.

    Args:
      failed: attempts since the job last made progress, the oldest first. Progress empties it.
      chance: a random number in [0, 1), for the jitter.
      config: how patient.
      barred: rungs that cannot be taken here: no older checkpoint, no node to do without.
    """
    config = config or LadderConfig()
    rungs = [r for r in Rung if r is Rung.STOP or r not in barred]
    if not failed:
        return Next(rung=rungs[0], wait_s=0.0, reason="the first attempt")
    last = failed[-1]
    here = [a for a in failed if a.rung is last.rung]
    same = 0
    for attempt in reversed(here):
        if attempt.failure != last.failure:
            break
        same += 1
    wait_s = min(config.wait_max_s, config.wait_s * 2 ** (len(failed) - 1))
    wait_s *= 1 - config.jitter * chance
    higher = next(
        (r for r in rungs if list(Rung).index(r) > list(Rung).index(last.rung)), Rung.STOP
    )
    if same >= config.same_max:
        why = f"{last.rung} ended the same {same} times ({last.failure}); something has to change"
    elif len(here) >= config.tries_max:
        why = f"{len(here)} attempts at {last.rung} failed, each in another way"
    else:
        rung = last.rung if last.rung in rungs else higher
        told = f"attempt {len(here) + 1} at {rung}: the last failed with {last.failure}"
        return Next(rung=rung, wait_s=wait_s, reason=told)
    return Next(rung=higher, wait_s=0.0 if higher is Rung.STOP else wait_s, reason=why)
