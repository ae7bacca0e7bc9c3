"""What a vote makes of layers on their way."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Generation, Step
from ftkit.recovery.migration import VOTES_MAX, Ruling, Said, Stand, ruling
from ftkit.recovery.vote import Ballot

READY, MOVING = Said(7, Stand.READY, False), Said(7, Stand.MOVING, False)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ([READY, READY, READY], Ruling.SWITCH),
        ([READY, MOVING, READY], Ruling.GO_ON),
        ([READY, replace(READY, stand=Stand.FAILED)], Ruling.DROP),
        ([READY, replace(READY, move=8)], Ruling.DROP),
        ([READY, Said(0, Stand.NONE, False)], Ruling.DROP),
        ([READY, replace(READY, joining=True)], Ruling.DROP),
    ],
)
def test_what_follows(said: list[Said], found: Ruling) -> None:
    assert ruling(7, said, votes=1)[0] is found


def test_it_does_not_take_for_ever() -> None:
    assert ruling(7, [READY, MOVING], votes=VOTES_MAX - 1)[0] is Ruling.GO_ON
    found, reason = ruling(7, [READY, MOVING], votes=VOTES_MAX)
    assert found is Ruling.DROP
    assert "[1]" in reason


@given(
    st.lists(
        st.builds(Said, st.sampled_from([0, 7]), st.integers(0, 3), st.booleans()), min_size=1
    ),
    st.integers(1, 2 * VOTES_MAX),
)
def test_a_switch_needs_everybody(said: list[Said], votes: int) -> None:
    found, reason = ruling(7, said, votes=votes)
    everybody = all(s == READY for s in said)
    assert (found is Ruling.SWITCH) == everybody
    assert bool(reason) == (found is not Ruling.GO_ON)


@given(st.integers(0, (1 << 63) - 1), st.sampled_from(Stand))
def test_it_travels_on_the_ballot(move: int, stand: Stand) -> None:
    ballot = Ballot(generation=Generation(1), step=Step(2), move=move, stand=stand, costs={3: 0.5})
    assert Ballot.unpack(ballot.pack()) == ballot
