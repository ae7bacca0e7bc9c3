"""What a reshaped world must move, counted by hand."""

from benchmarks.elastic import COPIES, must_move


def test_rows_that_stay_in_their_seat_are_not_moved() -> None:
    # 12 rows of 5: seats had 3 each, and have 4: they lack 1, 2 and 3 of them.
    assert must_move([(12, 5)], 4, 3) == (1 + 2 + 3) * 5 * 4 * COPIES
    # And back: seats have 3 each, of which the second keeps 2, the third 1, the fourth none.
    assert must_move([(12, 5)], 3, 4) == (0 + 1 + 2 + 3) * 5 * 4 * COPIES


def test_nothing_moves_where_nothing_changes_and_sizes_need_not_divide() -> None:
    assert must_move([(12, 5), (7,)], 4, 4) == 0
    # 7 rows over 4: 2 2 2 1; over 3: 3 3 1.
    assert must_move([(7,)], 4, 3) == (1 + 2 + 1) * 4 * COPIES
