"""SaveInterval: the coordinator's part in how often a job saves, where it decides that itself.

It measures what saves cost, of any job, and decides by `recovery.saving` where the user left the
interval to it. What it has decided is told with the plan, agents repeat it, and a coordinator that
takes over goes on with that.
"""

from collections.abc import Iterable

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Step
from ftkit.launch.checkpointing import Order
from ftkit.launch.decision_costs import DecisionCosts
from ftkit.launch.disk import Tell
from ftkit.launch.save_cost import SaveCost
from ftkit.recovery.plan import Mode, Plan
from ftkit.recovery.saving import Saving, Schedule, decide

#: Between two decisions: what they rest on moves slowly.
DECIDE_S = 1.0
#: Ahead of the next save a change is told, and twice the time between two reports more: no more than
#: that is the step that is known too old.
AHEAD_S = 1.0


class SaveInterval:
    """Of the coordinator's thread."""

    def __init__(self, tell: Tell, *, auto: bool, report_s: float) -> None:
        """Begin with what is assumed of any job.

        Args:
          tell: told of what saves cost, and of each interval with its reason.
          auto: whether it decides; else it measures only.
          report_s: between two reports of an agent.
        """
        self._tell = tell
        self._auto = auto
        self._ahead_s = AHEAD_S + 2 * report_s
        self._cost = SaveCost()
        self._saving: Saving | None = None
        self._decided_at = float("-inf")
        self._order: Order | None = None

    @property
    def told(self) -> dict[str, int] | None:
        """What agents and ranks are told; None where the user has given the interval."""
        return self._saving.schedule.to_json() if self._saving else None

    def adopt(self, copies: Iterable[object]) -> None:
        """Go on with what agents were told by the coordinator before."""
        found = list[Schedule]()
        for copy in copies:
            if isinstance(copy, dict):
                try:
                    found.append(Schedule.from_json(copy))
                except ProtocolError:
                    continue
        if self._auto and found:
            newest = max(found, key=lambda s: s.first)
            if newest.every:
                reason = "as the coordinator before had decided"
                self._saving = Saving(schedule=newest, seconds=0.0, reason=reason)

    def look(
        self,
        plan: Plan,
        known: DecisionCosts,
        *,
        order: Order | None,
        written: Step | None,
        now: float,
    ) -> bool:
        """Measure, and decide; returns whether the schedule has changed. At every look.

        Args:
          plan: as it stands.
          known: the costs of the job, apart from those of saves; it has looked before.
          order: the checkpoint that is being written.
          written: the newest that is on disk.
          now: seconds.
        """
        running = plan.mode is Mode.RUNNING and plan.world is not None
        step = known.step if running else None
        generation = plan.world.generation if plan.world is not None and running else None
        self._order = order or self._order
        saved = self._order is not None and written == self._order.step
        writing = order is not None
        held = self._cost.look(generation, step, writing=writing, saved=saved, now=now)
        if held is not None:
            wrote_s = self._cost.wrote_s
            self._tell("checkpoint-cost", step=written, held_s=round(held, 6), write_s=wrote_s)
        if not self._auto or (now - self._decided_at < DECIDE_S and held is None):
            return False
        if self._saving is not None and step is None:
            return False
        self._decided_at = now
        return self._decide(known, at=step or plan.step)

    def _decide(self, known: DecisionCosts, *, at: Step) -> bool:
        rate = known.rate
        costs = known.saving.with_measured(
            checkpoint_block_s=self._cost.held_s, checkpoint_write_s=self._cost.wrote_s
        )
        step_s = costs.step_time(costs.world)
        margin = 2 + round(self._ahead_s / step_s) if "step_s" in costs.measured else 2
        before = self._saving
        found = decide(before, costs, rate, at=at, margin=margin)
        if found is None:
            return False
        self._saving = found
        self._tell(
            "checkpoint-interval",
            every=found.schedule.every,
            first=found.schedule.first,
            before=before.schedule.every if before else None,
            seconds=round(found.seconds, 3),
            reason=found.reason,
            step_s=step_s,
            held_s=costs.checkpoint_block_s,
            write_s=costs.checkpoint_write_s,
            mtbf_s=rate.mtbf_s(costs.world),
            measured=sorted(costs.measured),
        )
        return True
