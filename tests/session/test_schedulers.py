"""A scheduler stepped outside of a step is noticed, once, and one stepped inside never."""

import warnings
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau, StepLR

from ftkit.core.ids import Generation, Step
from ftkit.session.schedulers import Schedulers
from tests.session.alone import SLOTS, Points, alone, learn, net


def train(*, inside: bool, several: bool = False) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    made: list[Any] = [LinearLR(optimizer, total_iters=10)]
    if several:
        made.append(ReduceLROnPlateau(optimizer))
    with alone() as session:
        session.protect(model=model, optimizer=optimizer, scheduler=made if several else made[0])
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=5):
            with step:
                learn(model, step)
                optimizer.step()
                if inside:
                    made[0].step()
            if not inside:
                made[0].step()


@pytest.mark.parametrize("several", [False, True])
def test_stepped_inside_it_is_no_matter(several: bool) -> None:
    train(inside=True, several=several)


@pytest.mark.parametrize("several", [False, True])
def test_stepped_outside_it_is_told_once_where_it_happened(several: bool) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train(inside=False, several=several)
    (said,) = [w for w in told if "scheduler" in str(w.message)]
    assert "changed between step 1 and step 2" in str(said.message)
    assert "Step it inside, after the optimizer" in str(said.message)
    assert said.filename == __file__


def scheduler() -> StepLR:
    made = StepLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 1)
    made.optimizer.step()  # or torch would miss it
    return made


def test_what_a_repair_restored_is_no_change_by_the_script() -> None:
    one = scheduler()
    known = Schedulers(one)
    known.begin(Step(1), Generation(1))
    known.committed(Generation(1))
    one.step()
    known.begin(Step(2), Generation(2))
    known.committed(Generation(2))
    one.step()
    with pytest.warns(UserWarning, match="between step 2 and step 3"):
        known.begin(Step(3), Generation(2))


def test_without_schedulers_there_is_nothing_to_compare() -> None:
    known = Schedulers(None)
    known.committed(Generation(1))
    known.begin(Step(2), Generation(1))
