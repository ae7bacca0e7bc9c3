"""An agent tells more often while nothing moves, and knows when it was late itself."""

import pytest

from ftkit.launch.pace import Pace


def run(seconds: float, still: float | None) -> int:
    """How many reports in `seconds`, looking on time; `still` is how long nothing has moved."""
    pace, now, told = Pace(look_s=0.1, tick_s=0.5, next_look=0.0), 0.0, 0
    while now < seconds:
        assert pace.woke(now)
        if pace.tells(now, still):
            pace.reported(now)
            told += 1
        now = pace.next_look
    return told


@pytest.mark.parametrize(
    ("still", "reports"), [(None, 20), (0.1, 20), (0.5, 100), (2.0, 40), (100.0, 20)]
)
def test_the_longer_it_lasts_the_less_often(still, reports) -> None:
    assert run(10.0, still) == pytest.approx(reports, abs=reports * 0.3)


def test_lateness_is_told_once() -> None:
    pace = Pace(look_s=0.1, tick_s=0.5, next_look=1.0)
    assert not pace.woke(0.9)
    assert pace.woke(1.01)  # within what any host is late
    assert pace.woke(pace.next_look + 0.4)
    assert pace.reported(2.0) == pytest.approx(0.4)
    assert pace.reported(3.0) == 0.0
