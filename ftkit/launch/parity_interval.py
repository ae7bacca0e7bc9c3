"""ParityInterval: the coordinator's part in how often parity is made, where it decides that itself.

The interval is that of `intervals.tier_intervals`, the same that `ftkit plan` prints. What a round costs
is measured as what a checkpoint costs is (`SaveCost`), by how much slower steps are while one is made;
how long one takes the nodes tell. Agents repeat what they are told, and a coordinator that takes over
goes on with that.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from ftkit.launch.decision_costs import DecisionCosts
from ftkit.launch.disk import Tell
from ftkit.launch.save_cost import SaveCost
from ftkit.recovery.intervals import tier_intervals
from ftkit.recovery.plan import Mode, Plan
from ftkit.recovery.saving import HYSTERESIS, LONGEST_S

#: Between two decisions: what they rest on moves slowly.
DECIDE_S = 1.0


class ParityInterval:
    """Of the coordinator's thread."""

    def __init__(self, tell: Tell, *, auto: bool) -> None:
        """Decide nothing yet.

        Args:
          tell: told of each interval with its reason.
          auto: whether it decides at all.
        """
        self._tell, self._auto = tell, auto
        self._cost = SaveCost()
        self._decided_at = float("-inf")
        self._seconds: float | None = None

    @property
    def told(self) -> float | None:
        """Seconds from the begin of a round to the next one's, at least; None: as the user said."""
        return self._seconds

    def adopt(self, reports: Iterable[object]) -> None:
        """Go on with what agents were told by the coordinator before, as they report of parity."""
        found = [r.get("every_s") for r in reports if isinstance(r, Mapping)]
        known = [s for s in found if isinstance(s, int | float) and math.isfinite(s) and s >= 0]
        if self._auto and known:
            self._seconds = max(known)

    def look(
        self, plan: Plan, known: DecisionCosts, reports: Iterable[Mapping[str, Any]], *, now: float
    ) -> bool:
        """Measure, and decide; returns whether the interval has changed. At every look.

        Args:
          plan: as it stands.
          known: the costs of the job; it has looked before.
          reports: what nodes tell of parity.
          now: seconds.
        """
        if not self._auto:
            return False
        told = list(reports)
        running = plan.mode is Mode.RUNNING and plan.world is not None
        generation = plan.world.generation if plan.world is not None and running else None
        making = any(r["making"] for r in told)
        self._cost.look(generation, known.step if running else None, writing=making, now=now)
        if now - self._decided_at < DECIDE_S:
            return False
        self._decided_at = now
        rounds = [float(r["round_s"]) for r in told if r["round_s"] is not None]
        costs = known.saving.with_measured(
            parity_block_s=self._cost.held_s,
            parity_round_s=statistics.median(rounds) if rounds else None,
        )
        found = next(i for i in tier_intervals(costs, known.rate) if i.name == "parity")
        reason = found.reason
        seconds = found.seconds if found.steps else math.inf
        if seconds > LONGEST_S:
            seconds, reason = LONGEST_S, f"{reason}; an hour apart at most"
        before = self._seconds
        if before is not None and 1 / HYSTERESIS <= seconds / max(before, 1e-9) <= HYSTERESIS:
            return False
        if "parity_block_s" not in costs.measured:
            reason += f"; assumed: {costs.parity_block_s:.3g} s held up by a round"
        self._seconds = seconds
        self._tell(
            "parity-interval",
            seconds=round(seconds, 3),
            before=before,
            reason=reason,
            held_s=costs.parity_block_s,
            round_s=costs.parity_round_s,
            mtbf_s=known.rate.mtbf_s(costs.world),
            measured=sorted(costs.measured),
        )
        return True
