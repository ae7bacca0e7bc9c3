"""The soak's own checks: right results pass, and a result that is off by anything does not."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import churn_ops
from benchmarks.churn import report
from benchmarks.churn_host import Tally
from benchmarks.churn_ops import ANYWHERE, OF_THE_WORLD, Operation, Place
from ftkit.collectives.group import Group
from ftkit.core.ids import MemberId

OPERATIONS = [*OF_THE_WORLD, *ANYWHERE]


@pytest.fixture
def alone() -> Iterator[Place]:
    with Group(member=MemberId(0), secret=bytes(16), on_fault=lambda *_: None) as group:
        yield Place(group, group.channel, 0, 1)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.__name__)
def test_what_comes_out_right_passes_and_anything_else_does_not(
    operation: Operation, alone: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(churn_ops, "COUNTS", (1000, 1000))
    issued = operation(alone, random.Random(3), 5)
    issued.handle.wait(10)
    assert issued.check() == ""
    brought, gradient = churn_ops.brought, churn_ops._gradient

    def other(function: Any) -> Any:
        def changed(*given: Any) -> Any:
            tensor = function(*given)
            tensor[-1] += 1
            return tensor

        return changed

    monkeypatch.setattr(churn_ops, "brought", other(brought))
    monkeypatch.setattr(churn_ops, "_gradient", other(gradient))
    if operation is churn_ops.exchange:
        issued = issued._replace(check=_exchanged_otherwise(alone))
    assert issued.check()


def _exchanged_otherwise(alone: Place) -> Any:
    issued = churn_ops.exchange(alone, random.Random(3), 5)
    issued.handle.wait(10)
    issued.handle._value = [b"other"]
    return issued.check


def test_a_wrong_result_voids_the_figures() -> None:
    good = report(Tally(seconds=1, repairs_s=[0.1]), {})
    bad = report(Tally(seconds=1, wrong=["generation 3, round 1: all_reduce: 1 element"]), {})
    assert not good.problems
    assert bad.problems == ["generation 3, round 1: all_reduce: 1 element"]
    assert not next(f for f in bad.figures if f.at_most == 0).holds
