"""A month of a job on many nodes, simulated: the policy against policies that never think.

Plain arithmetic on a history of failures: which node, when, whether its process died or the node
itself went, and how far the loss reaches (memory holds the state; parity does; neither). Every
policy meets the same failures and the same waits for replacements, so what differs is what was
decided. The costs the policy reckons with are those the simulation charges, apart from waits for
replacements, shares of losses beyond memory and failure rates, which it has to learn.

The policy is the product's own: `recovery.policy`, `growth`, `intervals`, `exclusion`.
"""

import csv
import heapq
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from ftkit.core.ids import NodeId
from ftkit.detection.offenders import DAY_S, Offenders, Score
from ftkit.recovery.costs import Costs
from ftkit.recovery.exclusion import (
    FAILURES_MIN,
    FailurePrices,
    NodeAdvice,
    excluded,
    swap_cost,
)
from ftkit.recovery.failure_rate import PRIOR_MTBF_S, FailureRate, posterior_share
from ftkit.recovery.growth import growth
from ftkit.recovery.intervals import tier_intervals
from ftkit.recovery.policy import Loss, Option, barred, choose

MONTH_S = 30 * 86_400.0
#: GPUs of a node, for what is believed of its failures before any was seen.
DEVICES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failure of a history."""

    at_s: float
    node: int
    node_lost: bool
    """Whether the node has to be replaced; else its process starts anew there."""
    reach: float = 1.0
    """Drawn from [0, 1): below the scenario's share, it goes beyond that tier."""
    patience: float = 0.5
    """Drawn from [0, 1): how long its replacement takes, among all replacements."""


def synthetic(
    seed: int, *, nodes: int, span_s: float, mtbf_s: float, lemons: int = 3, lost: float = 0.3
) -> list[Failure]:
    """A history at random, half of its failures on a few `lemons`.

    Args:
      seed: decides everything.
      nodes: of the job.
      span_s: how long it lasts.
      mtbf_s: of the whole job.
      lemons: nodes that have half of the failures.
      lost: share of failures that take the node.
    """
    chance = random.Random(seed)
    failures: list[Failure] = []
    at = chance.expovariate(1 / mtbf_s)
    while at < span_s:
        node = chance.randrange(lemons) if chance.random() < 0.5 else chance.randrange(nodes)
        failures.append(_drawn(chance, at, node, node_lost=chance.random() < lost))
        at += chance.expovariate(1 / mtbf_s)
    return failures


