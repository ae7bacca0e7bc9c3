"""The judge: what agents report, put before the detectors on one clock."""

from pathlib import Path

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.detection.observations import Observation, RowSeen
from ftkit.detection.row import Phase, Row
from ftkit.launch.config import JobConfig
from ftkit.launch.judge import Judge, SeatRow
from ftkit.recovery.facts import MemberFacts, Stage


def judge(folder: Path, seen: list[Observation]) -> Judge:
    made = Judge(JobConfig(job="j", command=("python", "x.py"), run_dir=str(folder)))
    made._panel.ingest = seen.append  # type: ignore[method-assign]
    return made


def member(number: int, **fields: object) -> MemberFacts:
    base = {"member": MemberId(number), "seat": Seat(0), "node": NodeId(0), "stage": Stage.ACTIVE}
    return MemberFacts(**(base | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("node", [0, 1])
def test_rows_are_put_on_our_clock_wherever_the_node_is(tmp_path, node) -> None:
    # An agent on another machine, which has been up for 1000 s longer than ours.
    seen: list[Observation] = []
    row = Row(
        member=MemberId(7),
        pid=1,
        generation=Generation(1),
        step=Step(3),
        phase=Phase.FORWARD,
        group=0,
        entered=0,
        left=0,
        op="",
        t_progress_ns=1_099_000_000_000,
        t_enter_ns=0,
        t_heartbeat_ns=0,
        allowance_ns=0,
        warm=True,
    )
    told = SeatRow(seat=Seat(0), row=row, facts=None)
    judge(tmp_path, seen).take_report(NodeId(node), [told], [member(7)], sent=1100.0, at=100.0)
    rows = [one.row for one in seen if isinstance(one, RowSeen)]
    assert [r.t_progress_ns for r in rows] == [99_000_000_000]
