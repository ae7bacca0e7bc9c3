"""The recovery protocol: every mode, every cause, every move of the job's plan.

Rule 1: whatever decides how a job gets from "a member is gone" to "training again" lives in
this file. Rule 2: no I/O and no clock. `advance` is told what is (the facts) and answers
with what should be (the next plan); agents and ranks make it so and report new facts. ::

                 every seat READY                  a member gone, halted or evicted
      FORMING ---------------------> RUNNING ----------------------------> HALTING
         ^                           |  ^  |                               |  |
         |           newcomers LINKED|  |  |all FINISHED     all settled:  |  |
         |           -> joining ->   +--+  v                 RESUME        |  |
         |           all switch by vote   ENDED <--- stop    (-> RUNNING) -+  |
         +--------------------------------------------------------------------+
                    nobody left standing, or some had not begun to step

Facts are levels: whatever still holds is reported again, so moves need no acknowledgement
and a lost message costs one tick. What the ranks do on their side is `member.react`.

Invariants (tests/recovery and the simulator check them on every state they reach):

* I1  Generations never fall, and none is issued twice: `next_generation` only rises.
* I2  A world is entered in two ways only: from standing still, when nobody is active in any
      older generation (`resumed`), or by a vote that all members of the older world cast
      (`joining`).
* I3  Whoever saw a vote pass has committed; if anyone did, all of that world had voted.
      So at RESUME the step is the highest any survivor reports, and those one behind that
      had voted roll forward with the gradients they hold. Nobody's step ever falls.
* I4  A member that is dead, evicted or on a lost node is in no world issued afterwards.
* I5  A plan that ended stays ended.
* I6  A decision rests only on members that have acknowledged the halt it follows: what a
      member said before may have changed since. A new term ends everything older first
      (`adopt`): the predecessor's last plan may still be on its way to a member.
* I7  No member is started twice: its seat names the life of the agent (`boot`) that starts
      it, and when that is over so is the member, whether or not anybody knew it.
* I8  A world of shards begins from the newest snapshot of which every shard is left, once nobody
      changes any. Where there is none the job ends with the reason; it begins anew only where it
      had none yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ftkit.core import exit_codes
from ftkit.core.ids import Generation, MemberId, NodeId, Step
from ftkit.core.world import Member, World
from ftkit.recovery import partition
from ftkit.recovery.budget import BudgetConfig, describe_exit, exit_status, next_attempt, respawn
from ftkit.recovery.facts import ALIVE, JobFacts, MemberFacts, Stage
from ftkit.recovery.ladder import Rung
from ftkit.recovery.partition import Cut
from ftkit.recovery.placement import place
from ftkit.recovery.plan import Assignment, Mode, Plan, Stop

#: In this step, or before, a job of shards may have no whole snapshot yet: the first is of step
#: 2, and all ranks have sealed it by the vote for step 4.
FIRST_SNAPSHOT_BY = Step(4)

#: By how many steps a job of shards goes back for a fault, at most: a rank that dies has sealed all
#: but the last two it committed, and before the first snapshot there is the beginning.
SHARDS_BACK = 3

#: Why innocent members are replaced: they had not begun to step, so their work is not a
#: transaction that could be played again.
RESTART = "the job starts over: a member was lost before the first step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One move, in words for people and fields for the event stream."""

    action: str
    reason: str
    fields: dict[str, object] = field(default_factory=dict)


def advance(plan: Plan, facts: JobFacts, budget: BudgetConfig) -> tuple[Plan, list[Decision]]:
    """The next plan, and why. Repeats moves until none is left; pure.

    Stops where FORMING begins: ask again with facts of after that.

    Args:
      plan: the job's plan as it stands.
      facts: everything known of the members at this moment.
      budget: how much failure the job takes.
    """
    decisions: list[Decision] = []
    while plan.mode is not Mode.ENDED:
        facts = _with_lost(plan, facts)
        moved = _one_move(plan, facts, budget)
        if moved is None:
            break
        before, (plan, told) = plan, moved
        decisions += told
        if plan.mode is Mode.FORMING and before.mode is not Mode.FORMING:
            break  # what can be restored, and is worth waiting for, is asked only now
    return plan, decisions


