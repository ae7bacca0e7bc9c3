"""What a rank does about a plan: the members' half of the protocol, pure.

`react` is asked whenever a plan arrives or the member's standing changes, and answers with
the one thing to do next. Plans are levels, so asking again does no harm.
"""

from dataclasses import dataclass
from enum import StrEnum, auto

from ftkit.core.ids import Generation, MemberId
from ftkit.core.world import World
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Mode, Plan


class Duty(StrEnum):
    """What the plan asks of a member now."""

    NOTHING = auto()
    HALT = auto()
    """Every generation up to `plan.halted` is over: end what runs, say where you stand."""
    RESUME = auto()
    """Enter `world` from standing still, at `plan.step`."""
    LINK = auto()
    """Connect to every member of `world` while they train."""
    PREPARE = auto()
    """Say in the next vote that you can switch to `world`."""
    LEAVE = auto()
    """The job goes on without you, or ends: exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A member's own view of where it is."""

    member: MemberId
    stage: Stage = Stage.STARTING
    generation: Generation = Generation(0)
    """The newest generation it has entered, or has acknowledged to be over."""
    linked: Generation = Generation(0)
    """The world it has connected to as a newcomer."""
    prepared: Generation = Generation(0)
    """The newcomers' world it is ready to switch to."""


def react(me: Standing, plan: Plan) -> tuple[Duty, World | None]:
    """The next duty, and the world it speaks of."""
    if plan.stop is not None or me.member in plan.evicted:
        return Duty.LEAVE, None
    if plan.seats and plan.seat_of(me.member) is None:
        # Another process has the seat: we were taken for dead, and woke too late.
        return Duty.LEAVE, None
    running = me.stage is Stage.ACTIVE and me.generation == plan.halted
    if me.stage not in (Stage.STARTING, Stage.DONE) and (running or me.generation < plan.halted):
        return Duty.HALT, None
    world = plan.world
    if plan.mode is not Mode.RUNNING or world is None:
        return Duty.NOTHING, None
    inside = world.rank_of(me.member) is not None
    waiting = me.stage in (Stage.READY, Stage.LINKED, Stage.HALTED)
    if inside and waiting and plan.resumed == world.generation > me.generation:
        return Duty.RESUME, world
    if not inside and waiting and me.linked < world.generation:
        return Duty.LINK, world
    joining = plan.joining
    if (
        joining is not None
        and me.stage is Stage.ACTIVE
        and me.generation == world.generation
        and me.prepared < joining.generation
    ):
        # Also who is not in it: it leaves as the others switch.
        return Duty.PREPARE, joining
    return Duty.NOTHING, None
