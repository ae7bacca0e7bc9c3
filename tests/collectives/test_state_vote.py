"""Who is right, when ranks differ: the vote, as a table of stories and a few laws."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.collectives.state_vote import Statement, Strategy, Tie, elect
from ftkit.core.errors import ProtocolError

POPULAR, RECEIVE, SEND = Strategy.POPULAR, Strategy.RECEIVE_ONLY, Strategy.SEND_ONLY


def says(*hashes, strategy=POPULAR, revision=5, previous=4, layout=1):
    return Statement(
        strategy=strategy, revision=revision, previous=previous, layout=layout, hashes=hashes
    )


def test_where_all_hold_the_same_there_is_nothing_to_do():
    result = elect([says(7, 8)] * 3)
    assert result.clean
    assert (result.elected, result.revision) == ((7, 8), 5)


def test_one_that_differs_is_outvoted_tensor_by_tensor():
    result = elect([says(7, 8, 9), says(7, 0, 9), says(7, 8, 1)])
    assert result.elected == (7, 8, 9)
    assert result.differing == ((), (1,), (2,))
    assert result.holders == ((0, 1, 2), (0, 2), (0, 1))
    assert not result.refusal


def test_one_against_one_is_refused_and_nobody_is_blamed():
    result = elect([says(7, 8), says(7, 0)], names=["bias", "weight"])
    assert result.refusal == (
        "no majority for weight: ranks [0] and ranks [1] differ, with 1 votes each"
    )
    assert result.undecided == (1,)


def test_a_tie_goes_to_the_camp_of_the_lowest_rank_where_that_was_asked_for():
    told = [says(3, strategy=RECEIVE), says(1), says(2), says(2), says(1)]
    result = elect(told, tie=Tie.LOWEST_RANK)
    assert result.elected == (1,)
    assert result.differing == ((0,), (), (0,), (0,), ())
    assert result.holders == ((1, 4),)


def test_more_votes_than_any_other_are_enough():
    assert elect([says(1), says(2), says(3), says(2)]).elected == (2,)


def test_a_newcomer_neither_votes_nor_sends():
    newcomers = [says(9, strategy=RECEIVE, revision=0, previous=None)] * 3
    result = elect([says(7), *newcomers])
    assert result.elected == (7,)
    assert result.holders == ((0,),)
    assert result.differing == ((), (0,), (0,), (0,))
    assert not result.told, "it is no fault of theirs"
    alone = elect(newcomers)
    assert "nobody has the state" in alone.refusal


def test_what_one_may_only_send_becomes_everybodys():
    result = elect([says(1), says(1), says(2, strategy=SEND)])
    assert result.elected == (2,)
    assert result.differing == ((0,), (0,), ())


def test_two_that_may_only_send_must_hold_the_same():
    result = elect([says(1, strategy=SEND), says(2, strategy=SEND), says(2, strategy=SEND)])
    assert result.refusal == "ranks [0] may only send, but do not hold what was elected"


@pytest.mark.parametrize(
    ("revisions", "revision", "told", "refused"),
    [
        ([5, 5, 5], 5, set(), False),
        ([5, 4, 5], 5, {1}, False),  # one that is behind
        ([5, 7, 5], 5, {1}, False),  # one that leapt ahead
        ([6, 6, 6], 5, {0, 1, 2}, True),
        ([4, 4, 4], 4, set(), False),  # nobody has gone on: the last one, repeated
        ([4, 4, 5], 5, {0, 1}, False),  # somebody has
        ([3, 3, 3], 5, {0, 1, 2}, True),
    ],
)
def test_the_revision_advances_by_exactly_one_or_it_is_told_why_not(
    revisions, revision, told, refused
):
    result = elect([says(r, revision=r) for r in revisions])
    assert result.revision == revision
    assert set(result.told) == told
    assert bool(result.refusal) == refused
    for rank in told:
        assert result.told[rank] == (
            f"rank {rank} offers revision {revisions[rank]}; "
            f"the ranks agreed on revision 4 last, so {revision} is due"
        )


def test_the_highest_of_what_ranks_remember_is_the_last_agreement():
    result = elect([says(1, previous=2, revision=3), says(1), says(1, previous=None)])
    assert set(result.told) == {0}


def test_at_the_very_beginning_most_ranks_say_where_they_stand():
    first = [says(1, revision=9, previous=None), *[says(2, revision=4, previous=None)] * 2]
    result = elect(first)
    assert (result.revision, set(result.told)) == (4, {0})


def test_one_that_may_only_send_cannot_be_behind():
    result = elect([says(1), says(1, strategy=SEND, revision=2)])
    assert "rank 1 offers revision 2" in result.refusal


def test_other_tensors_than_the_others_are_named_and_nothing_is_counted():
    result = elect([says(1), says(1, layout=2), says(1), says(1, strategy=RECEIVE, layout=3)])
    assert "ranks [1, 3] hold tensors of other names, dtypes or shapes than ranks [0, 2]" in (
        result.refusal
    )
    assert not result.elected


votes = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=7)


@given(votes, st.sampled_from(Tie))
def test_the_elected_version_has_the_most_votes_and_a_holder(hashes, tie):
    result = elect([says(*h) for h in hashes], tie=tie)
    for tensor in (0, 1):
        counts = Counter(h[tensor] for h in hashes)
        assert counts[result.elected[tensor]] == max(counts.values())
        assert result.holders[tensor]
        for rank, own in enumerate(hashes):
            differs = own[tensor] != result.elected[tensor]
            assert (tensor in result.differing[rank]) == differs
            assert (rank in result.holders[tensor]) != differs
    assert bool(result.refusal) == (bool(result.undecided) and tie is Tie.REFUSE)


@given(
    st.builds(
        Statement,
        strategy=st.sampled_from(Strategy),
        revision=st.integers(0, 2**40),
        previous=st.none() | st.integers(0, 2**40),
        layout=st.integers(0, 2**64 - 1),
        hashes=st.lists(st.integers(0, 2**64 - 1)).map(tuple),
    )
)
def test_a_statement_is_read_as_it_was_written(statement):
    assert Statement.parse(statement.pack()) == statement


@given(st.binary(max_size=60))
def test_noise_is_no_statement_or_a_well_formed_one(noise):
    try:
        parsed = Statement.parse(noise)
    except ProtocolError:
        return
    assert parsed.pack() == noise
