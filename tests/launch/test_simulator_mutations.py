"""Each invariant of the protocol, taken away: the simulator must notice, and say which it was.

A mutation is the smallest change to the product's own code that breaks one rule. What no mutation
can break is not checked by anybody. I7 and the exchanges of a step have theirs in `test_simulator`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ftkit.core.ids import Generation, Step
from ftkit.launch import simulator, simulator_hosts
from ftkit.launch.simulator import Simulation
from ftkit.launch.simulator_checks import SimulationFailure
from ftkit.recovery import plan as plan_module
from ftkit.recovery import protocol
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Mode

Patch = pytest.MonkeyPatch
SEEDS = 100


def takes_over_with_older_numbers(patch: Patch) -> None:
    real = plan_module.adopt

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
    real = plan_module.adopt

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


def lets_in_who_was_torn_in_set_up(patch: Patch) -> None:
    patch.setattr(protocol, "_torn_in_setup", lambda plan, member: False)


def begins_anew_without_a_word(patch: Patch) -> None:
    patch.setattr(simulator, "SHARDED", 1.0)
    patch.setattr(protocol, "_shards_lost", lambda facts: "")


def forms_a_world_while_shards_are_written(patch: Patch) -> None:
    """Takes those for ready who have not given up their shards yet."""
    patch.setattr(simulator, "SHARDED", 1.0)
    real = protocol.advance

    def advance(plan: Any, facts: Any, budget: Any) -> Any:
        members = {
            m: replace(f, stage=Stage.READY, step=None)
            if f.stage is Stage.HALTED and f.sharded
            else f
            for m, f in facts.members.items()
        }
        return real(plan, replace(facts, members=members), budget)

    patch.setattr(simulator_hosts, "advance", advance)


def takes_a_shard_for_the_whole_state(patch: Patch) -> None:
    patch.setattr(simulator, "SHARDED", 1.0)
    patch.setattr(protocol, "_gives_up", lambda member: False)


@pytest.mark.parametrize(
    ("mutation", "said", "first"),
    [
        (takes_over_with_older_numbers, "I1: ", 3),
        (does_not_wait_until_all_stand_still, "I2: ", 3),
        (goes_back_behind_a_commit, "I3: ", 62),
        (takes_along_who_is_dead, "I4: ", 0),
        (ended_plans_go_on, "I5: ", 2),
        (believes_what_was_said_before_the_halt, "I6: ", 8),
        (lets_in_who_was_torn_in_set_up, "set-up torn", 4),
        (begins_anew_without_a_word, "I8: the job begins anew", 2),
        (forms_a_world_while_shards_are_written, "I8: a world begins while", 0),
        (takes_a_shard_for_the_whole_state, "I8: a world begins", 1),
    ],
)
def test_an_invariant_that_is_broken_is_named(
    mutation: Callable[[Patch], None], said: str, first: int, monkeypatch: Patch
) -> None:
    mutation(monkeypatch)
    seen: set[str] = set()
    for seed in range(first, first + SEEDS):  # most of them are found by the first
        try:
            Simulation(seed).run()
        except SimulationFailure as failure:
            why = str(failure).splitlines()[0]
            if said in why:
                return
            seen.add(why)
    pytest.fail(f"{SEEDS} seeds did not say {said!r}, but {sorted(seen)[:5]}")
