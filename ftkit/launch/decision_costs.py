"""DecisionCosts: what a job's steps, repairs and failures cost, as the coordinator has seen them.

The policy decides by it (`recovery.waiting`, `recovery.saving`), and each decision between several ways
carries the table of all of them: where the protocol's way is another than the cheapest one, the event shows
both. Costs are measured here as the job runs, steps and repairs by the coordinator's own clock; what
was never seen is assumed (`recovery.costs`).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.detection.offenders import DAY_S
from ftkit.detection.signals import NodeScored
from ftkit.launch.pauses import Mean, Pauses
from ftkit.recovery.costs import Costs
from ftkit.recovery.facts import ALIVE, JobFacts, Stage
from ftkit.recovery.failure_rate import (
    PRIOR_FAILURES,
    PRIOR_MTBF_S,
    FailureRate,
    posterior_share,
)
from ftkit.recovery.growth import growth
from ftkit.recovery.plan import Mode, Plan
from ftkit.recovery.policy import APPROXIMATE, Loss, Option, choose
from ftkit.recovery.protocol import Decision, gone

#: Steps of a generation that are not timed: they warm caches up, and connect.
WARM_UP_STEPS = 3
#: Steps of a world size that must have been timed before its pace is known.
STEPS_MIN = 5
#: What is done where parity does not have the state either, and where memory has not.
BEYOND_PARITY = APPROXIMATE | {Option.DISK, Option.FRESH}
BEYOND_MEMORY = BEYOND_PARITY | {Option.PARITY}


def playing(plan: Plan, facts: JobFacts) -> Step | None:
    """The step that the members of the plan's world play, the furthest of them.

    None where there is no world, or not all of it is there and steps.
    """
    world = plan.world
    if world is None:
        return None
    at = [
        f.at_step
        for m in world.member_ids
        if (f := facts.members.get(m)) is not None
        and f.stage is Stage.ACTIVE
        and f.generation == world.generation
        and f.at_step
    ]
    return max(at) if len(at) == len(world.members) else None


class DecisionCosts:
    """Owned by the coordinator's thread. What it knows dies with it; the next one measures anew."""

    def __init__(self, seats: int, *, ranks: int = 1, parity: bool = True) -> None:
        """Begin with nothing measured.

        Args:
          seats: of the full world.
          ranks: of a node: the history tells of nodes.
          parity: whether there is a tier between memory and the disk.
        """
        self._seats, self._ranks, self._parity = seats, ranks, parity
        self._steps: dict[int, Mean] = defaultdict(Mean)
        self._regroup = Mean()
        self._pauses = Pauses()
        self.rate = FailureRate()
        """At which one member fails."""
        self.step: Step | None = None
        """The step that the world played at the last look; None where not all of it did."""
        self._believed: dict[NodeId, NodeScored] = {}
        self._beyond_memory, self._beyond_parity = 0, 0
        self._anchor: tuple[Generation, Step, float | None] | None = None
        """The step that is timed from, and since when; None while the world warms up."""
        self._looked: float | None = None
        self._halted_at: float | None = None

    @property
    def costs(self) -> Costs:
        """What is known now."""
        steps = {w: m.value for w, m in self._steps.items() if m.value and m.count >= STEPS_MIN}
        return Costs(world=self._seats).with_measured(
            step_s=steps, regroup_s=self._regroup.value, **self._pauses.measured
        )

    @property
    def saving(self) -> Costs:
        """The same, with the shares of failures that go beyond memory and parity, for intervals."""
        costs, failures = self.costs, self.rate.failures
        memory = min(self._beyond_memory, failures)
        beyond = posterior_share(costs.beyond_memory, memory, failures)
        last = beyond
        if self._parity:
            parity = min(self._beyond_parity, failures)
            last = min(beyond, posterior_share(costs.beyond_parity, parity, failures))
        costs = replace(costs, beyond_memory=beyond, beyond_parity=last)
        return costs.with_measured(beyond_memory=beyond, beyond_parity=last) if failures else costs

    def believe(self, score: NodeScored) -> None:
        """Take in what the history of earlier jobs says of a node: what is believed to begin with.

        Once for each node: faults of this job are counted here, and in the history as well.
        """
        if score.node in self._believed:
            return
        self._believed[score.node] = score
        per_day = sum(s.rate_per_day for s in self._believed.values()) / len(self._believed)
        if per_day <= 0:
            return
        # Faults that were seen weigh as much as those of this job do.
        seen = sum(s.faults for s in self._believed.values())
        self.rate = replace(
            self.rate,
            prior_mtbf_s=min(PRIOR_MTBF_S, self._ranks * DAY_S / per_day) if seen else PRIOR_MTBF_S,
            prior_failures=PRIOR_FAILURES + seen,
        )

    def look(self, plan: Plan, facts: JobFacts, now: float) -> None:
        """Measure the pace of the world that trains. At every look of the coordinator."""
        spent_s = now - self._looked if self._looked is not None else 0.0
        self._looked = now
        world, step = plan.world, playing(plan, facts)
        self.step = step
        self._pauses.look(plan, facts, step, self._pace, now)
        if plan.mode is not Mode.RUNNING or world is None:
            self._anchor = None
            return
        self.rate = self.rate.seen(exposure_s=spent_s * len(world.members))
        if step is None:
            return
        if self._anchor is None or self._anchor[0] != world.generation:
            self._anchor = (world.generation, Step(step + WARM_UP_STEPS), None)
        elif step >= self._anchor[1]:
            _, before, since = self._anchor
            if since is not None and step > before:
                self._steps[len(world.members)].add(now - since, step - before)
            if since is None or step > before:
                self._anchor = (world.generation, step, now)

    def _pace(self, world: int) -> float | None:
        """Seconds of a step; None where no steps were timed."""
        costs = self.costs
        return costs.step_time(world) if costs.step_s else None

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
                self.rate = self.rate.seen(failures=0 if dead and dead.drilled else 1)
                self._pauses.ordered(Seat(int(str(decision.fields["seat"]))), now)
            case "resume" if self._halted_at is not None:
                self._regroup.add(now - self._halted_at)
                self._halted_at = None
            case "form":
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
        if action != "restart":
            left = sum(
                not gone(after, facts, m)
                and (f := facts.members.get(m)) is not None
                and (f.step is not None or (f.sharded and f.stage in ALIVE))
                for m in world.member_ids
            )
        if left == size:
            return None  # a link broke, or a newcomer died: nobody who trained is lost
        sharded = any(f.sharded for f in facts.members.values())
        step = max([before.step, *(f.step or 0 for f in facts.members.values())])
        nodes = {s.node for s in before.seats if s.member in world.member_ids}
        loss = Loss(
            world=size,
            lost=size - left,
            node_lost=bool(nodes & facts.nodes_lost),
            # Shards of the one that is gone are in its arena, or nowhere in memory.
            in_memory=left > 0 and (bool(arena) or not sharded),
            snapshot_steps=max(0, step - max(arena)) if arena else None,
            parity_steps=0 if facts.awaited else None,
            disk_steps=max(0, step - written) if written is not None else None,
            done_steps=step,
            spares=sum(f.stage is Stage.LINKED and f.stepping for f in facts.members.values()),
            waits=sharded,
        )
        mixed = facts.approximation if action == "form" else None
        taken = _taken(loss)
        if mixed is not None:
            stale, taken = mixed.way is Option.STALE_SHARD, mixed.way
            loss = replace(
                loss,
                lost=min(size - 1, len(mixed.lost) or 1),
                allow_approximate=True,
                stale_steps=mixed.age if stale else None,
                neighbours_alive=taken is Option.CHECKFREE,
                swapped=taken is Option.CHECKFREE_PLUS,
            )
        elif (
            action == "form" and len(after.world.members if after.world else ()) >= size > left > 0
        ):
            taken = Option.WAIT if not loss.spares else Option.SPARE
        if action == "form":
            self._beyond_memory += taken in BEYOND_MEMORY
            self._beyond_parity += taken in BEYOND_PARITY
        costs = self.costs
        told = choose(loss, costs).to_json() | {"measured": sorted(costs.measured)}
        if sharded and left and action != "form":
            return told  # whether those who are left wait is decided later (`ReplacementWait`)
        return told | {"taken": taken.value}

    def _growth(self, before: Plan, after: Plan) -> dict[str, object] | None:
        world, larger = before.world, after.joining
        if world is None or larger is None:
            return None
        costs = self.costs
        told = growth(
            len(world.members),
            len(larger.members) - len(world.members),
            costs,
            failures_per_s=self.rate.per_s,
        )
        return told.to_json() | {"taken": "grow", "measured": sorted(costs.measured)}


def _taken(loss: Loss) -> Option:
    """What the protocol does about it where it is not told to wait: the shallowest way there is."""
    if loss.survivors and loss.in_memory:
        return Option.SPARE if loss.spares >= loss.lost > 0 else Option.RESPAWN
    if loss.snapshot_steps is not None:
        return Option.RESTART_MEMORY
    if loss.parity_steps is not None:
        return Option.PARITY
    return Option.DISK if loss.disk_steps is not None else Option.FRESH