def gone(plan: Plan, facts: JobFacts, member: MemberId) -> bool:
    """Whether `member` can be in no world any more (I4)."""
    seat = plan.seat_of(member)
    if seat is None or member in plan.evicted or seat.node in facts.nodes_lost:
        return True
    if _lost_with_agent(seat, facts):
        return True
    known = facts.members.get(member)
    return known is not None and known.stage is Stage.DEAD


Move = tuple[Plan, Decision]


def _one_move(
    plan: Plan, facts: JobFacts, budget: BudgetConfig
) -> tuple[Plan, Sequence[Decision]] | None:
    if moved := _whatever_mode(plan, facts):
        return moved[0], [moved[1]]
    if replaced := _replace_dead(plan, facts, budget):
        return replaced
    match plan.mode:
        case Mode.FORMING:
            moved = _form(plan, facts, budget)
        case Mode.RUNNING:
            moved = _run(plan, facts)
        case Mode.HALTING:
            moved = _resume(plan, facts, budget)
        case Mode.ENDED:
            moved = None
    return moved and (moved[0], [moved[1]])


def _whatever_mode(plan: Plan, facts: JobFacts) -> Move | None:
    if facts.interrupted:
        return _end(plan, Stop(code=exit_codes.INTERRUPTED, reason=facts.interrupted))
    if facts.refused:
        return _end(plan, Stop(code=exit_codes.USAGE, reason=facts.refused))
    return _finish(plan, facts) or _assign(plan, facts) or _evict(plan, facts)


def _end(plan: Plan, stop: Stop) -> Move:
    ended = plan.revised(mode=Mode.ENDED, stop=stop, halted=_issued(plan), joining=None)
    return ended, Decision(action="end", reason=stop.reason, fields={"code": stop.code})


def _with_lost(plan: Plan, facts: JobFacts) -> JobFacts:
    """The facts, with those members dead that were lost with their agent (I7).

    The agent that has come since cannot tell of them, nor can a coordinator that has come
    since.
    """
    lost = {
        s.member: replace(
            facts.members.get(s.member)
            or MemberFacts(member=s.member, seat=s.seat, node=s.node, stage=Stage.DEAD),
            stage=Stage.DEAD,
            exit_code=None,
        )
        for s in plan.seats
        if _lost_with_agent(s, facts)
    }
    return replace(facts, members={**facts.members, **lost}) if lost else facts


def _lost_with_agent(seat: Assignment, facts: JobFacts) -> bool:
    """Whether the agent that started the seat's member is no more; who had finished, had."""
    known = facts.members.get(seat.member)
    if seat.boot is None or (known is not None and known.stage is Stage.FINISHED):
        return False
    return facts.boots.get(seat.node, seat.boot) != seat.boot


def _assign(plan: Plan, facts: JobFacts) -> Move | None:
    """Have agents that are heard of for the first time start their seats."""
    fresh = [s for s in plan.seats if s.boot is None and s.node in facts.boots]
    if not fresh:
        return None
    reason = f"the agents of nodes {sorted({s.node for s in fresh})} are up"
    moved: dict[NodeId, str] = {}
    seats = {s.seat: s for s in plan.seats}
    for seat in fresh:
        node, why = seat.node, ""
        if node in facts.advised:
            node, why = place(replace(plan, seats=tuple(seats.values())), seat, facts)
        seats[seat.seat] = replace(seat, node=node, boot=facts.boots[node])
        if why:
            moved[seat.node] = f"node {node} in place of node {seat.node}: {why}"
    return plan.revised(seats=tuple(seats.values())), Decision(
        action="assign",
        reason="; ".join([reason, *moved.values()]),
        fields={"seats": [s.seat for s in fresh]} | ({"avoided": sorted(moved)} if moved else {}),
    )


def _evict(plan: Plan, facts: JobFacts) -> Move | None:
    """Take in what detection wants removed."""
    fresh = {
        m: reason
        for m, reason in facts.evictions.items()
        if m not in plan.evicted and _alive(facts, m) and plan.seat_of(m)
    }
    if not fresh:
        return None
    return plan.revised(evicted={**plan.evicted, **fresh}), Decision(
        action="evict", reason="; ".join(fresh.values()), fields={"members": sorted(fresh)}
    )


