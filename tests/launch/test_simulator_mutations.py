"""Each invariant of the protocol, taken away: the simulator must notice, and say which it was.

A mutation is the smallest change to the product's own code that breaks one rule. What no mutation
can break is not checked by anybody.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ftkit.core.ids import Generation, Step
from ftkit.launch import simulator_hosts, simulator_rank
from ftkit.launch.simulator import Simulation
from ftkit.launch.simulator_checks import SimulationFailure
from ftkit.recovery import protocol
from ftkit.recovery.facts import Stage
from ftkit.recovery.member import Duty
from ftkit.recovery.plan import Mode
from ftkit.recovery.vote import Tally

Patch = pytest.MonkeyPatch
SEEDS = 250


def takes_over_with_older_numbers(patch: Patch) -> None:
    real = simulator_hosts.adopt

    def adopt(copies: Any, *, term: Any) -> Any:
        plan = real(copies, term=term)
        oldest = min(c.next_generation for c in copies)
        return replace(plan, next_generation=Generation(min(plan.next_generation, oldest) - 1))

    patch.setattr(simulator_hosts, "adopt", adopt)


def does_not_wait_until_all_stand_still(patch: Patch) -> None:
    real = protocol._standing

    def standing(plan: Any, facts: Any) -> Any:
        return [
            replace(f, stage=Stage.HALTED, generation=max(f.generation, plan.halted))
            if f.stage is Stage.ACTIVE
            else f
            for f in real(plan, facts)
        ]

    patch.setattr(protocol, "_standing", standing)


def goes_back_behind_a_commit(patch: Patch) -> None:
    real = protocol._enter

    def lowest(plan: Any, members: Any, step: Any, **words: Any) -> Any:
        return real(plan, members, Step(min(f.step or 0 for f in members)), **words)

    patch.setattr(protocol, "_enter", lowest)


def takes_along_who_is_dead(patch: Patch) -> None:
    real = protocol._standing

    def standing(plan: Any, facts: Any) -> Any:
        dead = [
            replace(f, stage=Stage.HALTED, generation=max(f.generation, plan.halted))
            for f in facts.members.values()
            if f.stage is Stage.DEAD and f.step is not None and protocol._in_world(plan, f.member)
        ]
        return [*real(plan, facts), *dead]

    patch.setattr(protocol, "_standing", standing)


def ended_plans_go_on(patch: Patch) -> None:
    real = simulator_hosts.adopt

    def adopt(copies: Any, *, term: Any) -> Any:
        plan = real(copies, term=term)
        return replace(plan, mode=Mode.HALTING) if plan.mode is Mode.ENDED else plan

    patch.setattr(simulator_hosts, "adopt", adopt)


def believes_what_was_said_before_the_halt(patch: Patch) -> None:
    real = protocol._standing

    def standing(plan: Any, facts: Any) -> Any:
        return [
            replace(f, generation=max(f.generation, plan.halted)) if f.stage is Stage.HALTED else f
            for f in real(plan, facts)
        ]

    patch.setattr(protocol, "_standing", standing)


def takes_no_new_agent_for_the_end_of_the_old(patch: Patch) -> None:
    patch.setattr(protocol, "_lost_with_agent", lambda seat, facts: False)


def lets_in_who_was_torn_in_set_up(patch: Patch) -> None:
    patch.setattr(protocol, "_torn_in_setup", lambda plan, member: False)


def reduces_without_all(patch: Patch) -> None:
    patch.setattr(simulator_rank, "tally", lambda ballots: Tally())
    patch.setattr(simulator_rank.SimRank, "_complete", lambda self, got: True)


def heeds_no_plan(patch: Patch) -> None:
    patch.setattr(simulator_rank, "react", lambda me, plan: (Duty.NOTHING, None))


@pytest.mark.parametrize(
    ("mutation", "said"),
    [
        (takes_over_with_older_numbers, "I1: "),
        (does_not_wait_until_all_stand_still, "I2: "),
        (goes_back_behind_a_commit, "I3: "),
        (takes_along_who_is_dead, "I4: "),
        (ended_plans_go_on, "I5: "),
        (believes_what_was_said_before_the_halt, "I6: "),
        (takes_no_new_agent_for_the_end_of_the_old, "no end within"),  # I7
        (lets_in_who_was_torn_in_set_up, "set-up torn"),
        (reduces_without_all, "reduced slots"),
        (heeds_no_plan, "no end within"),
    ],
)
def test_an_invariant_that_is_broken_is_named(
    mutation: Callable[[Patch], None], said: str, monkeypatch: Patch
) -> None:
    mutation(monkeypatch)
    seen: set[str] = set()
    for seed in range(SEEDS):
        try:
            Simulation(seed).run()
        except SimulationFailure as failure:
            first = str(failure).splitlines()[0]
            if re.search(said, first):
                return
            seen.add(first)
    pytest.fail(f"{SEEDS} seeds did not say {said!r}, but {sorted(seen)[:5]}")
