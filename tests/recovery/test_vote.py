"""Every rank counts the same ballots and must come to the same result."""

import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.ids import Generation, Slot, Step
from ftkit.recovery.vote import Ballot, Refusal, doubtful, minority, tally

YES = Ballot(generation=Generation(3), step=Step(7), digest=11)


@given(st.integers(1, 9))
def test_equal_ballots_pass(size: int) -> None:
    result = tally([YES] * size)
    assert (result.passed, result.switch, result.loss) == (True, None, None)


@given(st.integers(3, 9), st.data(), st.sampled_from(["digest", "data_digest"]))
def test_one_that_differs_is_named(size: int, data: st.DataObject, what: str) -> None:
    who = data.draw(st.integers(0, size - 1))
    changed = replace(YES, **{what: 99})  # type: ignore[arg-type]
    result = tally([changed if rank == who else YES for rank in range(size)])
    assert not result.passed
    assert f"ranks [{who}]" in result.reason


def test_shards_differ_and_replicas_of_a_shard_do_not() -> None:
    ballots = [replace(YES, layout=rank % 2 + 1, digest=rank % 2) for rank in range(6)]
    assert tally(ballots).passed
    ballots[3] = replace(ballots[3], digest=99)
    result = tally(ballots)
    assert result.refusal is Refusal.GRADIENTS
    assert "ranks [3]" in result.reason
    assert tally([replace(YES, shape=rank // 2) for rank in range(3)]).refusal is Refusal.STATE


@pytest.mark.parametrize("change", [{"generation": Generation(4)}, {"step": Step(8)}])
def test_votes_on_different_things_do_not_pass(change: dict[str, int]) -> None:
    result = tally([YES, replace(YES, **change)])  # type: ignore[arg-type]
    assert not result.passed
    assert "different (generation, step)" in result.reason


def test_two_that_differ_are_both_suspects() -> None:
    assert minority([1, 2]) == [0, 1]
    assert minority([5, 5, 2]) == [2]
    assert minority([1, 1, 2, 2]) == [0, 1, 2, 3]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=9))
def test_minority_is_nobody_exactly_when_all_agree(values: list[int]) -> None:
    odd = minority(values)
    assert (odd == []) == (len(set(values)) == 1)
    kept = {v for i, v in enumerate(values) if i not in odd}
    assert len(kept) <= 1, "those left in the majority agree"


@given(st.lists(st.sampled_from([0, 2, 3, 4, 5]), min_size=1, max_size=6))
def test_a_switch_needs_all_and_goes_forward(prepared: list[int]) -> None:
    result = tally([replace(YES, prepared=Generation(g)) for g in prepared])
    assert result.passed
    expected = prepared[0] if len(set(prepared)) == 1 and prepared[0] > 3 else None
    assert result.switch == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), st.integers(1, 5))
def test_the_mean_loss_has_the_same_bits_for_any_world(losses: list[float], size: int) -> None:
    def count(ranks: int) -> float | None:
        shares = [
            {Slot(s): v for s, v in enumerate(losses) if s * ranks // len(losses) == rank}
            for rank in range(ranks)
        ]
        return tally([replace(YES, losses=share) for share in shares]).loss

    assert count(size) == count(1)


# ---- numbers that look wrong, and state that differs


def test_a_ballot_crosses_the_wire_with_all_it_says() -> None:
    said = replace(
        YES, state=2**64 - 1, norm=math.inf, bad_bucket=3, again=True, losses={Slot(2): 0.5}
    )
    assert Ballot.unpack(said.pack()) == said
    assert math.isnan(Ballot.unpack(replace(YES, norm=math.nan).pack()).norm)


@pytest.mark.parametrize("norm", [math.nan, math.inf, 200.0])
def test_a_rank_with_strange_numbers_is_asked_for_them_again_and_only_once(norm: float) -> None:
    usual = [replace(YES, norm=n) for n in (1.0, 1.7, 0.6)]
    strange = replace(YES, norm=norm, bad_bucket=1)
    first = tally([*usual, strange])
    assert (first.refusal, first.odd, first.doubtful) == (Refusal.NUMBERS, (3,), (3,))
    assert "ranks [3]" in first.reason
    second = tally([*usual, replace(strange, again=True)])
    assert second.passed
    assert second.doubtful == (3,)
    assert second.bad_buckets == (-1, -1, -1, 1)
    healed = tally([replace(b, again=True) for b in [*usual, replace(YES, norm=1.1)]])
    assert healed.passed
    assert healed.doubtful == ()


def test_ranks_may_differ_by_their_samples() -> None:
    assert doubtful([1.0, 3.0, 99.0]) == []
    assert doubtful([0.0, 0.0, 5.0]) == [], "where others have no gradients nothing is usual"
    assert doubtful([1e-3, 1.0]) == [1]
    assert doubtful([math.nan, 1.0, 1e9]) == [0, 2]
    assert doubtful([math.nan] * 3) == [0, 1, 2]


@given(st.lists(st.sampled_from([0.0, 1e-4, 0.3, 1.0, 99.0, 150.0, 1e9, math.nan]), max_size=9))
def test_each_norm_is_held_against_the_median_of_all_others(norms: list[float]) -> None:
    def is_bad(rank: int) -> bool:
        others = [n for r, n in enumerate(norms) if r != rank and math.isfinite(n)]
        if not math.isfinite(norms[rank]):
            return True
        return bool(others) and norms[rank] > 100 * statistics.median(others) > 0

    assert doubtful(norms) == [r for r in range(len(norms)) if is_bad(r)]


@given(st.integers(3, 9), st.data())
def test_a_rank_whose_state_differs_is_named(size: int, data: st.DataObject) -> None:
    who = data.draw(st.integers(0, size - 1))
    ballots = [replace(YES, state=8 if rank == who else 7) for rank in range(size)]
    result = tally(ballots)
    assert (result.refusal, result.odd) == (Refusal.REPLICAS, (who,))


def test_a_digest_that_nobody_else_sent_is_compared_with_none() -> None:
    assert tally([replace(YES, state=7), YES, YES]).passed
    two = tally([YES, replace(YES, state=7), YES, replace(YES, state=8)])
    assert (two.refusal, two.odd) == (Refusal.REPLICAS, (1, 3))


def test_state_that_differs_explains_strange_numbers() -> None:
    ballots = [replace(YES, state=7, norm=1.0)] * 2 + [replace(YES, state=8, norm=math.nan)]
    assert tally(ballots).refusal is Refusal.REPLICAS