def _replace_dead(
    plan: Plan, facts: JobFacts, budget: BudgetConfig
) -> tuple[Plan, list[Decision]] | None:
    """Give the seats of dead processes to new ones, or stop the job.

    Only once a process is really gone: two incarnations of a seat never share its arena. All at
    once: where a thousand have died the facts are not looked through a thousand times.
    """
    lost = [
        (seat, dead)
        for seat in plan.seats
        if (dead := facts.members.get(seat.member)) is not None
        and (
            dead.stage is Stage.DEAD
            or (dead.stage is Stage.FINISHED and seat.member in plan.evicted)
        )
    ]
    if not lost:
        return None
    seats, evicted, restarts = {s.seat: s for s in plan.seats}, dict(plan.evicted), plan.restarts
    step = max((max(f.step or 0, f.at_step - 1) for f in facts.members.values()), default=0)
    decisions = list[Decision]()
    broken = moved = False
    for seat, dead in lost:
        at = replace(plan, seats=tuple(seats.values())) if moved else plan
        member = MemberId(plan.next_member + len(decisions))
        next_seat = _next_in(
            at, seat, dead, facts, budget, step=Step(step), restarts=restarts, member=member
        )
        if isinstance(next_seat, Stop):
            ended, decision = _end(plan, next_seat)
            return ended, [decision]
        if next_seat is None:
            continue  # its turn comes later
        assigned, why = next_seat
        if assigned.node in facts.draining:
            continue  # once its agent is gone, and another has come
        seats[seat.seat] = assigned
        restarts += not dead.drilled
        reason = evicted.pop(seat.member, describe_exit(dead.exit_code))
        if assigned.failures > 1:
            reason += f"; {assigned.failures} in a row without progress"
        reason += f"; on node {assigned.node} now: {why}" if why else ""
        moved |= bool(why)
        broken |= plan.world is not None and seat.member in plan.world.member_ids
        fields: dict[str, object] = {"seat": seat.seat, "member": assigned.member}
        fields["dead"] = seat.member
        decisions.append(
            Decision(
                action="respawn",
                reason=f"member {seat.member} in seat {seat.seat} {reason}",
                fields=fields | ({"node": assigned.node, "avoided": seat.node} if why else {}),
            )
        )
    if not decisions:
        return None
    halts = broken and plan.mode is Mode.RUNNING
    return plan.revised(
        mode=Mode.HALTING if halts else plan.mode,
        halted=_issued(plan) if halts else plan.halted,
        seats=tuple(seats.values()),
        evicted=evicted,
        next_member=MemberId(plan.next_member + len(decisions)),
        restarts=restarts,
    ), decisions


def _next_in(
    plan: Plan,
    seat: Assignment,
    dead: MemberFacts,
    facts: JobFacts,
    budget: BudgetConfig,
    *,
    step: Step,
    restarts: int,
    member: MemberId,
) -> tuple[Assignment, str] | Stop | None:
    """Who fills the seat of a dead process, and why on another node; or the reason to stop.

    None: nobody yet, for those before failed there as well.
    """
    outside_cause = dead.exit_code is None or seat.member in plan.evicted
    if plan.world is None and not dead.port and not outside_cause:
        return Stop(
            code=exit_status(dead.exit_code),
            reason=f"the process in seat {seat.seat} {describe_exit(dead.exit_code)} "
            "before it joined the job" + (f":\n{dead.error}" if dead.error else ""),
        )
    drained = seat.node in facts.draining and (dead.exit_code == exit_codes.STOPPED or dead.ours)
    blameless = drained or dead.drilled or plan.evicted.get(seat.member) == RESTART
    next_seat = respawn(
        replace(seat, failures=seat.failures - 1) if blameless else seat,
        dead,
        step=step,
        restarts=restarts,
        counts=not dead.drilled,
        member=member,
        config=budget,
    )
    if isinstance(next_seat, Stop):
        return next_seat
    attempt = next_attempt(next_seat, dead, budget)
    if facts.dead_s.get(dead.member, attempt.wait_s) < attempt.wait_s:
        return None
    if attempt.rung is not Rung.IN_PROCESS:
        facts = replace(facts, advised={seat.node: attempt.reason, **facts.advised})
    node, why = place(plan, next_seat, facts)
    return replace(next_seat, node=node, boot=facts.boots.get(node)), why