def titan(path: Path, *, nodes: int, month: int, fold: bool) -> list[Failure]:
    """A month of Titan's GPU failures: double-bit errors (a process) and GPUs off the bus (a node).

    Args:
      path: the OLCF's table of GPU lifetimes (Ostrouchov et al., SC'20).
      nodes: of the job.
      month: which of the months from January 2016 on.
      fold: all 18,688 places onto the job's nodes, nineteen each, for hardware that fails as
        often as it does in jobs of that size; else so many of the places.
    """
    chance = random.Random(month)
    begin = datetime(2016, 1, 1).timestamp() + month * MONTH_S
    with path.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["event"] in ("DBE", "OTB")]
    places = sorted({r["location"] for r in rows})
    chance.shuffle(places)
    # Places that never failed are not in the list: the job has its share of them too.
    kept = places if fold else places[: max(1, len(places) * nodes // 18_688)]
    number = {place: i % nodes for i, place in enumerate(kept)}
    failures: list[Failure] = []
    for row in rows:
        at = datetime.fromisoformat(row["remove"]).timestamp() - begin
        if 0 <= at < MONTH_S and row["location"] in number:
            lost = row["event"] == "OTB"
            failures.append(_drawn(chance, at, number[row["location"]], node_lost=lost))
    return sorted(failures, key=lambda f: f.at_s)


def evenly(histories: Sequence[Sequence[Failure]], *, seed: int) -> list[list[Failure]]:
    """The same histories, with reach and patience drawn anew and spread evenly over all failures.

    To each failure anything may happen, as before. Over all of them the shares are what they should
    be: losses that go to the disk are few, and how many there were by chance would decide between
    policies that are alike.
    """
    chance = random.Random(f"evenly {seed}")
    count = sum(map(len, histories))
    reach, patience = (
        [(i + chance.random()) / count for i in chance.sample(range(count), count)]
        for _ in range(2)
    )
    drawn = zip(reach, patience, strict=True)
    return [
        [replace(f, reach=r, patience=p) for f, (r, p) in zip(history, drawn, strict=False)]
        for history in histories
    ]


def _drawn(chance: random.Random, at: float, node: int, *, node_lost: bool) -> Failure:
    reach, patience = chance.random(), chance.random()
    return Failure(at_s=at, node=node, node_lost=node_lost, reach=reach, patience=patience)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What the job is like. Costs as they really are."""

    name: str
    costs: Costs
    spares: int = 0
    parity: bool = True
    world_min: int = 1
    span_s: float = MONTH_S

    def wait_s(self, failure: Failure) -> float:
        """Until a process, or another node, can take the place: waits for nodes are exponential."""
        node_s = -math.log(1 - failure.patience) * self.costs.replacement_s
        return self.costs.respawn_s + (node_s if failure.node_lost else 0.0)


class Fixed:
    """Takes the first way of a list that can be taken, and writes checkpoints by the clock."""

    def __init__(self, name: str, prefer: Sequence[Option], interval_s: float) -> None:
        self.name = f"{name}, checkpoint every {interval_s / 60:g} min"
        self._prefer = prefer
        self._interval_s = interval_s

    def begin(self, scenario: Scenario) -> None:
        self._costs = scenario.costs

    def choose(self, loss: Loss) -> Option:
        wanted = next((o for o in self._prefer if not barred(o, loss)), None)
        return wanted or choose(loss, self._costs).option

    def grow(self, world: int, ready: int, remaining_s: float) -> bool:
        return True

    def interval_s(self, now: float) -> float:
        return self._interval_s

    def leaves_out(self, failure: Failure) -> bool:
        """Whether another node is taken in the place of the one that failed, for good."""
        return False

    def saw(self, failure: Failure, wait_s: float, cost_s: float) -> None:
        """Told what a failure cost in the end."""


class Policy:
    """The product's policy, with what it has learnt so far."""

    name = "policy"

    def begin(self, scenario: Scenario) -> None:
        # It has to learn how long replacements take; the rest is measured by every job.
        self._costs = replace(scenario.costs, replacement_s=Costs(world=1).replacement_s)
        self._scenario = scenario
        self._parity = scenario.parity
        self._spares = scenario.spares
        self._rate = FailureRate(prior_mtbf_s=PRIOR_MTBF_S / DEVICES)
        self._waits = [self._costs.replacement_s]
        self._reached = [0, 0, 0]  # beyond memory, beyond parity, of failures
        self._fleet = Offenders()
        for node in range(scenario.costs.world):
            self._fleet.seen(str(node), 0.0)
        self._looked_s = 0.0
        self._prices = {False: [0.0, 0.0], True: [0.0, 0.0]}
        """Of failures that take the node, and of others: lost seconds, and how many."""
        self._kinds: dict[int, list[int]] = {}
        """By node: failures, and those that took it."""
        self._reckon_shares()

    def choose(self, loss: Loss) -> Option:
        self._reached[0] += not loss.in_memory
        self._reached[1] += not loss.in_memory and loss.parity_steps is None
        self._reached[2] += 1
        self._reckon_shares()
        return choose(loss, self._costs).option

    def _reckon_shares(self) -> None:
        known = Costs(world=1)
        beyond = posterior_share(known.beyond_memory, self._reached[0], self._reached[2])
        last = posterior_share(known.beyond_parity, self._reached[1], self._reached[2])
        last = last if self._parity else beyond
        self._costs = replace(self._costs, beyond_memory=beyond, beyond_parity=last)

    def grow(self, world: int, ready: int, remaining_s: float) -> bool:
        return growth(
            world, ready, self._costs, failures_per_s=self._rate.per_s, remaining_s=remaining_s
        ).grow

    def interval_s(self, now: float) -> float:
        self._look(now)
        return next(
            i.seconds for i in tier_intervals(self._costs, self._rate) if i.name == "checkpoint"
        )

    def leaves_out(self, failure: Failure) -> bool:
        self._look(failure.at_s)
        self._rate = self._rate.seen(failures=1)
        self._fleet.fault(str(failure.node), failure.at_s)
        kinds = self._kinds.setdefault(failure.node, [0, 0])
        kinds[0] += 1
        kinds[1] += failure.node_lost
        if self._fleet.nodes[str(failure.node)] < FAILURES_MIN:
            return False
        prices = self._failure_prices()
        advice = {
            NodeId(int(s.node)): replace(advice_of(s), cost_s=self._price_of(int(s.node), prices))
            for s in self._fleet.scores(failure.at_s)
            if s.faults >= FAILURES_MIN
        }
        out = excluded(
            advice,
            nodes=self._scenario.costs.world,
            cost_s=prices.process_s,
            spares=self._spares,
            swap_s=swap_cost(self._costs, world_min=self._scenario.world_min),
            remaining_s=self._scenario.span_s - failure.at_s,
            going={NodeId(failure.node)} if failure.node_lost else (),
        )
        return any(e.node == failure.node for e in out)

    def _failure_prices(self) -> FailurePrices:
        """As they were; of a kind that there was none of yet, by the model."""
        means = {
            lost: total / count
            if count
            else choose(Loss(world=self._costs.world, node_lost=lost), self._costs).lost_s
            for lost, (total, count) in self._prices.items()
        }
        failures, nodes = (sum(k[i] for k in self._kinds.values()) for i in (0, 1))
        return FailurePrices(
            process_s=means[False],
            node_s=means[True],
            node_share=(nodes + 0.5) / (failures + 1),
        )

    def _price_of(self, node: int, prices: FailurePrices) -> float:
        failures, nodes = self._kinds.get(node, (0, 0))
        return prices.of(failures=failures, nodes=nodes)

    def _look(self, now: float) -> None:
        """Time without failures says as much as they do, as `DecisionCosts.look` counts it."""
        self._rate = self._rate.seen(exposure_s=(now - self._looked_s) * self._costs.world)
        self._looked_s = now

    def saw(self, failure: Failure, wait_s: float, cost_s: float) -> None:
        if failure.node_lost:
            self._waits.append(wait_s - self._costs.respawn_s)
            self._costs = replace(self._costs, replacement_s=sum(self._waits) / len(self._waits))
        price = self._prices[failure.node_lost]
        price[0] += cost_s
        price[1] += 1


def advice_of(score: Score) -> NodeAdvice:
    """What recovery takes of what detection has found."""
    return NodeAdvice(
        failures=score.faults,
        failures_per_s=score.rate_per_day / DAY_S,
        fleet_per_s=score.fleet_per_day / DAY_S,
        offender=score.offender,
        name=score.node,
    )


@dataclass(slots=True)
class Month:
    """One simulated month; `play` runs it. Progress is in seconds of the full job's training."""

    scenario: Scenario
    policy: Fixed | Policy
    t: float = 0.0
    busy: float = 0.0
    """Nobody trains before."""
    progress: float = 0.0
    saved: float = 0.0
    """Progress in the newest checkpoint."""
    next_save: float = 0.0
    world: int = 0
    spares: int = 0
    ready: int = 0
    """Nodes that wait to be let in."""
    coming: list[tuple[float, int, str]] = field(default_factory=list)
    """(when, node, "world" or "spare")."""
    absent: set[int] = field(default_factory=set)
    banned: set[int] = field(default_factory=set)
    taken: dict[Option, int] = field(default_factory=dict)
    _saved_at: float = 0.0

    def play(self, failures: Iterable[Failure]) -> float:
        """Run the month through; returns goodput: progress / time."""
        self.world = self.scenario.costs.world
        self.spares = self.scenario.spares
        self.policy.begin(self.scenario)
        self.next_save = self._interval_s()
        for failure in failures:
            if failure.at_s >= self.scenario.span_s:
                break
            self._advance(failure.at_s)
            if failure.node not in self.absent and failure.node not in self.banned:
                self._fail(failure)
        self._advance(self.scenario.span_s)
        return self.progress / self.scenario.span_s

    def _advance(self, to: float) -> None:
        """Train, write checkpoints and let nodes in, until `to`."""
        while True:
            first = self.coming[0][0] if self.coming else math.inf
            then = min(to, self.next_save, first)
            spent = max(0.0, then - max(self.t, self.busy))
            self.progress += spent * self.scenario.costs.kept(self.world) * self._parity_share()
            self.t = then
            if then == to:
                return
            if then == first:
                _, node, where = heapq.heappop(self.coming)
                self.absent.discard(node)
                if where == "spare":
                    self.spares += 1
                else:
                    self.ready += 1
                self._maybe_grow()
            else:
                self._save()
                self._maybe_grow()

    def _parity_share(self) -> float:
        costs = self.scenario.costs
        return 1 - costs.parity_block_s / costs.parity_round_s if self.scenario.parity else 1.0

    def _save(self) -> None:
        if self.t >= self.busy:
            self.saved = self.progress
            self.busy = self.t + self.scenario.costs.checkpoint_block_s
            self._saved_at = self.t
        self.next_save = max(self.t, self.busy) + self._interval_s()

    def _since_saved(self) -> float:
        """What going back to the checkpoint loses: half an interval, its mean.

        The moment of a failure within an interval is luck. There are few such losses in a month,
        and a mean over a hundred months is not to be had, so it is taken here.
        """
        if not self._saved_at:
            return self.progress
        half_s = (self.next_save - self._saved_at) / 2
        return min(self.progress, half_s * self.scenario.costs.kept(self.world))

    def _interval_s(self) -> float:
        return max(self.policy.interval_s(self.t), self.scenario.costs.checkpoint_write_s)

    def _maybe_grow(self) -> None:
        left = self.scenario.span_s - self.t
        if self.ready and self.policy.grow(self.world, self.ready, left):
            self.busy = max(self.busy, self.t) + self.scenario.costs.grow_s
            self.world += self.ready
            self.ready = 0

    def _fail(self, failure: Failure) -> None:
        scenario, costs = self.scenario, self.scenario.costs
        if self.policy.leaves_out(failure):
            # The machine that comes in its place is taken for one that does not fail again.
            self.banned.add(failure.node)
            failure = replace(failure, node_lost=True)
        step_s = costs.step_time(self.world)
        in_memory = failure.reach >= costs.beyond_memory
        by_parity = scenario.parity and failure.reach >= costs.beyond_parity
        # Parity is on average half a round old, and what it was made of another half.
        parity_s = costs.parity_round_s if by_parity and not in_memory else None
        since = self._since_saved()
        loss = Loss(
            world=self.world,
            node_lost=failure.node_lost,
            in_memory=in_memory,
            snapshot_steps=0 if in_memory else None,
            parity_steps=None if parity_s is None else math.ceil(parity_s / step_s),
            disk_steps=math.ceil(since / step_s),
            done_steps=math.ceil(self.progress / step_s),
            spares=self.spares,
            world_min=scenario.world_min,
            remaining_s=scenario.span_s - self.t,
        )
        option = self.policy.choose(loss)
        self.taken[option] = self.taken.get(option, 0) + 1
        wait_s = scenario.wait_s(failure)
        before = max(self.busy, self.t), self.progress
        start = max(self.t, self.busy) + costs.detect_s + step_s / 2
        load_s = costs.state_bytes / costs.memory_bps
        self.absent.add(failure.node)
        shrinks = True
        match option:
            case Option.SPARE:
                self.busy = start + costs.regroup_s + costs.spare_s + load_s
                self.spares -= 1
                shrinks = False
                heapq.heappush(self.coming, (start + wait_s, failure.node, "spare"))
            case Option.RESPAWN | Option.CONTINUE_SMALLER:
                self.busy = start + costs.regroup_s + costs.lost_bytes / costs.memory_bps
            case Option.WAIT:
                self.busy = start + wait_s + costs.regroup_s + load_s
                shrinks = False
                self.absent.discard(failure.node)
            case Option.PARITY:
                self.busy = start + costs.regroup_s
                self.busy += (costs.lost_bytes or costs.state_bytes) / costs.parity_bps
                self.progress = max(0.0, self.progress - (parity_s or 0.0))
            case Option.RESTART_MEMORY | Option.DISK | Option.FRESH:
                self.busy = start + costs.restart_s
                self.busy += load_s if option is Option.RESTART_MEMORY else 0.0
                if option is Option.DISK:
                    self.busy += costs.state_bytes / costs.disk_bps
                    self.progress = self.saved = self.progress - since
                elif option is Option.FRESH:
                    self.progress = self.saved = 0.0
                shrinks = failure.node_lost
                if not shrinks:
                    self.absent.discard(failure.node)
            case _:
                raise AssertionError(f"{option} is not simulated")
        if shrinks and self.world - 1 < scenario.world_min:
            self.busy, shrinks = max(self.busy, start + wait_s), False
            self.absent.discard(failure.node)
        if shrinks:
            self.world -= 1
            if option is not Option.CONTINUE_SMALLER:
                heapq.heappush(self.coming, (start + wait_s, failure.node, "world"))
        cost_s = self.busy - before[0] + before[1] - self.progress
        cost_s += (1 - costs.kept(self.world)) * wait_s if shrinks else 0.0
        self.policy.saw(failure, wait_s, cost_s)
        # What was learnt may make a checkpoint due sooner.
        self.next_save = min(self.next_save, max(self.busy, self._saved_at + self._interval_s()))
