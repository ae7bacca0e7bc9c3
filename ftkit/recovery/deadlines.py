"""Deadlines of recovery: for whom a job waits in vain, where no collective tells. Pure.

The detector judges who keeps others waiting in a collective. While a job halts, regroups and loads
there is none yet: these are the waits that end by the clock alone.
"""

from collections.abc import Collection, Iterable
from typing import Final

from ftkit.core.ids import MemberId, NodeId
from ftkit.core.world import World
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan

#: Stages of a member that has said hello and has to answer to the plan.
ANSWERING: Final = frozenset({Stage.READY, Stage.LINKED, Stage.ACTIVE, Stage.HALTED})

#: Loading state may take this many times what a step may keep others waiting.
RESTORE_LIMITS: Final = 3


def restless(
    plan: Plan,
    members: Iterable[MemberFacts],
    *,
    halting_s: float,
    standing_s: float,
    halt_s: float,
    limit_s: float,
    away: Collection[NodeId],
) -> dict[MemberId, str]:
    """Members for whom a job that stands still waits, with the reason.

    One cannot even say where it stands. Another has, and keeps its shards, which only its training
    thread can let go of (I8): that hangs.

    Args:
      plan: the newest; not RUNNING.
      members: all that are known.
      halting_s: for how long no world has trained.
      standing_s: the same, since all nodes of the newest world were in reach.
      halt_s: a member may take so long to stand still.
      limit_s: a training thread may take so long.
      away: nodes out of reach: theirs cannot have heard.
    """
    late: dict[MemberId, str] = {}
    for m in members:
        if plan.seat_of(m.member) is None:
            continue
        moves = m.stage is Stage.ACTIVE or (m.stage in ANSWERING and m.generation < plan.halted)
        if plan.mode is Mode.HALTING and moves and halting_s > halt_s:
            late[m.member] = f"did not stand still within {halt_s:g} s of being told to"
        elif (
            m.stage is Stage.HALTED
            and m.sharded
            and m.stepping
            and m.node not in away
            and standing_s > limit_s
        ):
            late[m.member] = f"did not let go of its shards within {limit_s:g} s of being told to"
    return late


def latecomers(
    world: World,
    members: Iterable[MemberFacts],
    *,
    waited_s: float,
    limit_s: float,
    away: Collection[NodeId],
    waiting: Collection[MemberId],
) -> dict[MemberId, str]:
    """Members whose control thread answers and whose training thread does not come, with the reason.

    While a node of the world is out of reach, its members cannot have heard, and the others wait
    for them.

    Args:
      world: the newest.
      members: all that are known.
      waited_s: since it was to be entered, with all its nodes in reach.
      limit_s: a training thread may take so long.
      away: nodes out of reach.
      waiting: who stands in a collective: having loaded, they wait for those that have not.
    """
    if any(m.node in away for m in world.members):
        return {}
    late: dict[MemberId, str] = {}
    loading: dict[MemberId, str] = {}
    for m in members:
        if m.member not in world.member_ids or m.stage not in ANSWERING:
            continue
        if m.generation < world.generation and waited_s > limit_s:
            late[m.member] = f"did not enter generation {world.generation} within {limit_s:g} s"
        elif m.step is None and waited_s > RESTORE_LIMITS * limit_s:
            loading[m.member] = (
                f"did not load its state within {RESTORE_LIMITS * limit_s:g} s of entering "
                f"generation {world.generation}"
            )
    # Where all of them wait, nobody is known to keep the others.
    slow = {m: reason for m, reason in loading.items() if m not in waiting}
    return late | (slow or loading)


def keeps_out(world: World, members: Iterable[MemberFacts]) -> dict[MemberId, str]:
    """The one member of a world that stands still (`Fault.STALL`), where others wait to be let in.

    Nobody of its world waits for it, so the detector names nobody; and a newcomer is let in between
    two of its steps, of which there are no more.
    """
    if world.size > 1 or not any(
        m.stage is Stage.LINKED and m.member not in world.member_ids for m in members
    ):
        return {}
    (alone,) = world.members
    return {alone.member: "stands still alone, and keeps others from being let in"}
