"""The report's part about pace, from events as the coordinator writes them."""

from typing import Any

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.ledger import Ledger
from ftkit.detection.signals import StepSeen
from ftkit.launch.report_heat import Place
from ftkit.launch.report_pace import pace_section, read_pace


def ledger(
    works: dict[int, float], *, steps: int = 3, hybrid: bool = False
) -> list[dict[str, Any]]:
    told = Ledger()
    most = max(works.values())
    for step in range(1, steps + 1):
        told.add(
            {
                MemberId(seat): StepSeen(
                    member=MemberId(seat),
                    seat=Seat(seat),
                    generation=Generation(1),
                    step=Step(step),
                    at=float(step),
                    seconds={"forward": work},
                    waited_s=most - work,
                    place=f"dp={seat // 2} pp={seat % 2}" if hybrid else "",
                )
                for seat, work in works.items()
            }
        )
    return [{"kind": "steps", **fields} for fields in told.take(rest=True)]


def test_work_and_waits_of_all_events_are_gathered():
    events = [*ledger({0: 1.0, 1: 1.5, 2: 1.0}), {"kind": "step"}, {"kind": "steps"}]
    pace = read_pace(events)
    assert pace.work[1] == {1: 1.5, 2: 1.5, 3: 1.5}
    assert pace.waits.keys() == {(0, 1), (2, 1)}
    section = pace_section(events)
    assert "rank 1, step 2: 1.50 x the median" in section
    assert "rank 0 waited 1.5 s for rank 1" in section
    assert "their places" not in section


def test_a_stage_that_has_more_to_do_is_not_dark_among_its_own():
    events = ledger({0: 1.0, 1: 2.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 2.0}, hybrid=True)
    pace = read_pace(events)
    assert pace.places[5] == Place(dp=2, pp=1, tp=0)
    ratios = pace.of_roles()
    assert (ratios[1], ratios[3], ratios[5]) == (1.0, 1.0, 1.0)
    assert ratios[4] == 1.5
    assert "rank 4 (dp 2, pp 0, tp 0): 1.50 x its role&#x27;s median" in pace_section(events)


def test_without_timed_steps_there_is_no_section():
    assert pace_section([{"kind": "step"}]) == ""
