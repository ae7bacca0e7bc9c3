"""The report's part about pace: where each rank's time went, and whom the others waited for. Pure.

It is read from the "steps" events (`detection.ledger`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftkit.core.trace import MALFORMED
from ftkit.launch.report_heat import Place, grid_heat, ratio_to_median, step_heat, wait_heat
from ftkit.launch.report_history import Event

_AXES = ("dp", "pp", "tp")


@dataclass(slots=True)
class Pace:
    """What the events of a run say together."""

    work: dict[int, dict[int, float]] = field(default_factory=dict)
    """Seat -> step -> seconds; of a step that was played again, the last time."""
    waits: dict[tuple[int, int], float] = field(default_factory=dict)
    """(who, for whom) -> seconds in all."""
    places: dict[int, Place] = field(default_factory=dict)
    """Of the seats that have said theirs."""

    def of_roles(self) -> dict[int, float]:
        """Each seat's work against the median of its pipeline stage, in the mean over its steps."""
        found: dict[int, float] = {}
        for stage in {place.pp for place in self.places.values()}:
            peers = {s: row for s, row in self.work.items() if self._stage(s) == stage}
            for seat, ratios in ratio_to_median(peers).items():
                if ratios:
                    found[seat] = sum(ratios.values()) / len(ratios)
        return found

    def _stage(self, seat: int) -> int | None:
        return self.places[seat].pp if seat in self.places else None


def read_pace(events: Iterable[Event]) -> Pace:
    """Gather the "steps" events; what is no such event, or is damaged, is passed over."""
    pace = Pace()
    for event in events:
        if event.get("kind") == "steps":
            try:
                _add(pace, event)
            except MALFORMED:
                continue  # half a line of a job that was killed
    return pace


def pace_section(events: Iterable[Event]) -> str:
    """The section as HTML; "" when no step was timed."""
    pace = read_pace(events)
    if not pace.work:
        return ""
    grid = ""
    if any(place != Place(dp=place.dp, pp=0, tp=0) for place in pace.places.values()):
        grid = (
            "<p>The ranks at their places: work against the median of the same stage.</p>"
            f"{grid_heat(pace.places, pace.of_roles())}"
        )
    return f"""<h2>Pace</h2>
<p>Forward and backward of each rank by step: the darker, the longer than the others' median.</p>
{step_heat(pace.work)}
<p>Who waited for whom in collectives.</p>
{wait_heat(pace.waits)}
{grid}"""


def _add(pace: Pace, event: Mapping[str, Any]) -> None:
    steps = [int(step) for step in event["steps"]]
    for seat, place, row in zip(event["seats"], event["places"], event["work"], strict=True):
        mine = pace.work.setdefault(int(seat), {})
        for step, spent in zip(steps, row, strict=True):
            if spent is not None:
                mine[step] = float(spent)
        if place:
            at = dict(re.findall(r"(\w+)=(\d+)", place))
            pace.places[int(seat)] = Place(**{axis: int(at.get(axis, 0)) for axis in _AXES})
    for waiter, late, spent in event["waits"]:
        pair = (int(waiter), int(late))
        pace.waits[pair] = pace.waits.get(pair, 0.0) + float(spent)
