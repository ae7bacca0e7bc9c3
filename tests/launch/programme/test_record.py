"""The history survives restarts, torn lines and strangers' lines."""

import json
from pathlib import Path

import pytest

from ftkit.core.errors import ProtocolError, StoreError
from ftkit.launch.programme.record import DrillRecord, append, read
from tests.launch.programme.jobs import drill


def test_a_record_reads_as_it_was_written() -> None:
    one = drill(5.25, reason="é", detect_s=None, steps_lost=3, interval=9)
    assert DrillRecord.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_records_of_two_programmes_are_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "drills.jsonl"
    assert read(path) == ([], 0)
    for at in (3.0, 1.0, 2.0):
        append(path, drill(at))
    found, strange = read(path)
    assert ([r.at for r in found], strange) == ([1.0, 2.0, 3.0], 0)


def test_a_torn_last_line_costs_itself_and_not_the_next(tmp_path: Path) -> None:
    path = tmp_path / "drills.jsonl"
    append(path, drill(1.0))
    whole = path.read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        found, strange = read(path)
        assert (found[0].at, len(found) + strange) == (1.0, 2)
        append(path, drill(2.0))
        assert read(path)[0][-1].at == 2.0


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"kind": "fault"},
        {"at": None},
        {"at": -1},
        {"at": True},
        {"at": float("nan")},
        {"lost_s": "much"},
        {"outcome": "splendid"},
        {"seats": 3},
        {"versions": []},
        {"fault": 7},
        {"world": 1e400},
    ],
)
def test_what_is_no_record_is_passed_over_and_counted(change, tmp_path: Path) -> None:
    value = drill(1.0).to_json() | change
    with pytest.raises(ProtocolError):
        DrillRecord.from_json(value)
    path = tmp_path / "h"
    path.write_text(f"{json.dumps(value)}\n{json.dumps(drill(2.0).to_json())}\n[]\n{'[' * 99999}\n")
    found, strange = read(path)
    assert ([r.at for r in found], strange) == ([2.0], 3)


def test_a_newer_version_s_further_fields_are_passed_over() -> None:
    assert DrillRecord.from_json(drill(1.0).to_json() | {"colour": "red"}) == drill(1.0)


def test_a_history_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        append(tmp_path / "none" / "h", drill(1.0))
