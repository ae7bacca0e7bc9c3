"""What a raised clock is worth, and that the policy counts on it."""

import pytest

from ftkit.recovery.clocks import ClockRange, speedup
from ftkit.recovery.costs import Costs
from ftkit.recovery.policy import Loss, Option, choose


def test_only_what_is_bound_by_the_clock_is_faster() -> None:
    assert speedup(1.25, 1.0) == pytest.approx(1.25)
    assert speedup(2.0, 0.5) == pytest.approx(4 / 3)
    assert speedup(3.0, 0.0) == 1.0
    with pytest.raises(ValueError, match="above 0"):
        speedup(0.0, 0.5)
    with pytest.raises(ValueError, match="between its limits"):
        ClockRange(now=300, lowest=400, highest=900)


def test_a_smaller_world_with_raised_clocks_keeps_more() -> None:
    plain, raised = Costs(world=4), Costs(world=4, clock_gain=1.2, clock_bound=1.0)
    assert plain.kept(3) == pytest.approx(0.75)
    assert raised.kept(3) == pytest.approx(0.9)
    assert raised.kept(4) == 1.0
    # What was measured in a smaller world was measured with them raised.
    measured = raised.with_measured(step_s={4: 1.0, 3: 1.1})
    assert measured.step_time(3) == pytest.approx(1.1)
    assert measured.step_time(2) == pytest.approx(1.65)


def test_the_policy_goes_on_smaller_where_clocks_make_up_for_the_loss() -> None:
    """A short rest of the job: to let somebody in again costs more than what is left to gain."""
    loss = Loss(world=4, lost=1, remaining_s=40)
    plain = Costs(world=4, respawn_s=20, grow_s=3)
    raised = Costs(world=4, respawn_s=20, grow_s=3, clock_gain=4 / 3, clock_bound=1.0)
    assert choose(loss, plain).option is Option.RESPAWN
    assert choose(loss, raised).option is Option.CONTINUE_SMALLER


def test_costs_of_clocks_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clock_gain is 0\.5"):
        Costs(world=2, clock_gain=0.5)
