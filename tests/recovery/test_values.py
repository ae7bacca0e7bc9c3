"""What crosses process borders comes back as it was, and garbage is refused."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Boot, Generation, MemberId, NodeId, Seat, Slot, Step, Term
from ftkit.core.world import Member, World
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.partition import Cut
from ftkit.recovery.plan import Assignment, Mode, Plan, Stop
from ftkit.recovery.vote import Ballot

numbers = st.integers(0, 2**40)
words = st.text(max_size=8)
generations = numbers.map(Generation)
steps = numbers.map(Step)
members_ids = numbers.map(MemberId)
seats = numbers.map(Seat)
nodes = numbers.map(NodeId)
members = st.builds(Member, member=members_ids, seat=seats, node=nodes, host=words, port=numbers)
worlds = st.builds(World.of, generations, st.lists(members, max_size=4, unique_by=lambda m: m.seat))
plans = st.builds(
    Plan,
    term=numbers.map(Term),
    version=numbers,
    mode=st.sampled_from(Mode),
    seats=st.lists(
        st.builds(
            Assignment,
            seat=seats,
            node=nodes,
            member=members_ids,
            failures=numbers,
            joined_step=steps,
            boot=st.none() | words.map(Boot),
        ),
        max_size=4,
    ).map(tuple),
    world=st.none() | worlds,
    resumed=generations,
    step=steps,
    joining=st.none() | worlds,
    halted=generations,
    evicted=st.dictionaries(members_ids, words, max_size=3),
    cuts=st.lists(
        st.builds(
            Cut, seats=st.tuples(seats, seats), times=numbers, step=steps, halted=generations
        ),
        max_size=3,
    ).map(tuple),
    stop=st.none() | st.builds(Stop, code=st.integers(0, 255), reason=words),
    next_generation=generations,
    next_member=members_ids,
    restarts=numbers,
)
facts = st.builds(
    MemberFacts,
    member=members_ids,
    seat=seats,
    node=nodes,
    stage=st.sampled_from(Stage),
    generation=generations,
    linked=generations,
    step=st.none() | steps,
    voted=st.booleans(),
    cut=st.frozensets(members_ids, max_size=3),
    stepping=st.booleans(),
    host=words,
    port=numbers,
    pid=numbers,
    exit_code=st.none() | st.integers(-64, 255),
    error=words,
)
ballots = st.builds(
    Ballot,
    generation=generations,
    step=steps,
    digest=st.integers(0, 2**64 - 1),
    data_digest=st.integers(0, 2**64 - 1),
    prepared=generations,
    losses=st.dictionaries(
        st.integers(0, 2**32 - 1).map(Slot), st.floats(allow_nan=False), max_size=4
    ),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


def through_json(value: object) -> Any:
    return json.loads(json.dumps(value))


@given(plans)
def test_plan_comes_back(plan: Plan) -> None:
    assert Plan.from_json(through_json(plan.to_json())) == plan


@given(facts)
def test_facts_come_back(fact: MemberFacts) -> None:
    assert MemberFacts.from_json(through_json(fact.to_json())) == fact


@given(worlds)
def test_world_comes_back(world: World) -> None:
    assert World.from_json(through_json(world.to_json())) == world


@given(ballots)
def test_ballot_comes_back(ballot: Ballot) -> None:
    assert Ballot.unpack(ballot.pack()) == ballot


@pytest.mark.parametrize("kind", [Plan, MemberFacts, World, Member])
@given(value=anything)
def test_garbage_is_a_protocol_error(kind: Any, value: object) -> None:
    with pytest.raises(ProtocolError):
        kind.from_json(value)


def test_a_number_too_large_for_an_integer_is_a_protocol_error() -> None:
    # JSON has no infinity, and yet Python reads 1e999 as one.
    endless = json.loads("1e999")
    with pytest.raises(ProtocolError):
        Plan.from_json(Plan().to_json() | {"version": endless})
    with pytest.raises(ProtocolError):
        World.from_json({"generation": endless, "members": []})
    fact = MemberFacts(member=MemberId(0), seat=Seat(0), node=NodeId(0), stage=Stage.READY)
    with pytest.raises(ProtocolError):
        MemberFacts.from_json(fact.to_json() | {"port": endless})


@given(plan=plans, data=st.data())
def test_a_plan_with_one_field_replaced_is_a_plan_or_a_protocol_error(
    plan: Plan, data: st.DataObject
) -> None:
    value = plan.to_json()
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(anything)
    with contextlib.suppress(ProtocolError):
        assert isinstance(Plan.from_json(value), Plan)


@given(fact=facts, data=st.data())
def test_facts_with_one_field_replaced_are_facts_or_a_protocol_error(
    fact: MemberFacts, data: st.DataObject
) -> None:
    value = fact.to_json()
    value[data.draw(st.sampled_from(sorted(value)))] = data.draw(anything)
    with contextlib.suppress(ProtocolError):
        assert isinstance(MemberFacts.from_json(value), MemberFacts)


@given(ballot=ballots, cut=st.integers(1, 200))
def test_a_torn_ballot_is_refused(ballot: Ballot, cut: int) -> None:
    packed = ballot.pack()
    with pytest.raises(ProtocolError):
        Ballot.unpack(packed[: -min(cut, len(packed))])
    with pytest.raises(ProtocolError):
        Ballot.unpack(packed + b"\0")


@given(st.binary(max_size=120))
def test_random_bytes_are_a_ballot_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert len(Ballot.unpack(data).pack()) <= len(data)
