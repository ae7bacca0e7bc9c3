"""A job's plan and facts as a story: members say where they stand, the plan moves."""

from dataclasses import replace

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.recovery.budget import BudgetConfig
from ftkit.recovery.facts import JobFacts, MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan, first_plan
from ftkit.recovery.protocol import advance


class Story:
    """What a coordinator sees. `says` changes a member's facts, `moves` advances the plan."""

    def __init__(self, nodes: int = 1, seats: int = 3, budget: BudgetConfig | None = None) -> None:
        self.plan: Plan = first_plan(nodes, seats)
        self.facts = JobFacts(members={})
        self.budget = budget or BudgetConfig()
        self.seats_per_node = seats
        for seat in self.plan.seats:
            self.says(seat.member, Stage.STARTING, seat=seat.seat)

    def says(self, member: int, stage: Stage, **changes: object) -> "Story":
        known = self.facts.members.get(MemberId(member))
        if known is None:
            seat = int(changes.pop("seat"))  # type: ignore[call-overload]
            known = MemberFacts(
                member=MemberId(member),
                seat=Seat(seat),
                node=NodeId(seat // self.seats_per_node),
                stage=stage,
                host="h",
                port=0 if stage is Stage.STARTING else 1000 + member,
            )
        if stage is not Stage.STARTING and stage is not Stage.DEAD and not known.port:
            known = replace(known, port=1000 + member)
        said = replace(known, stage=stage, **changes)  # type: ignore[arg-type]
        return self.knows(members={**self.facts.members, said.member: said})

    def all_say(self, stage: Stage, **changes: object) -> "Story":
        for seat in self.plan.seats:
            self.says(seat.member, stage, **changes)
        return self

    def knows(self, **changes: object) -> "Story":
        self.facts = replace(self.facts, **changes)  # type: ignore[arg-type]
        return self

    def moves(self) -> list[str]:
        self.plan, decisions = advance(self.plan, self.facts, self.budget)
        if self.plan.mode is Mode.FORMING:  # asked with facts of after it began
            self.plan, more = advance(self.plan, self.facts, self.budget)
            decisions += more
        again, none = advance(self.plan, self.facts, self.budget)
        assert again == self.plan, "advance repeats moves until none is left"
        assert not none
        return [d.action for d in decisions]

    @property
    def world(self) -> list[int]:
        assert self.plan.world is not None
        return [m.member for m in self.plan.world.members]

    @property
    def generation(self) -> int:
        assert self.plan.world is not None
        return self.plan.world.generation


def training(step: int = 5, *, nodes: int = 1, seats: int = 3) -> Story:
    """A job whose first world trains, `step` steps committed."""
    story = Story(nodes, seats)
    story.all_say(Stage.READY)
    assert story.moves() == ["form"]
    story.all_say(Stage.ACTIVE, generation=Generation(1), step=Step(step), stepping=True)
    assert story.moves() == []
    return story


def newcomer(step: int = 5) -> Story:
    """Seat 0's process died, the others resumed, and member 3 is linked to them."""
    story = training(step)
    story.says(0, Stage.DEAD, exit_code=-9)
    story.moves()
    for member in (1, 2):
        story.says(member, Stage.HALTED, generation=Generation(1))
    assert story.moves() == ["resume"]
    for member in (1, 2):
        story.says(member, Stage.ACTIVE, generation=Generation(2))
    story.says(3, Stage.READY, seat=0, generation=Generation(1), stepping=True)
    story.moves()
    story.says(3, Stage.LINKED, linked=Generation(2))
    return story
