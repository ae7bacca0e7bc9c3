"""Retries: how often a job that failed was started again, how soon, and whether it helped. Pure.

After the report on 504 GPUs (arXiv 2605.09370), which counts chains (a failure and the starts that
follow it), attempts, the time between them, and success by chain and by attempt: 4 of 12 chains
and 4 of 73 attempts there, 11 minutes apart.
"""

import itertools
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass

#: Starts further apart are not one chain: somebody has done something in between.
CHAIN_GAP_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of a job."""

    chain: str
    """Starts of the same work have the same."""
    started: float
    """Seconds, of any one clock."""
    trained: bool
    """Whether it got further than the one before it: it committed a step."""
    failed: bool
    """Whether it ended with an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryStats:
    """Over all chains. Shares are None where there was nothing to share."""

    chains: int
    attempts: int
    """Starts after a failure; the start that failed first is none."""
    chain_success: float | None
    """Chains whose last attempt trained."""
    attempt_success: float | None
    interval_s: tuple[float, float, float] | None
    """Quartiles of the time from one start to the next."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def retry_stats(attempts: Iterable[Attempt], *, gap_s: float = CHAIN_GAP_S) -> RetryStats:
    """Count.

    Args:
      attempts: every start of every job, in any order.
      gap_s: the longest time between two starts of a chain.
    """
    by_chain: dict[str, list[Attempt]] = {}
    for attempt in sorted(attempts, key=lambda a: a.started):
        by_chain.setdefault(attempt.chain, []).append(attempt)
    chains: list[list[Attempt]] = []
    intervals: list[float] = []
    for starts in by_chain.values():
        open_chain: list[Attempt] | None = None
        for before, now in itertools.pairwise(starts):
            if not before.failed or now.started - before.started > gap_s:
                open_chain = None
                continue
            # One that trained before it failed ends its chain: its failure is a new one.
            if open_chain is None or before.trained:
                open_chain = []
                chains.append(open_chain)
            open_chain.append(now)
            intervals.append(now.started - before.started)
    made = [attempt for chain in chains for attempt in chain]
    return RetryStats(
        chains=len(chains),
        attempts=len(made),
        chain_success=_share(sum(chain[-1].trained for chain in chains), len(chains)),
        attempt_success=_share(sum(attempt.trained for attempt in made), len(made)),
        interval_s=_quartiles(intervals),
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _quartiles(values: list[float]) -> tuple[float, float, float] | None:
    if not values:
        return None
    if len(values) == 1:
        return (values[0],) * 3
    first, middle, last = statistics.quantiles(values, n=4, method="inclusive")
    return first, middle, last
