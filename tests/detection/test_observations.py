"""What agents tell of a rank: numbers that no host can hold are no row, and nobody reckons with them."""

import pytest

from ftkit.core.errors import ProtocolError
from ftkit.detection.observations import ProcessFacts
from ftkit.detection.row import Awaited, OpRecord, Row
from tests.detection.scene import facts

ROW = {
    "member": 7, "pid": 1, "generation": 1, "step": 3, "phase": "forward", "group": 0,
    "entered": 0, "left": 0, "op": "", "t_progress_ns": 5, "t_enter_ns": 0, "t_heartbeat_ns": 0,
    "allowance_ns": 0, "warm": True, "plain": False,
}  # fmt: skip
RECORD = {
    "member": 7, "generation": 1, "group": 0, "seq": 1, "op": "a", "nbytes": 4,
    "t_enter_ns": 1, "t_leave_ns": 2, "ok": True,
}  # fmt: skip
AWAITED = {"group": 0, "seq": 1, "at_ns": 1, "members": [7]}
FACTS = facts().to_json()


@pytest.mark.parametrize("huge", [10**400, -(10**400), 1 << 65, float("inf")])
@pytest.mark.parametrize(
    ("kind", "value", "name"),
    [
        *((Row, ROW, n) for n in ("t_progress_ns", "t_enter_ns", "allowance_ns", "step")),
        *((OpRecord, RECORD, n) for n in ("t_enter_ns", "seq", "nbytes")),
        (Awaited, AWAITED, "at_ns"),
        *((ProcessFacts, FACTS, n) for n in ("cpu_ticks", "rss_bytes")),
    ],
)
def test_numbers_that_nobody_can_hold_are_refused(kind, value, name, huge) -> None:
    assert kind.from_json(value).to_json() is not None
    with pytest.raises(ProtocolError):
        kind.from_json(value | {name: huge})
