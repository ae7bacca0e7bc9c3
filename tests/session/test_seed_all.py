"""What is drawn in a slot depends on its key alone, and to say so is cheap."""

import random
import traceback

import numpy
import pytest
import torch

from ftkit.session.layers import seed_all


def drawn() -> tuple[list[float], float, float]:
    return torch.rand(3).tolist(), random.random(), float(numpy.random.rand())


def test_all_three_draw_from_the_key_as_torch_seeds_itself() -> None:
    seed_all(1 << 40)
    first = drawn()
    seed_all(7)
    assert drawn() != first
    seed_all(1 << 40)
    assert drawn() == first
    torch.manual_seed(1 << 40)
    assert torch.rand(3).tolist() == first[0]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="devices are seeded, too")
def test_no_stack_is_noted_down_for_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noted: list[object] = []

    def note(*_: object) -> list[str]:
        noted.append(1)
        return []

    monkeypatch.setattr(traceback, "format_stack", note)
    seed_all(3)
    assert not noted
