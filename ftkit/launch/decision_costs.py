"""DecisionCosts: the table of costs beside each decision, from what the coordinator has seen.

It explains and does not decide: what is done is the protocol's, and where the cost model would
have chosen otherwise the event shows both. Costs are measured here as the job runs, steps and
repairs by the coordinator's own clock; what was never seen is assumed (`recovery.costs`).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.recovery.costs import Costs
from ftkit.recovery.facts import JobFacts, Stage
from ftkit.recovery.failure_rate import FailureRate
from ftkit.recovery.growth import growth
from ftkit.recovery.plan import Mode, Plan
from ftkit.recovery.policy import Loss, Option, choose
from ftkit.recovery.protocol import Decision, gone

#: Steps of a generation that are not timed: they warm caches up, and connect.
WARM_UP_STEPS = 3
#: Steps of a world size that must have been timed before its pace is known.
STEPS_MIN = 5


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float, count: int = 1) -> None:
        self.total += value
        self.count += count

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


class DecisionCosts:
    """Owned by the coordinator's thread. What it knows dies with it; the next one measures anew."""

    def __init__(self, seats: int) -> None:
        self._seats = seats
        self._steps: dict[int, _Mean] = defaultdict(_Mean)
        self._regroup, self._respawn = _Mean(), _Mean()
        self._rate = FailureRate()
        self._anchor: tuple[Generation, Step, float | None] | None = None
        """The step that is timed from, and since when; None while the world warms up."""
        self._looked: float | None = None
        self._halted_at: float | None = None
        self._ordered: dict[Seat, float] = {}
        """When the process of a seat that is out of the world was ordered."""

    @property
    def costs(self) -> Costs:
        """What is known now."""
        steps = {w: m.value for w, m in self._steps.items() if m.value and m.count >= STEPS_MIN}
        return Costs(world=self._seats).with_measured(
            step_s=steps, regroup_s=self._regroup.value, respawn_s=self._respawn.value
        )

    def look(self, plan: Plan, facts: JobFacts, now: float) -> None:
        """Measure the pace of the world that trains. At every look of the coordinator."""
        spent_s = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        world = plan.world
        if plan.mode is not Mode.RUNNING or world is None:
            self._anchor = None
            return
        self._rate = self._rate.seen(exposure_s=spent_s * len(world.members))
        at = [
            f.at_step
            for m in world.member_ids
            if (f := facts.members.get(m)) is not None
            and f.stage is Stage.ACTIVE
            and f.generation == world.generation
            and f.at_step
        ]
        if len(at) < len(world.members):
            return
        step = max(at)
        if self._anchor is None or self._anchor[0] != world.generation:
            self._anchor = (world.generation, Step(step + WARM_UP_STEPS), None)
        elif step >= self._anchor[1]:
            _, before, since = self._anchor
            if since is not None and step > before:
                self._steps[len(world.members)].add(now - since, step - before)
            if since is None or step > before:
                self._anchor = (world.generation, step, now)

    def explain(
        self,
        before: Plan,
        after: Plan,
        facts: JobFacts,
        decisions: Sequence[Decision],
        *,
        now: float,
        arena: Iterable[Step] = (),
        written: Step | None = None,
    ) -> list[Decision]:
        """The decisions, those between several ways with `costs` among their fields.

        Args:
          before: the plan they began from.
          after: the plan they led to.
          facts: what they rest on.
          decisions: of one call of `protocol.advance`.
          now: seconds.
          arena: steps that living arenas hold whole.
          written: the newest checkpoint; None when none is known.
        """
        actions = {d.action for d in decisions}
        if before.mode is Mode.RUNNING and (
            after.mode is Mode.HALTING or actions & {"halt", "resume"}
        ):
            self._halted_at = now
        explained = []
        in_arena = set(arena)
        losses: dict[str, dict[str, object] | None] = {}
        for decision in decisions:
            self._measure(decision, facts, now)
            told: dict[str, object] | None = None
            match decision.action:
                case "respawn" | "resume" | "reform" | "restart" | "form" as action:
                    if action not in losses:  # of a thousand respawns the table is the same
                        losses[action] = self._loss(action, before, after, facts, in_arena, written)
                    told = losses[action]
                case "join":
                    told = self._growth(before, after)
            fields = decision.fields | ({"costs": told} if told else {})
            explained.append(replace(decision, fields=fields))
        return explained

    def _measure(self, decision: Decision, facts: JobFacts, now: float) -> None:
        match decision.action:
            case "respawn":
                dead = facts.members.get(MemberId(int(str(decision.fields["dead"]))))
                self._rate = self._rate.seen(failures=0 if dead and dead.drilled else 1)
                self._ordered[Seat(int(str(decision.fields["seat"])))] = now
            case "resume" if self._halted_at is not None:
                self._regroup.add(now - self._halted_at)
                self._halted_at = None
            case "grown":
                members = decision.fields["members"]
                assert isinstance(members, list), "the protocol lists the seats"
                for seat in self._ordered.keys() & set(members):
                    self._respawn.add(now - self._ordered.pop(seat))
            case "form":
                self._ordered.clear()
                self._halted_at = None

    def _loss(
        self,
        action: str,
        before: Plan,
        after: Plan,
        facts: JobFacts,
        arena: set[Step],
        written: Step | None,
    ) -> dict[str, object] | None:
        """The table of a loss; None where nothing that trained was lost."""
        world = before.world
        if world is None:
            return None
        size, left = len(world.members), 0
        if action in ("respawn", "resume"):
            left = sum(
                not gone(after, facts, m)
                and (f := facts.members.get(m)) is not None
                and f.step is not None
                for m in world.member_ids
            )
        if left == size:
            return None  # a link broke, or a newcomer died: nobody who trained is lost
        step = max([before.step, *(f.step or 0 for f in facts.members.values())])
        nodes = {s.node for s in before.seats if s.member in world.member_ids}
        loss = Loss(
            world=size,
            lost=size - left,
            node_lost=bool(nodes & facts.nodes_lost),
            in_memory=left > 0,
            snapshot_steps=max(0, step - max(arena)) if arena else None,
            parity_steps=0 if facts.awaited else None,
            disk_steps=max(0, step - written) if written is not None else None,
            done_steps=step,
        )
        mixed = facts.approximation if action == "form" else None
        if mixed is not None:
            stale = mixed.way is Option.STALE_SHARD
            loss = replace(
                loss,
                lost=min(size - 1, len(mixed.lost) or 1),
                allow_approximate=True,
                stale_steps=mixed.age if stale else None,
                neighbours_alive=not stale,
            )
        costs = self.costs
        return choose(loss, costs).to_json() | {
            "taken": _taken(loss).value if mixed is None else mixed.way.value,
            "measured": sorted(costs.measured),
        }

    def _growth(self, before: Plan, after: Plan) -> dict[str, object] | None:
        world, larger = before.world, after.joining
        if world is None or larger is None:
            return None
        costs = self.costs
        told = growth(
            len(world.members),
            len(larger.members) - len(world.members),
            costs,
            failures_per_s=self._rate.per_s,
        )
        return told.to_json() | {"taken": "grow", "measured": sorted(costs.measured)}


def _taken(loss: Loss) -> Option:
    """What the protocol does about it, whatever it costs: the shallowest way that there is."""
    if loss.survivors:
        return Option.RESPAWN
    if loss.snapshot_steps is not None:
        return Option.RESTART_MEMORY
    if loss.parity_steps is not None:
        return Option.PARITY
    return Option.DISK if loss.disk_steps is not None else Option.FRESH