def _finish(plan: Plan, facts: JobFacts) -> Move | None:
    """End when every seat's process is through, or the world's are and newcomers remain."""
    expected = [s.member for s in plan.seats]
    if plan.mode is Mode.RUNNING and plan.world is not None:
        expected = [m.member for m in plan.world.members]
    here = (facts.members.get(m) for m in expected)
    if any(f is None or f.stage is not Stage.FINISHED for f in here):
        return None
    if any(m in plan.evicted for m in expected):
        # Told to leave, it left; a process that exits with 0 then has not finished its work.
        return None
    return _end(plan, Stop(code=0, reason="every rank finished"))


def _form(plan: Plan, facts: JobFacts, budget: BudgetConfig) -> Move | None:
    """Enter the first world, or one after everybody died, once every seat is ready.

    Of sharded state nobody has enough to go on from: those who are left enter a world from the
    snapshots, too, in shards of another size, and do not wait for empty seats.

    A member with state may come back meanwhile, its node having been out of reach: then the
    job goes on from it, if it was in the last world, and without it otherwise.
    """
    returned = [
        f
        for f in _standing(plan, facts)
        if (f.stage is Stage.HALTED and not _gives_up(f)) or _torn_in_setup(plan, f)
    ]
    if returned and all(f.generation >= plan.halted for f in returned):
        if any(f.stage is Stage.HALTED and _has_state(plan, f) for f in returned):
            return _resume(plan, facts, budget)
        evicted = {**plan.evicted, **{f.member: RESTART for f in returned}}
        return plan.revised(evicted=evicted), Decision(
            action="restart",
            reason=f"members {sorted(f.member for f in returned)} come from an older world, "
            "or from setting up in the last one",
        )
    ready = _reshaped(plan, facts)
    if not ready or (facts.wait and len(ready) < (facts.world_max or len(plan.seats))):
        ready = _all_ready(plan, facts)
    if not ready or facts.awaited:
        return None
    seated, ready = len(ready), _chosen(plan, facts, ready)
    mixed = facts.approximation
    step = mixed.step if mixed else Step(max(facts.snapshots, default=0))
    if not step and (lost := _shards_lost(facts)):
        return _end(plan, Stop(code=exit_codes.UNRECOVERABLE, reason=lost))
    what = f"from the snapshot of step {step}" if step else "from the beginning"
    what += f", of which {mixed.describe()}" if mixed else ""
    who = f"{seated} of {len(plan.seats)} seats are ready"
    if seated > len(ready):
        who += f", {seated - len(ready)} of them stand by"
    return _enter(
        replace(plan, approximation=mixed), ready, step, action="form", reason=f"{who}, {what}"
    )


def _chosen(plan: Plan, facts: JobFacts, ready: list[MemberFacts]) -> list[MemberFacts]:
    """As many of those who are ready as a world has; the others are spare.

    First those of the last world, then as evenly over the nodes as their seats are.
    """
    if not facts.world_max or len(ready) <= facts.world_max:
        return ready
    per_node = max(facts.per_node, 1)
    before = plan.world.member_ids if plan.world is not None else frozenset()
    order = sorted(ready, key=lambda f: (f.member not in before, f.seat % per_node, f.seat))
    return sorted(order[: facts.world_max], key=lambda f: f.seat)


def _all_ready(plan: Plan, facts: JobFacts) -> list[MemberFacts]:
    """The members of all seats, none while one of them is not ready."""
    ready: list[MemberFacts] = []
    for seat in plan.seats:
        known = facts.members.get(seat.member)
        if known is None:
            return []
        if known.stage in (Stage.DONE, Stage.FINISHED):
            continue
        if not _is_ready(plan, known) or gone(plan, facts, seat.member):
            return []
        ready.append(known)
    return ready


def _reshaped(plan: Plan, facts: JobFacts) -> list[MemberFacts]:
    """Those who can go on with sharded state, without waiting for seats that are filled anew.

    Everybody that is left of the last world is among them, and a newcomer that has come so far.
    None while somebody is still to give up its state, or may still write to its arena: what is
    kept in memory is final only then (I6).
    """
    last = [w for w in (plan.world, plan.joining) if w is not None]
    before = frozenset().union(*(w.member_ids for w in last))
    here = [
        f
        for s in plan.seats
        if (f := facts.members.get(s.member)) is not None and s.node not in facts.nodes_lost
    ]
    left = [f for f in here if f.member in before and f.stage in ALIVE]
    if any(f.stage is not Stage.DONE and not _is_ready(plan, f) for f in left):
        return []
    if any(s.member in before and s.member not in facts.members for s in plan.seats):
        return []  # its agent has not spoken to this coordinator yet
    ready = [
        f
        for f in here
        if _is_ready(plan, f) and f.sharded and f.stepping and not gone(plan, facts, f.member)
    ]
    return ready if any(f.member in before for f in ready) else []


