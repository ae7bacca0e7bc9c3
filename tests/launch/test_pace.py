"""An agent tells more often while nothing moves, and knows when it was late itself."""

import pytest

from ftkit.launch.pace import Pace, Rest


def run(seconds: float, still: float | None, *, soonest: float = 0.1) -> int:
    """How many reports in `seconds`, looking on time; `still` is how long nothing has moved."""
    pace = Pace(look_s=0.1, report_s=max(0.5, soonest), soonest_s=soonest, next_look=0.0)
    now, told = 0.0, 0
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


@pytest.mark.parametrize(("still", "reports"), [(None, 20), (0.5, 33), (100.0, 20)])
def test_among_many_nodes_none_tells_more_often_than_all_can_be_heard(still, reports) -> None:
    assert run(10.0, still, soonest=0.3) == pytest.approx(reports, abs=reports * 0.2)
    assert run(10.0, still, soonest=1.0) == pytest.approx(10, abs=1)


def test_lateness_is_told_once() -> None:
    pace = Pace(look_s=0.1, report_s=0.5, soonest_s=0.1, next_look=1.0)
    assert not pace.woke(0.9)
    assert pace.woke(1.01)  # within what any host is late
    assert pace.woke(pace.next_look + 0.4)
    assert pace.reported(2.0) == pytest.approx(0.4)
    assert pace.reported(3.0) == 0.0


def test_looks_leave_the_coordinator_time_for_what_comes_in() -> None:
    rest = Rest(tick_s=0.5)
    assert rest.due(10.0)
    rest.looked(10.0, 10.01)
    assert not rest.due(10.02)
    assert rest.owed
    assert rest.until == pytest.approx(10.1)
    assert [rest.due(10.11), rest.owed] == [True, False]
    rest.looked(11.0, 21.0)
    assert rest.until == pytest.approx(21.5), "a slow look does not keep it from the next tick"
