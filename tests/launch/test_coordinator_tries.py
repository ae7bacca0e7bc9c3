"""A coordinator that cannot lead is given up on; one that is killed is replaced for ever."""

import pytest

from ftkit.core import exit_codes
from ftkit.launch.coordinator_tries import KILLED_S, LED_S, TRIES_MAX, CoordinatorTries


@pytest.mark.parametrize(("lived_s", "error"), [(0.9 * LED_S, "a full disk"), (0.5 * KILLED_S, "")])
def test_those_that_end_early_in_a_row_end_the_job(lived_s: float, error: str) -> None:
    tries = CoordinatorTries()
    ends = [tries.ended(lived_s=lived_s, error=error) for _ in range(TRIES_MAX)]
    assert ends[:-1] == [None] * (TRIES_MAX - 1)
    assert ends[-1] is not None
    assert ends[-1].code == exit_codes.UNRECOVERABLE
    assert error in ends[-1].reason


@pytest.mark.parametrize(("lived_s", "error"), [(1.1 * LED_S, "a bug"), (1.1 * KILLED_S, "")])
def test_one_that_led_begins_the_count_anew(lived_s: float, error: str) -> None:
    tries = CoordinatorTries()
    for _ in range(3 * TRIES_MAX):
        assert tries.ended(lived_s=0.0, error="a bug") is None
        assert tries.ended(lived_s=lived_s, error=error) is None