def _is_ready(plan: Plan, member: MemberFacts) -> bool:
    """Whether `member` can enter any world, holding nothing of an older one."""
    return member.stage in (Stage.READY, Stage.LINKED) and member.generation >= plan.halted


def _gives_up(member: MemberFacts) -> bool:
    """Whether `member` is about to let go of its state, to be READY: shards make no witness."""
    return member.sharded and member.stepping


def _shards_lost(facts: JobFacts) -> str:
    """Why a job that has trained may not begin anew without a word; empty when it may."""
    step = max((f.at_step for f in facts.members.values()), default=Step(0))
    if step <= FIRST_SNAPSHOT_BY or not any(f.sharded for f in facts.members.values()):
        return ""
    lost = facts.lacking or "shards of every step in memory are lost"
    advice = "Keep parity on other nodes (--parity), or checkpoints (--checkpoint-dir)"
    if not any(f.allowed for f in facts.members.values()):
        advice += (
            "; protect(..., allow_approximate=True) lets a job go on with older or averaged values "
            "in place of lost ones"
        )
    return f"{lost} and nothing else has them; the job was in step {step}. {advice}"


def _run(plan: Plan, facts: JobFacts) -> Move | None:
    """Notice that the world is broken, has grown, or could grow."""
    world = plan.world
    assert world is not None, "RUNNING has a world"
    here = [facts.members[m] for m in world.member_ids if m in facts.members]

    if broken := [m for m in world.member_ids if gone(plan, facts, m)]:
        return _halt(plan, f"members {sorted(broken)} are gone")
    # A member whose generation is older than the last world entered from standing still is on
    # its way in. Later ones come only from having entered: that member's world broke, even
    # when the world has grown since. Those that had no state yet say READY instead.
    if halted := [
        f.member
        for f in here
        if f.stage in (Stage.HALTED, Stage.READY, Stage.LINKED) and f.generation >= plan.resumed
    ]:
        return _halt(plan, f"members {sorted(halted)} report a broken generation")
    # A grown world is entered from LINKED: a newcomer that is READY again missed its admission.
    if plan.resumed < world.generation and (
        fallen := [f.member for f in here if f.stage is Stage.READY]
    ):
        return _halt(plan, f"members {sorted(fallen)} lost a link as they were let in")
    known = {world.generation, *([plan.joining.generation] if plan.joining else [])}
    if strays := [
        f.member
        for f in here
        if f.stage is Stage.ACTIVE and f.generation > world.generation and f.generation not in known
    ]:
        return _halt(plan, f"members {sorted(strays)} switched to a withdrawn world")

    if plan.joining and any(
        f.stage is Stage.ACTIVE and f.generation == plan.joining.generation for f in here
    ):
        new = plan.joining
        added = sorted(m.seat for m in new.members if m.member not in world.member_ids)
        left = sorted(m.seat for m in world.members if m.member not in new.member_ids)
        reason = f"seats {added} are in the world" if added or not left else ""
        if left:
            reason += f"{'; ' if reason else ''}seats {left} have left it"
        return plan.revised(world=new, joining=None), Decision(
            action="drained" if left and not added else "grown",
            reason=reason,
            fields={"generation": new.generation, "members": [m.seat for m in new.members]},
        )

    newcomers = [
        f
        for s in plan.seats
        if (f := facts.members.get(s.member)) is not None
        and f.stage is Stage.LINKED
        and f.linked == world.generation
        and f.member not in world.member_ids
        and not gone(plan, facts, f.member)
    ]
    newcomers = [f for f in newcomers if f.node not in facts.draining]
    stay = _staying(plan, facts, world)
    if facts.world_max:
        newcomers = newcomers[: max(0, facts.world_max - len(stay))]
    offered = plan.joining.member_ids - world.member_ids if plan.joining else frozenset()
    # One that lost a link while it waited is READY again, until it has connected anew.
    withdraw = any(
        gone(plan, facts, m) or (m in facts.members and facts.members[m].stage is Stage.READY)
        for m in offered
    )
    going = world.member_ids - {m.member for m in stay}
    if going and (plan.joining is None or going & plan.joining.member_ids):
        joining = World.of(plan.next_generation, [*stay, *(_address(f) for f in newcomers)])
        seats = sorted(m.seat for m in world.members if m.member in going)
        return plan.revised(
            joining=joining, next_generation=Generation(plan.next_generation + 1)
        ), Decision(
            action="drain",
            reason=f"the nodes of seats {seats} are about to be taken away: they leave at the end "
            "of a step",
            fields={"generation": joining.generation, "seats": seats},
        )
    if newcomers and (withdraw or not offered):
        joining = World.of(plan.next_generation, [*stay, *(_address(f) for f in newcomers)])
        return plan.revised(
            joining=joining, next_generation=Generation(plan.next_generation + 1)
        ), Decision(
            action="join",
            reason=f"seats {sorted(f.seat for f in newcomers)} are linked to all members",
            fields={"generation": joining.generation},
        )
    if withdraw:
        return plan.revised(joining=None), Decision(
            action="withdraw", reason="a newcomer was lost, or lost a link, before it was let in"
        )
    return None


