"""The cut of a pipeline in each world, from what its ranks tell."""

import pytest

from ftkit.core.errors import ProtocolError
from ftkit.recovery.stages import Told, agree, heard

COSTS = [1.0] * 8


def test_nobody_has_measured_anything_yet() -> None:
    agreed = agree(COSTS, [Told()] * 4, seats=4)
    assert agreed.cut.bounds == (0, 2, 4, 6, 8)
    assert "costs given" in agreed.reason


def test_a_stage_is_lost_and_its_layers_go_where_there_is_time() -> None:
    """The layers of the lost stage 1 are the slow ones: two ranks share them with the rest."""
    seconds = {i: 3.0 if i in (2, 3) else 1.0 for i in range(8)}
    told = [Told(seconds=seconds, held=range(a, b)) for a, b in ((0, 2), (4, 6), (6, 8))]
    agreed = agree(COSTS, told, seats=4)
    assert agreed.cut.bounds == (0, 3, 6, 8)
    assert agreed.cut.slowest_s == 5.0
    assert agreed.moved == 2, "those of the lost stage and no others"
    assert "measured" in agreed.reason


@pytest.mark.parametrize(
    ("held", "bounds"),
    [((range(2), range(2, 4)), (0, 2, 5)), ((range(1, 3), range(3, 5)), (0, 3, 5))],
)
def test_of_equal_cuts_the_one_that_moves_the_least(
    held: tuple[range, ...], bounds: tuple[int, ...]
) -> None:
    """Five layers over two stages are two and three, or three and two; the last stage is lost,
    or the first.
    """
    seconds = dict.fromkeys(range(5), 1.0)
    agreed = agree([1.0] * 5, [Told(seconds=seconds, held=h) for h in held], seats=3)
    assert agreed.cut.bounds == bounds
    assert agreed.moved == 1


def test_back_at_full_size_the_first_cut_is_in_force_again() -> None:
    slow = {i: 1.0 + i for i in range(8)}
    first = agree(COSTS, [Told()] * 4, seats=4)
    again = agree(COSTS, [Told(seconds=slow, held=range(4))] * 3 + [Told()], seats=4)
    assert again.cut.bounds == first.cut.bounds
    assert "every seat" in again.reason


def test_what_nobody_measured_costs_what_the_script_believes() -> None:
    """Layers 0 and 1 took 2 s for a cost of 1: the other two, of cost 3, take 6 s."""
    told = [Told(seconds={0: 2.0, 1: 2.0}, held=range(2))] * 2
    agreed = agree([1.0, 1.0, 3.0, 3.0], told, seats=3)
    assert agreed.cut.slowest_s == pytest.approx(10.0)
    assert agreed.cut.bounds == (0, 3, 4)


def test_ranks_that_heard_other_figures_settle_on_the_middle() -> None:
    told = [Told(seconds={0: s}) for s in (1.0, 5.0, 2.0)] + [Told(seconds={0: 0.0})]
    assert heard(told, 2) == {0: 2.0}


def test_more_ranks_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 layers cannot fill 3 stages"):
        agree([1.0, 1.0], [Told()] * 3, seats=3)
    with pytest.raises(ValueError, match="costs something"):
        agree([1.0, 0.0], [Told()], seats=1)


def test_what_is_told_survives_the_wire() -> None:
    told = Told(seconds={3: 0.25, 0: 1e-4}, held=range(3, 5))
    assert Told.unpack(told.pack()) == told
    for wrong in (b"", b"[]", b'{"seconds": 1, "held": [0, 1]}', b'{"seconds": {}}'):
        with pytest.raises(ProtocolError):
            Told.unpack(wrong)
