"""Plan: what the job should be, in one small document.

The coordinator advances it (`protocol.advance`), agents and ranks carry it out, and every
agent keeps the newest copy. A coordinator that dies takes nothing with it: the next one
adopts the newest copy it finds and goes on from there, one term higher. Plans are ordered
by (term, version); whoever holds a newer one ignores an older one.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum, auto
from typing import Any

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Boot, Generation, MemberId, NodeId, Seat, Step, Term
from ftkit.core.world import World
from ftkit.recovery.approximation import Approximation
from ftkit.recovery.partition import Cut


class Mode(StrEnum):
    """Where the job is. `protocol` holds the moves between them."""

    FORMING = auto()
    """No world goes on: the seats' processes start, and will form one."""
    RUNNING = auto()
    """The members of `world` train."""
    HALTING = auto()
    """Something is wrong: every member stops and says where it stands."""
    ENDED = auto()
    """Nothing more will be trained; `stop` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Why the job ends."""

    code: int
    """The exit code of `ftkit run`."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Which incarnation should fill a seat, and on which node."""

    seat: Seat
    node: NodeId
    member: MemberId
    failures: int = 0
    """Failures in a row without enough progress between them (`budget`)."""
    joined_step: Step = Step(0)
    """The step at which this incarnation was let in."""
    boot: Boot | None = None
    """The life of the node's agent that starts it, and no other does: an agent that knows
    nothing of a member was not there when it was started. None: nobody starts it yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The job's state. Immutable; `revised` makes the next version."""

    term: Term = Term(0)
    version: int = 0
    mode: Mode = Mode.FORMING
    seats: tuple[Assignment, ...] = ()
    world: World | None = None
    """The world that goes on, or went on last."""
    resumed: Generation = Generation(0)
    """The generation that was formed or resumed last. Where it is that of `world`, members
    enter it from standing still, at `step`; otherwise `world` grew by a vote."""
    step: Step = Step(0)
    """The step all members stand at when they enter generation `resumed`."""
    approximation: Approximation | None = None
    """Where parts of the state of `step` come from that nobody has; None where it is whole."""
    joining: World | None = None
    """The world that members switch to, by vote, at the end of a step. It stays here while
    HALTING: some may have switched already."""
    halted: Generation = Generation(0)
    """Every generation up to this one is over."""
    evicted: Mapping[MemberId, str] = field(default_factory=dict)
    """Members whose processes must go, with the reason."""
    cuts: tuple[Cut, ...] = ()
    """Links that were broken when the last generation ended, and how often in a row."""
    stop: Stop | None = None
    next_generation: Generation = Generation(1)
    next_member: MemberId = MemberId(0)
    restarts: int = 0
    """Processes replaced so far, all seats together."""
    _by_member: dict[MemberId, Assignment] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Filled at the first question: every member of a large world is asked for at every look."""

    @property
    def order(self) -> tuple[int, int]:
        """Plans with a higher order replace those with a lower one."""
        return (self.term, self.version)

    def revised(self, **changes: Any) -> "Plan":
        """The next version of this plan, with `changes`."""
        return replace(self, version=self.version + 1, **changes)

    def seat_of(self, member: MemberId) -> Assignment | None:
        """The seat that `member` fills in this plan, or None."""
        if not self._by_member:
            self._by_member.update((a.member, a) for a in self.seats)
        return self._by_member.get(member)

    def to_json(self) -> dict[str, object]:
        return {
            "term": self.term,
            "version": self.version,
            "mode": self.mode.value,
            "seats": [
                [a.seat, a.node, a.member, a.failures, a.joined_step, a.boot] for a in self.seats
            ],
            "world": self.world.to_json() if self.world else None,
            "resumed": [self.resumed, self.step],
            "approximation": self.approximation and self.approximation.to_json(),
            "joining": self.joining.to_json() if self.joining else None,
            "halted": self.halted,
            "evicted": [[m, r] for m, r in self.evicted.items()],
            "cuts": [[*c.seats, c.times, c.step, c.halted] for c in self.cuts],
            "stop": [self.stop.code, self.stop.reason] if self.stop else None,
            "next": [self.next_generation, self.next_member],
            "restarts": self.restarts,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            world, joining, stop = value["world"], value["joining"], value["stop"]
            mixed = value["approximation"]
            return cls(
                term=Term(int(value["term"])),
                version=int(value["version"]),
                mode=Mode(value["mode"]),
                seats=tuple(
                    Assignment(
                        seat=Seat(int(seat)),
                        node=NodeId(int(node)),
                        member=MemberId(int(member)),
                        failures=int(failures),
                        joined_step=Step(int(joined)),
                        boot=None if boot is None else Boot(str(boot)),
                    )
                    for seat, node, member, failures, joined, boot in value["seats"]
                ),
                world=None if world is None else World.from_json(world),
                resumed=Generation(int(value["resumed"][0])),
                step=Step(int(value["resumed"][1])),
                approximation=None if mixed is None else Approximation.from_json(mixed),
                joining=None if joining is None else World.from_json(joining),
                halted=Generation(int(value["halted"])),
                evicted={MemberId(int(m)): str(r) for m, r in value["evicted"]},
                cuts=tuple(
                    Cut(
                        seats=(Seat(int(one)), Seat(int(other))),
                        times=int(times),
                        step=Step(int(step)),
                        halted=Generation(int(halted)),
                    )
                    for one, other, times, step, halted in value["cuts"]
                ),
                stop=None if stop is None else Stop(code=int(stop[0]), reason=str(stop[1])),
                next_generation=Generation(int(value["next"][0])),
                next_member=MemberId(int(value["next"][1])),
                restarts=int(value["restarts"]),
            )
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise ProtocolError(f"not a plan: {value!r}") from error


#: Numbers a term may issue. Every term counts from a multiple of it, so that what one
#: coordinator issued last, and nobody who is left has seen, is never issued again.
NUMBERS_PER_TERM = 1_000_000


def first_plan(nodes: int, seats_per_node: int, *, term: Term = Term(1)) -> Plan:
    """The plan of a job that has not begun: every seat gets its first member.

    A later coordinator that finds no copy anywhere begins anew with it, in a higher term.
    """
    total = nodes * seats_per_node
    first = term * NUMBERS_PER_TERM if term > 1 else 0
    return Plan(
        term=term,
        seats=tuple(
            Assignment(seat=Seat(s), node=NodeId(s // seats_per_node), member=MemberId(first + s))
            for s in range(total)
        ),
        halted=Generation(first),
        next_generation=Generation(first + 1),
        next_member=MemberId(first + total),
    )


def adopt(copies: list[Plan], *, term: Term) -> Plan:
    """The plan a new coordinator goes on with: the newest copy, one term higher.

    Generations and members are numbered anew from the term on. The copies must be those of
    every node whose agent lives: an agent left out might hold a newer one, and its ranks
    have acted on it.
    """
    newest = max(copies, key=lambda p: p.order)
    new_term = Term(max(term, newest.term + 1))
    first = new_term * NUMBERS_PER_TERM
    next_generation = Generation(max(newest.next_generation, first))
    halted = newest.halted
    if newest.mode in (Mode.FORMING, Mode.HALTING):
        # The predecessor may have formed a world since, in a plan that is on its way to its
        # members. They say again where they stand, now that they will not follow it.
        halted = Generation(next_generation - 1)
    # A seat that no agent was to start in this copy may have been started by one that is lost with
    # the plan that said so (I7): its member gets another number.
    numbers = itertools.count(max(newest.next_member, first))
    worlds = [w for w in (newest.world, newest.joining) if w is not None]
    begun = frozenset().union(*(w.member_ids for w in worlds))
    seats = tuple(
        replace(seat, member=MemberId(next(numbers)))
        if seat.boot is None and seat.member not in begun
        else seat
        for seat in newest.seats
    )
    return replace(
        newest,
        term=new_term,
        version=0,
        seats=seats,
        halted=halted,
        next_generation=next_generation,
        next_member=MemberId(next(numbers)),
    )