def _staying(plan: Plan, facts: JobFacts, world: World) -> list[Member]:
    """The members of `world` whose nodes stay; all of them where none would."""
    draining = {s.member for s in plan.seats if s.node in facts.draining}
    return [m for m in world.members if m.member not in draining] or list(world.members)


def _halt(plan: Plan, reason: str) -> Move:
    return plan.revised(mode=Mode.HALTING, halted=_issued(plan)), Decision(
        action="halt", reason=reason, fields={"generation": _issued(plan)}
    )


def _resume(plan: Plan, facts: JobFacts, budget: BudgetConfig) -> Move | None:
    """Go on with those left, once each of them stands still and has said where (I3)."""
    world = plan.world
    assert world is not None, "what was halted was a world"
    if any(m not in facts.members and not gone(plan, facts, m) for m in world.member_ids):
        return None  # its agent has not spoken to this coordinator yet
    alive = _standing(plan, facts)
    if any(f.stage is Stage.ACTIVE or f.generation < plan.halted for f in alive):
        return None
    if any(f.node in facts.nodes_away for f in alive):
        return None  # it could not be told of the world that it is to enter
    halted = [f for f in alive if f.stage is Stage.HALTED]
    # What those outside the last world could not reach says nothing of it.
    inside = [f for f in alive if _in_world(plan, f.member)]
    if any(_gives_up(f) for f in halted):
        return None
    survivors = [f for f in halted if _has_state(plan, f)]
    plan = replace(
        plan,
        cuts=partition.count(
            plan.cuts,
            inside,
            step=max((f.step for f in survivors if f.step is not None), default=Step(0)),
            halted=plan.halted,
            progress_steps=budget.progress_steps,
        ),
    )
    lasting = partition.lasting(plan.cuts, budget.cuts_max)
    if unborn := [
        f.member
        for f in alive
        if (f.stage is Stage.HALTED and not f.stepping) or _torn_in_setup(plan, f)
    ]:
        if lasting is not None:
            return _end(plan, _never_linked(lasting))
        evicted = {**plan.evicted, **{f.member: RESTART for f in alive}}
        return plan.revised(mode=Mode.FORMING, evicted=evicted, joining=None), Decision(
            action="restart",
            reason=f"members {sorted(unborn)} were still setting up",
        )
    shards = [f for f in alive if _gives_up(f) and _in_world(plan, f.member)]
    if not survivors and (lasting is None or len(shards) < 2):
        reason = "no member with state is left; starting from snapshots"
        if shards:
            reason = f"{len(shards)} members gave up their shards, to begin from snapshots"
        # Who of the growth had switched counts as left over from it: they may all have.
        return plan.revised(mode=Mode.FORMING, joining=plan.joining if shards else None), Decision(
            action="reform", reason=reason
        )
    if lasting is not None:
        needed = {f.member for f in survivors} if len(survivors) == 1 else frozenset()
        member, reason = partition.culprit(lasting, inside, needed=needed)
        return plan.revised(
            evicted={**plan.evicted, member.member: reason},
            cuts=tuple(c for c in plan.cuts if member.seat not in c.seats),
        ), Decision(action="evict", reason=reason, fields={"members": [member.member]})
    # Those that are through with training saw the last vote pass, and count as witnesses.
    through = [
        f
        for m in world.member_ids
        if (f := facts.members.get(m)) is not None and f.stage in (Stage.DONE, Stage.FINISHED)
    ]
    step = max(f.step for f in (*survivors, *through) if f.step is not None)
    forward = [f.seat for f in survivors if f.step == step - 1 and f.voted]
    reason = f"all survivors stand still; play step {step + 1} again"
    if forward:
        reason = f"step {step} was committed by some; seats {forward} roll forward to it"
    whole = replace(plan, approximation=None)
    resumed, decision = _enter(whole, survivors, step, action="resume", reason=reason)
    spare = _spares(facts, world, alive)[: max(0, facts.world_max - len(survivors))]
    if spare:
        # They are connected to all of the last world, and so to those left of it: the first vote
        # can let them in.
        joining = World.of(resumed.next_generation, [_address(f) for f in (*survivors, *spare)])
        resumed = replace(
            resumed,
            joining=joining,
            next_generation=Generation(resumed.next_generation + 1),
        )
        seats = sorted(f.seat for f in spare)
        decision = replace(
            decision,
            reason=f"{reason}; spare seats {seats} are to be let in by the next vote",
            fields={**decision.fields, "spares": seats},
        )
    return resumed, decision


