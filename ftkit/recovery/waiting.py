"""Waiting: whether those who are left go on smaller, or stand still until the replacement is there. Pure.

Where the state is in shards, going on smaller is paid for twice: the mesh is built and the shards are dealt
for the smaller world, and once more as the replacement is let in. A replacement that is there within
seconds may be worth the wait; one that takes long never is. ::

    smaller   (1 - kept) * join + grow        join: until a process that was ordered can be let in
    wait      join                            grow: how long all stand still to let it in

The user's word comes first. Without one, and until steps, growth and arrival were measured in this job, it goes on
smaller: that is never wrong by more than one growth, and a wait may be wrong by any time.
"""

from dataclasses import dataclass
from enum import StrEnum

from ftkit.recovery.costs import Costs
from ftkit.recovery.policy import Loss, Option, Price, price


class OnLoss(StrEnum):
    """What the user wants done about a loss."""

    AUTO = "auto"
    """What loses least, by measured costs."""
    SMALLER = "smaller"
    """Go on smaller at once."""
    WAIT = "wait"
    """Stand still until every rank is there again, wherever the job can."""


#: What has to be measured before anybody is made to wait for it.
MEASURED = ("step_s", "grow_s", "respawn_s")
#: The wait has to be so many times as cheap: both sides are estimates, and it is the one that can go wrong.
MARGIN = 1.2
#: A replacement that takes so many times as long as they did so far is waited for no longer.
PATIENCE = 3.0
#: Nor is one less than this much late.
PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What is done about a loss, with both ways in lost seconds."""

    wait: bool
    reason: str
    smaller: Price
    waited: Price
    limit_s: float
    """For so long at most."""
    measured: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        return {
            "taken": (Option.WAIT if self.wait else Option.RESPAWN).value,
            "reason": self.reason,
            "table": [self.waited.to_json(), self.smaller.to_json()],
            "measured": list(self.measured),
        }


def waiting(loss: Loss, costs: Costs, wish: OnLoss = OnLoss.AUTO) -> Waiting:
    """Judge one loss of which the survivors have the state, in shards.

    Args:
      loss: what is gone.
      costs: of the job; `measured` says which are its own.
      wish: the user's. It wins over any price.
    """
    smaller, waited = price(Option.RESPAWN, loss, costs), price(Option.WAIT, loss, costs)
    missing = [name for name in MEASURED if name not in costs.measured]
    cheaper = _apart(waited) * MARGIN < _apart(smaller)
    limit_s = PATIENCE * costs.respawn_s + PATIENCE_S
    if waited.barred or (smaller.barred and not waited.barred):
        wait, why = not waited.barred, waited.barred or smaller.barred
    elif wish is not OnLoss.AUTO:
        wait, why = wish is OnLoss.WAIT, f"--on-loss {wish.value} asks for it"
    elif loss.node_lost:
        wait, why = False, "nobody knows when another node comes"
    elif missing:
        wait, why = False, f"not measured yet in this job: {', '.join(missing)}"
    else:
        wait, why = cheaper, "it loses less"
        if not wait and waited.lost_s < smaller.lost_s:
            why = f"a wait has to be {MARGIN} times as cheap"
    if wait and (wish is OnLoss.WAIT or smaller.barred):
        limit_s = float("inf")
    what = "wait for the replacement" if wait else f"go on with {loss.survivors} ranks"
    told = [
        f"{name} is barred" if p.barred else f"{name} loses {p.lost_s:.3g} s"
        for name, p in (("to wait", waited), ("to go on smaller", smaller))
    ]
    return Waiting(
        wait=wait,
        reason=f"{what}: {why}; {', '.join(told)}",
        smaller=smaller,
        waited=waited,
        limit_s=limit_s,
        measured=tuple(sorted(costs.measured)),
    )


def _apart(way: Price) -> float:
    """What a way costs beyond what both do."""
    return way.lost_s - sum(way.terms.get(n, 0.0) for n in ("detect", "regroup", "recompute"))
