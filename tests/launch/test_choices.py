"""Names that a person types: what is refused, and what may have been meant."""

import pytest

from ftkit.core.errors import UsageError
from ftkit.launch.choices import chosen, near
from ftkit.launch.drill_plan import choose


def test_names_are_taken_once_in_the_order_given() -> None:
    assert chosen("stop, kill,stop,", ("kill", "stop"), option="--fault") == ["stop", "kill"]


def test_a_name_that_there_is_not_is_refused_with_the_near_one() -> None:
    with pytest.raises(UsageError, match=r"--fault: 'kil' is none of kill, stop; did you mean ki"):
        chosen("stop,kil", ("kill", "stop"), option="--fault")
    with pytest.raises(UsageError, match=r"is none of kill, stop$"):
        chosen("nonsense", ("kill", "stop"), option="--fault")


def test_capitals_do_not_hide_what_was_meant() -> None:
    assert near("KILL", ("kill", "stop")) == "; did you mean kill?"


@pytest.mark.parametrize(
    ("fault", "meant"), [("kil", "kill"), ("lose-nod", "lose-node"), ("seg-fault", "segfault")]
)
def test_a_drill_that_there_is_not(fault: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"no drill {fault!r}; .*; did you mean {meant}\\?"):
        choose(fault, None, seed=0, nproc=3, steps=100)


@pytest.mark.parametrize(
    ("at", "meant"),
    [("backwards", "backward"), ("backwrd:2", "backward"), ("all_reduce", "all-reduce")],
)
def test_a_phase_that_there_is_not(at: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"no phase {at!r}; .*; did you mean {meant}\\?"):
        choose("kill", at, seed=0, nproc=3, steps=100)


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    with pytest.raises(UsageError, match=r"in-collective, .*recovery$"):
        choose("kill", "x", seed=0, nproc=3, steps=100)
