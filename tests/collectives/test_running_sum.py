"""RunningSum: what it sums, which buffers it gives back, and how ranks' sums are added."""

import pytest
import torch

from ftkit.collectives.running_sum import RunningSum, by_rank
from ftkit.collectives.slots import leaf
from ftkit.core.ids import Slot


def test_what_is_pushed_is_summed_and_buffers_come_back() -> None:
    total = RunningSum()
    assert not total.nodes
    first, second = torch.ones(3), torch.full((3,), 2.0)
    total.push(5, first)
    total.push(2, second)
    assert total.nodes[0].value.tolist() == [3.0, 3.0, 3.0]
    assert 5 in total
    assert 4 not in total
    assert total.spare() is second
    assert total.spare() is None
    with pytest.raises(ValueError, match="summed already"):
        total.push(5, second)
    total.clear()
    assert total.spare() is first
    assert not total.nodes


def test_a_rank_without_slots_adds_nothing_and_the_others_are_numbered_without_it() -> None:
    total = RunningSum()
    total.push(3, torch.ones(1))
    held = [(Slot(0),), (), (Slot(3), Slot(4))]
    nodes, division = by_rank(total.nodes, held, 2)
    assert division == ((0,), (), (1,))
    assert nodes[0].node == leaf(1, 2)
    assert by_rank((), held, 1) == ([], division)
