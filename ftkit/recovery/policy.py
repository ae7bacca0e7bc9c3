"""The policy: which way back to training loses least, with the costs of every way beside it.

Pure. A failure leaves several ways; each has a price in *lost seconds*: seconds of the full
job's training that its end is later by. The policy takes the least of those that can be taken
here and says why each other one was not. ::

    lost = detect + regroup + transfer + recompute + degraded + idle

    degraded   (1 - kept) * time until the world is full again, or the job is over
    recompute  steps that are played again, or that an approximation sets training back by
    idle       nobody trains: processes start, or a replacement is awaited

Exact ways come before approximate ones: those are not looked at while any tier holds the state,
and never without `allow_approximate`. Of equal costs the shallower repair wins.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from ftkit.recovery.costs import Costs

#: How long a job is taken to go on when nobody said.
REMAINING_S = 86_400.0


class Option(StrEnum):
    """A way from a loss back to training; the shallowest first."""

    SPARE = "spare"
    """A hot spare takes the place; the world stays full."""
    RESPAWN = "respawn"
    """Go on smaller at once; a new process, or another node, is let in when it is ready."""
    CONTINUE_SMALLER = "continue-smaller"
    """Go on smaller until the job ends."""
    WAIT = "wait"
    """Stand still until the replacement is there."""
    RESTART_MEMORY = "restart-memory"
    """All processes anew, from the snapshot that is complete in memory."""
    PARITY = "parity"
    """Rebuild lost parts from parity; everybody goes back to the step it was made of."""
    DISK = "disk"
    """All processes anew, from the newest checkpoint."""
    STALE_SHARD = "stale-shard"
    """Only the lost shard, from its older snapshot; nobody else goes back. Approximate."""
    CHECKFREE = "checkfree"
    """A lost pipeline stage from its neighbours' weights. Approximate."""
    CHECKFREE_PLUS = "checkfree+"
    """A lost first or last stage from the one beside, which has learned its part. Approximate."""
    FRESH = "fresh"
    """Begin again."""


