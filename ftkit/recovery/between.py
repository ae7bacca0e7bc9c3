"""Between worlds: whether ranks are on their way from one world into the next. Pure."""

from collections.abc import Iterable

from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan


def between_worlds(plan: Plan, members: Iterable[MemberFacts]) -> bool:
    """Whether some of `members` are between two worlds, or in one without its state yet.

    So are those that let somebody in by their next vote: a spare links and reads their state then,
    and the step after it is the first that is not short-handed. A job of shards is formed anew after a loss; one of whole models only when nobody has any.
    """
    world = plan.world
    if world is None:
        return False
    of = [f for f in members if f.member in world.member_ids and _plays(f)]
    match plan.mode:
        case Mode.FORMING:
            return any(f.sharded for f in of)
        case Mode.HALTING:
            return bool(of)
        case _:
            return any(
                f.generation < world.generation or (f.sharded and f.step is None) for f in of
            ) or (plan.joining is not None and bool(of))


def _plays(member: MemberFacts) -> bool:
    """Whether it has played, and will again: who has given up its shards is READY."""
    stages = {Stage.ACTIVE, Stage.HALTED}
    return member.stage in (stages | {Stage.READY} if member.sharded else stages)