def _spares(facts: JobFacts, world: World, alive: list[MemberFacts]) -> list[MemberFacts]:
    """Those who stand by, connected to every member of `world`; where there are to be any."""
    if not facts.world_max:
        return []
    return [
        f
        for f in alive
        if f.stage is Stage.LINKED
        and f.stepping
        and f.node not in facts.draining
        and f.linked == world.generation
        and world.rank_of(f.member) is None
    ]


def _enter(plan: Plan, members: list[MemberFacts], step: Step, *, action: str, reason: str) -> Move:
    world = World.of(plan.next_generation, [_address(f) for f in members])
    return plan.revised(
        mode=Mode.RUNNING,
        world=world,
        resumed=world.generation,
        step=step,
        joining=None,
        next_generation=Generation(plan.next_generation + 1),
    ), Decision(
        action=action,
        reason=reason,
        fields={
            "generation": world.generation,
            "step": step,
            "members": [m.seat for m in world.members],
        },
    )


def _standing(plan: Plan, facts: JobFacts) -> list[MemberFacts]:
    """The seated members that live, have said hello, and are not through with training."""
    return [
        f
        for s in plan.seats
        if (f := facts.members.get(s.member)) is not None
        and f.stage in ALIVE
        and f.stage not in (Stage.STARTING, Stage.DONE)
        and not gone(plan, facts, f.member)
    ]


def _has_state(plan: Plan, member: MemberFacts) -> bool:
    """Whether `member` holds the job's state: that of the last world, or of its growth.

    A member whose node was out of reach while others went on may hold a step that was
    played again without it; the same number, and perhaps not the same state.
    """
    return member.step is not None and _in_world(plan, member.member)


def _in_world(plan: Plan, member: MemberId) -> bool:
    """Whether `member` is in the last world, or in its growth."""
    worlds = [w for w in (plan.world, plan.joining) if w is not None]
    return any(w.rank_of(member) is not None for w in worlds)


def _never_linked(cut: Cut) -> Stop:
    one, other = cut.seats
    return Stop(
        code=exit_codes.UNRECOVERABLE,
        reason=f"the ranks in seats {one} and {other} could not reach each other in {cut.times} "
        "attempts to begin; check the network and its filters between their nodes",
    )


def _torn_in_setup(plan: Plan, member: MemberFacts) -> bool:
    """Whether `member` may have lost its peers in the middle of setting up with them."""
    return (
        member.stage is Stage.READY
        and not member.stepping
        and plan.world is not None
        and plan.world.rank_of(member.member) is not None
    )


def _issued(plan: Plan) -> Generation:
    """The newest generation anyone may be in."""
    return Generation(plan.next_generation - 1)


def _alive(facts: JobFacts, member: MemberId) -> bool:
    known = facts.members.get(member)
    return known is not None and known.stage in ALIVE


def _address(facts: MemberFacts) -> Member:
    return Member(
        member=facts.member,
        seat=facts.seat,
        node=facts.node,
        host=facts.host,
        port=facts.port,
    )
