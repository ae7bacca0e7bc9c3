"""FailureRate: how often a member fails, from a prior belief and what this job has seen.

Failures come as a Poisson process whose rate is not known; with a Gamma prior the posterior is
Gamma again, so two numbers hold everything that was learnt. Rates are of one member: a job of n
fails n times as often.
"""

import math
from dataclasses import dataclass, replace

#: Device hours from one failure to the next where nothing else is known: 419 unexpected
#: interruptions in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783) are one in 50,700.
PRIOR_MTBF_S = 50_000 * 3600.0

#: Failures that the prior counts for. Little: clusters differ by orders of magnitude, so a job's
#: own second failure should say more than everybody else's thousands.
PRIOR_FAILURES = 0.1

#: Events of a kind that a prior share counts for. Of half, one and two, half has the least regret
#: on average over truths up to ten times off in either direction (`docs/policy.md`).
PRIOR_EVENTS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureRate:
    """The posterior of one member's failure rate. Immutable; `seen` makes the next."""

    prior_mtbf_s: float = PRIOR_MTBF_S
    """Mean time between failures of one member, before anything was seen."""
    prior_failures: float = PRIOR_FAILURES
    """How many observed failures that belief weighs as much as."""
    failures: int = 0
    exposure_s: float = 0.0
    """Member-seconds watched: one member for an hour, or 3,600 for a second."""

    def __post_init__(self) -> None:
        if not all(0 < x < math.inf for x in (self.prior_mtbf_s, self.prior_failures)):
            raise ValueError(
                "a prior needs a finite mean time and weight above 0, got "
                f"{self.prior_mtbf_s} s and {self.prior_failures}"
            )
        if self.failures < 0 or self.exposure_s < 0:
            raise ValueError(f"{self.failures} failures in {self.exposure_s} s cannot be")

    @property
    def per_s(self) -> float:
        """Expected failures of one member in a second."""
        prior_s = self.prior_failures * self.prior_mtbf_s
        return (self.prior_failures + self.failures) / (prior_s + self.exposure_s)

    def mtbf_s(self, members: int = 1) -> float:
        """Expected seconds to the next failure among `members`."""
        return 1.0 / (self.per_s * max(1, members))

    def seen(self, *, failures: int = 0, exposure_s: float = 0.0) -> "FailureRate":
        """With more failures and more member-seconds watched."""
        return replace(
            self, failures=self.failures + failures, exposure_s=self.exposure_s + exposure_s
        )


def posterior_share(prior: float, events: float, of: float) -> float:
    """The share of failures that are of a kind, when `events` of `of` were seen to be.

    A Beta posterior whose prior weighs as much as `PRIOR_EVENTS` of the kind: a kind that was not
    seen among a hundred failures may still be one in three hundred, and is not written off.
    """
    return (PRIOR_EVENTS + events) / (PRIOR_EVENTS / prior + of)