APPROXIMATE = frozenset({Option.STALE_SHARD, Option.CHECKFREE, Option.CHECKFREE_PLUS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What is gone, and what is left to go on from."""

    world: int
    """Ranks that trained."""
    lost: int = 1
    """Of these, gone."""
    node_lost: bool = False
    """Whether another node must be found for them; else a process starts where one was."""
    in_memory: bool = True
    """Whether survivors, with what living arenas hold, have the whole state of this step."""
    snapshot_steps: int | None = 0
    """Steps since the newest snapshot that is complete in living arenas; None: there is none."""
    parity_steps: int | None = None
    """Steps since the newest step that parity can rebuild here; None: it cannot."""
    disk_steps: int | None = None
    """Steps since the newest checkpoint; None: there is none."""
    done_steps: int = 0
    """Steps committed so far, as far as known: what beginning again would lose. It loses no
    less than the oldest copy would."""
    stale_steps: int | None = None
    """Age of the newest copy of the lost shard alone; None: nobody has one."""
    neighbours_alive: bool = False
    """Whether the lost ranks are pipeline stages whose neighbours live."""
    swapped: bool = False
    """Whether the outer stages change places on every other micro-batch, so that each has a stand-in."""
    spares: int = 0
    """Hot spares that are ready."""
    world_min: int = 1
    """Fewer ranks than this cannot train (memory, or a parallelism that must divide)."""
    salvaged: float = 0.0
    """Share of the step in flight that survivors need not play again (`salvage`)."""
    remaining_s: float | None = None
    """Training still to do; None: not known."""
    allow_approximate: bool = False
    waits: bool = True
    """Whether a replacement can be taken in from standing still, as where the state is in shards;
    where each holds all of it, it is let in by a vote of those who train."""

    def __post_init__(self) -> None:
        if not 0 <= self.lost <= self.world or self.world < 1:
            raise ValueError(f"{self.lost} of {self.world} ranks cannot be lost")
        if not 0 <= self.salvaged <= 1:
            raise ValueError(f"salvaged is a share of a step, got {self.salvaged}")
        if self.remaining_s is not None and not self.remaining_s >= 0:
            raise ValueError(f"training still to do is a time, got remaining_s={self.remaining_s}")

    @property
    def survivors(self) -> int:
        return self.world - self.lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """One row of the table: what a way costs, or why it cannot be taken."""

    option: Option
    terms: dict[str, float] = field(default_factory=dict)
    """Lost seconds by cause; empty when it cannot be taken."""
    barred: str = ""
    """Why it cannot be taken; empty when it can."""

    @property
    def lost_s(self) -> float:
        return math.inf if self.barred else sum(self.terms.values())

    def to_json(self) -> dict[str, object]:
        if self.barred:
            return {"option": self.option.value, "barred": self.barred}
        terms = {k: round(v, 4) for k, v in self.terms.items() if v}
        return {"option": self.option.value, "lost_s": round(self.lost_s, 4), "terms": terms}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to do about a loss, and the table it was read from."""

    option: Option
    reason: str
    table: tuple[Price, ...]
    """Every way: those that can be taken by rising cost, then the others."""

    @property
    def lost_s(self) -> float:
        return self.table[0].lost_s

    def to_json(self) -> dict[str, object]:
        return {
            "option": self.option.value,
            "reason": self.reason,
            "lost_s": round(self.lost_s, 4),
            "approximate": self.option in APPROXIMATE,
            "table": [price.to_json() for price in self.table],
        }


def choose(loss: Loss, costs: Costs, *, spent: Collection[Option] = ()) -> Choice:
    """The way that loses least, and the costs of all; pure.

    Args:
      loss: what is gone.
      costs: of this job.
      spent: ways that were tried and ended the same twice (`ladder`): something else is
        taken, as long as there is anything else.
    """
    order = list(Option)
    why_not = {option: barred(option, loss) for option in order}
    if any(not why and option not in spent for option, why in why_not.items()):
        again = "it was tried, and ended the same twice"
        why_not |= {option: again for option in spent if not why_not[option]}
    prices = [
        Price(option=o, barred=why) if why else Price(option=o, terms=_terms(o, loss, costs))
        for o, why in why_not.items()
    ]
    table = tuple(sorted(prices, key=lambda p: (p.lost_s, order.index(p.option))))
    best = table[0]
    others = [p for p in table[1:] if not p.barred]
    reason = f"{best.option} loses {best.lost_s:.3g} s"
    if others:
        reason += f", {others[0].option} would lose {others[0].lost_s:.3g} s"
    else:
        reason += "; there is no other way"
    return Choice(option=best.option, reason=reason, table=table)


def price(option: Option, loss: Loss, costs: Costs) -> Price:
    """What one way costs, or why it cannot be taken."""
    if why := barred(option, loss):
        return Price(option=option, barred=why)
    return Price(option=option, terms=_terms(option, loss, costs))


def barred(option: Option, loss: Loss) -> str:
    """Why `option` cannot be taken; empty when it can."""
    left = loss.survivors
    tiers = {
        "memory": loss.in_memory,
        "a snapshot": loss.snapshot_steps is not None,
        "parity": loss.parity_steps is not None,
    }
    exact = next((name for name, holds in tiers.items() if holds), "")
    match option:
        case Option.SPARE | Option.RESPAWN | Option.CONTINUE_SMALLER | Option.WAIT if not left:
            return "nobody is left to go on"
        case Option.SPARE | Option.RESPAWN | Option.CONTINUE_SMALLER | Option.WAIT if (
            not loss.in_memory
        ):
            return "survivors do not have the whole state"
        case Option.WAIT if not loss.waits:
            return "every rank holds the whole state: a replacement is let in by those who train"
        case Option.SPARE if loss.spares < loss.lost:
            return f"{loss.spares} spares are ready, {loss.lost} are needed"
        case Option.RESPAWN | Option.CONTINUE_SMALLER if left < loss.world_min:
            return f"{left} ranks are left, and training needs {loss.world_min}"
        case Option.RESTART_MEMORY if loss.snapshot_steps is None:
            return "no snapshot is complete in living arenas"
        case Option.PARITY if loss.parity_steps is None:
            return "no parity that could rebuild what is lost"
        case Option.DISK if loss.disk_steps is None:
            return "there is no checkpoint"
        case Option.STALE_SHARD | Option.CHECKFREE | Option.CHECKFREE_PLUS if exact:
            return f"{exact} has the state as it was"
        case Option.STALE_SHARD | Option.CHECKFREE | Option.CHECKFREE_PLUS if (
            not loss.allow_approximate
        ):
            return "it changes the result; allow_approximate is off"
        case Option.STALE_SHARD | Option.CHECKFREE | Option.CHECKFREE_PLUS if not left:
            return "nobody is left to go on"
        case Option.STALE_SHARD if loss.stale_steps is None:
            return "nobody has an older copy of the lost shard"
        case Option.CHECKFREE if not loss.neighbours_alive:
            return "it needs both neighbours of a lost pipeline stage"
        case Option.CHECKFREE_PLUS if not loss.swapped:
            return "it needs a pipeline that swaps its outer stages"
    return ""


def _terms(option: Option, loss: Loss, costs: Costs) -> dict[str, float]:
    """Lost seconds by cause of a way that can be taken."""
    step_s = costs.step_time(loss.world)
    again = step_s * (1 - loss.salvaged) / 2  # a failure falls into the middle of a step
    join_s = costs.respawn_s + (costs.replacement_s if loss.node_lost else 0.0)
    remaining_s = REMAINING_S if loss.remaining_s is None else loss.remaining_s
    # What these ranks bring: to the world they left, or to the full one, where others that are
    # away will be back. With whole slots a further loss may cost nothing until then.
    kept = min(
        costs.step_time(loss.world) / costs.step_time(max(1, loss.survivors)),
        costs.kept(max(1, costs.world - loss.lost)),
        1.0,
    )
    small = {
        "degraded": (1 - kept) * min(join_s, remaining_s),
        "grow": costs.grow_s if join_s < remaining_s else 0.0,
    }
    standing = loss.survivors < loss.world_min
    joining = {"idle": join_s} if standing else small
    # Everybody begins anew, those whose node is gone as soon as there is another.
    anew = {"restart": costs.restart_s}
    if loss.node_lost:
        kept_s = min(costs.replacement_s, remaining_s)
        anew |= (
            {"idle": costs.replacement_s}
            if standing or not loss.survivors
            else {"degraded": (1 - kept) * kept_s, "grow": costs.grow_s}
        )
    fetch_s = costs.lost_bytes / costs.memory_bps
    load_s = costs.state_bytes / costs.memory_bps
    terms = {"detect": costs.detect_s}
    match option:
        case Option.SPARE:
            terms |= {"regroup": costs.regroup_s + costs.spare_s, "transfer": load_s}
            terms |= {"recompute": again}
        case Option.RESPAWN:
            terms |= {"regroup": costs.regroup_s, "transfer": fetch_s, "recompute": again} | small
        case Option.CONTINUE_SMALLER:
            terms |= {"regroup": costs.regroup_s, "transfer": fetch_s, "recompute": again}
            terms |= {"degraded": (1 - kept) * remaining_s}
        case Option.WAIT:
            terms |= {"regroup": costs.regroup_s, "transfer": load_s, "recompute": again}
            terms |= {"idle": join_s}
        case Option.RESTART_MEMORY:
            assert loss.snapshot_steps is not None, "barred without"
            terms |= anew | {"transfer": load_s}
            terms |= {"recompute": again + loss.snapshot_steps * step_s}
        case Option.PARITY:
            assert loss.parity_steps is not None, "barred without"
            lost_bytes = costs.lost_bytes or costs.state_bytes
            terms |= {"transfer": lost_bytes / costs.parity_bps}
            terms |= {"recompute": again + loss.parity_steps * step_s}
            terms |= {"regroup": costs.regroup_s} | joining if loss.survivors else anew
        case Option.DISK:
            assert loss.disk_steps is not None, "barred without"
            terms |= anew | {"transfer": costs.state_bytes / costs.disk_bps}
            terms |= {"recompute": again + loss.disk_steps * step_s}
        case Option.STALE_SHARD:
            terms |= {"regroup": costs.regroup_s, "transfer": fetch_s} | joining
            terms |= {"recompute": again + costs.stale_lost_steps * step_s}
        case Option.CHECKFREE | Option.CHECKFREE_PLUS:
            terms |= {"regroup": costs.regroup_s} | joining
            terms |= {"recompute": again + costs.checkfree_lost_steps * step_s}
        case Option.FRESH:
            ages = (loss.snapshot_steps, loss.parity_steps, loss.disk_steps, loss.done_steps)
            terms |= anew | {"recompute": again + max(a or 0 for a in ages) * step_s}
    return terms
