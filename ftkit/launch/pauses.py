"""Pauses: how long newcomers take to come, and how long the others stand still to let them in.

Measured as the job runs, from what the coordinator sees; the policy decides by it (`recovery.waiting`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from ftkit.core.ids import Generation, Seat, Step
from ftkit.recovery.facts import JobFacts, Stage
from ftkit.recovery.plan import Mode, Plan


@dataclass(slots=True)
class Mean:
    """Of what was added."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float, count: int = 1) -> None:
        self.total += value
        self.count += count

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


class Pauses:
    """Owned by the coordinator's thread."""

    def __init__(self) -> None:
        self._respawn, self._grow = Mean(), Mean()
        self._ordered: dict[Seat, float] = {}
        """When the process of a seat that is out of the world was ordered."""
        self._at: tuple[Generation, Step, float] | None = None
        """The world that trains, the step it played last, and since when it did."""

    @property
    def measured(self) -> dict[str, float | None]:
        """As costs (`Costs.with_measured`)."""
        return {"respawn_s": self._respawn.value, "grow_s": self._grow.value}

    def ordered(self, seat: Seat, now: float) -> None:
        """A process is to be started in a lost one's seat."""
        self._ordered[seat] = now

    def look(
        self,
        plan: Plan,
        facts: JobFacts,
        step: Step | None,
        pace: Callable[[int], float | None],
        now: float,
    ) -> None:
        """At every look.

        Args:
          plan: as it stands.
          facts: what is known of its members.
          step: the one that all of the world play; None while they do not.
          pace: seconds of a step by the size of the world, as far as it is known.
          now: seconds.
        """
        if self._ordered:
            self._arrivals(plan, facts, now)
        world = plan.world
        if plan.mode is not Mode.RUNNING or world is None:
            self._at = None
            return
        here = [f for m in world.member_ids if (f := facts.members.get(m)) is not None]
        if self._at is None and world.generation != plan.resumed:
            # It grew before a step was seen in the world that was resumed.
            self._at = plan.resumed, max((f.at_step for f in here), default=Step(0)), now
        # What those show who still load their state is a step of the world before.
        if step is None or any(f.step is None for f in here):
            return
        if self._at is not None:
            generation, before, since = self._at
            # One that was resumed stood still for a loss; others grew, by a vote at the end of a step.
            grew = generation != world.generation != plan.resumed
            if grew and step <= before:
                return
            if grew:
                step_s = pace(len(world.members))
                if step_s is None:
                    return  # it is known a few steps later
                self._grow.add(max(0.0, now - since - (step - before) * step_s))
        if self._at is None or self._at[:2] != (world.generation, step):
            self._at = world.generation, step, now

    def _arrivals(self, plan: Plan, facts: JobFacts, now: float) -> None:
        """Note who has come so far that it can be let in."""
        for seat in plan.seats:
            here = facts.members.get(seat.member)
            if seat.seat not in self._ordered or here is None:
                continue
            waits = here.stage is Stage.READY and here.stepping
            if waits or here.stage in (Stage.LINKED, Stage.ACTIVE):
                self._respawn.add(now - self._ordered.pop(seat.seat))
