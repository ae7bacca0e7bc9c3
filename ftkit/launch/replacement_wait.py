"""ReplacementWait: has those who are left wait for a replacement where that is decided, and no longer.

The judgement is `recovery.waiting`; this knows since when they wait. It is asked while a world forms and answers
with a level (`JobFacts.wait`): a coordinator that takes over while they wait knows no costs and has them go on.
"""

from dataclasses import replace

from ftkit.core.ids import Generation
from ftkit.launch.decision_costs import DecisionCosts
from ftkit.recovery.facts import ALIVE, JobFacts, MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan
from ftkit.recovery.policy import Loss
from ftkit.recovery.protocol import Decision, gone
from ftkit.recovery.waiting import OnLoss, Waiting, waiting


class ReplacementWait:
    """Of the coordinator's thread."""

    def __init__(self, wish: OnLoss = OnLoss.AUTO) -> None:
        self._wish = wish
        self._halted: Generation | None = None
        """The generation that ended by the loss that was judged last."""
        self._left = 0
        """How many were left as it was."""
        self._since = 0.0
        self._judged: Waiting | None = None

    def look(
        self, plan: Plan, facts: JobFacts, known: DecisionCosts, now: float
    ) -> tuple[str, list[Decision]]:
        """Why those who are left stand still, "" where they do not, and what was decided by this look.

        Args:
          plan: as it stands.
          facts: what is known of its members.
          known: the costs of the job; looked up when there is something to judge.
          now: seconds.
        """
        world = plan.world
        if plan.mode is not Mode.FORMING or world is None:
            return "", []
        left = [
            f
            for m in world.member_ids
            if (f := facts.members.get(m)) is not None
            and f.stage in ALIVE
            and not gone(plan, facts, m)
        ]
        lost = len(world.members) - len(left)
        if not left or not lost or not all(_can_wait(f) for f in left):
            return "", []
        # With no snapshot of all shards there is nothing to go on from, sooner or later.
        if not facts.snapshots or facts.approximation is not None:
            return "", []
        if _standing_by(plan, facts) >= lost:
            return "", []
        if (self._halted, self._left) != (plan.halted, len(left)):
            # One more that dies meanwhile is judged anew, and waited for no longer.
            self._since = self._since if self._halted == plan.halted else now
            self._halted, self._left = plan.halted, len(left)
            away = facts.nodes_lost | facts.nodes_away | facts.draining
            loss = Loss(
                world=len(world.members),
                lost=lost,
                node_lost=any(s.node in away for s in plan.seats),
            )
            self._judged = waiting(loss, known.costs, self._wish)
            if not (self._judged.wait and self._late(now)):
                return self._told([_decision(self._judged)])
        if self._judged is not None and self._judged.wait and self._late(now):
            reason = f"go on with {len(left)} ranks: the replacement is not there after "
            reason += f"{now - self._since:.3g} s"
            self._judged = replace(self._judged, wait=False, reason=reason)
            return self._told([_decision(self._judged)])
        return self._told([])

    def _late(self, now: float) -> bool:
        return self._judged is not None and now - self._since > self._judged.limit_s

    def _told(self, decisions: list[Decision]) -> tuple[str, list[Decision]]:
        waits = self._judged is not None and self._judged.wait
        return (self._judged.reason if self._judged is not None and waits else ""), decisions


def _can_wait(member: MemberFacts) -> bool:
    """Whether it holds a shard, and is not through with training."""
    return member.sharded and member.stepping and member.stage is not Stage.DONE


def _standing_by(plan: Plan, facts: JobFacts) -> int:
    """Those who can be taken in at once: hot spares, and newcomers that had come so far."""
    assert plan.world is not None, "there was one"
    return sum(
        f.stage in (Stage.READY, Stage.LINKED) and f.stepping and f.sharded
        for s in plan.seats
        if (f := facts.members.get(s.member)) is not None
        and plan.world.rank_of(s.member) is None
        and not gone(plan, facts, s.member)
    )


def _decision(judged: Waiting) -> Decision:
    action = "wait" if judged.wait else "go-on"
    return Decision(action=action, reason=judged.reason, fields={"costs": judged.to_json()})
