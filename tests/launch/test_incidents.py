"""What is kept of an incident: begun at once, written whole, and never waited for."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.bundle import paragraph
from ftkit.launch import examiner
from ftkit.launch.examiner import Examiner, Patient
from ftkit.launch.incidents import TOGETHER_S, Incidents, read_bundles
from ftkit.launch.resources import pressure
from tests.detection.scene import world


def verdict(seat: int, fault: Fault = Fault.HANG_BLOCKED, *, suspected: bool = True) -> Verdict:
    return Verdict(
        fault=fault,
        member=MemberId(100 + seat),
        seat=Seat(seat),
        reason=f"seat {seat} is blocked",
        since_s=1.0,
        suspected=suspected,
        evidence={"waiters": [{"member": 102, "seat": 2, "op": "all_reduce", "waited_s": 1.0}]},
    )


def test_it_is_begun_when_something_is_found_and_told_to_agents_once(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path)
    look = incidents.take([verdict(1)], world(4), {"step": 7}, 10.0)
    assert look == {"type": "look", "incident": 1, "members": [101, 102]}
    assert incidents.take([verdict(1, suspected=False)], world(4), {}, 12.0) is None
    incidents.decided("evict", "it had to go", 12.1)
    incidents.decided("join", "much later", 13.0 + TOGETHER_S)
    incidents.close()
    ((told, nodes),) = read_bundles(tmp_path)
    assert nodes == []
    assert [v["suspected"] for v in told["verdicts"]] == [True, False]
    assert told["waits"] == [
        {"for": 1, "member": 102, "seat": 2, "op": "all_reduce", "waited_s": 1.0}
    ]
    assert [d["action"] for d in told["decisions"]] == ["evict"]
    assert (
        (tmp_path / "incidents/1/incident.txt").read_text().startswith("Incident 1: hang-blocked")
    )


def test_what_is_found_later_is_another_and_the_next_coordinator_counts_on(tmp_path: Path) -> None:
    first = Incidents(tmp_path)
    first.take([verdict(1)], None, {}, 0.0)
    assert first.take([verdict(2)], None, {}, TOGETHER_S - 1) is not None
    look = first.take([verdict(1)], None, {}, 3 * TOGETHER_S)
    assert look is not None
    assert look["incident"] == 2
    first.close()
    after = Incidents(tmp_path).take([verdict(1)], None, {}, 0.0)
    assert after is not None
    assert after["incident"] == 3


def test_what_says_nothing_of_processes_is_not_looked_at(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path)
    for label in (Fault.DATA_STALL, Fault.IMBALANCE, Fault.OFFENDER):
        assert incidents.take([verdict(1, label)], None, {}, 0.0) is None
    assert read_bundles(tmp_path) == []


@pytest.mark.parametrize("fault", [Fault.SLOW_COMM, Fault.SLOW_IO, Fault.NUMERIC, Fault.LEAK])
def test_whatever_accuses_begins_an_incident(tmp_path: Path, fault: Fault) -> None:
    incidents = Incidents(tmp_path)
    assert incidents.take([verdict(1, fault)], None, {}, 0.0) is not None
    incidents.close()


def test_a_check_belongs_to_the_incident_that_asked_for_it(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path)
    incidents.take([verdict(1, Fault.SDC)], None, {}, 0.0)
    incidents.checking(NodeId(4))
    incidents.take([verdict(2)], None, {}, 2 * TOGETHER_S)
    incidents.checked({"node": 4, "said": "it computes wrongly"})
    incidents.checked({"node": 5, "said": "nobody asked"})
    incidents.close()
    told = [incident.get("self_checks") for incident, _ in read_bundles(tmp_path)]
    assert told == [[{"node": 4, "said": "it computes wrongly"}], None]


def test_the_paragraph_tells_of_every_culprit_and_not_of_what_came_of_it() -> None:
    def told(seat: int, fault: str, reason: str, **evidence: object) -> dict[str, object]:
        return {"seat": seat, "fault": fault, "reason": reason, "evidence": evidence}

    verdicts = [told(1, "stopped", "it is stopped"), told(3, "hang-busy", "it spins")]
    verdicts += [told(3, "exited", "killed", ours=True), told(4, "exited", "killed", ours=True)]
    text = paragraph({"number": 1, "verdicts": verdicts}, [])
    assert text == "Incident 1: stopped. It is stopped. Also hang-busy: It spins."
    many = paragraph({"verdicts": [told(s, "exited", f"seat {s}") for s in range(8)]}, [])
    assert many.endswith("Also exited: Seat 3. So with 4 more.")
    assert "Also" not in paragraph(
        {"verdicts": [told(s, "hang-comm", "all wait") for s in range(8)]}, []
    )


def test_what_a_self_check_found_is_told_with_its_incident(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path)
    incidents.checked({"node": 1, "said": "of nothing"})
    assert incidents.take([verdict(1, Fault.SLOW)], None, {}, 0.0) is not None
    incidents.checking(NodeId(1))
    incidents.checked({"node": 1, "said": "vm1: gemm the product is wrong"})
    incidents.close()
    ((incident, nodes),) = read_bundles(tmp_path)
    assert [c["node"] for c in incident["self_checks"]] == [1]
    assert "Self-check: vm1: gemm the product is wrong." in paragraph(incident, nodes)


def test_a_disk_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "incidents").write_text("in the way")
    incidents = Incidents(tmp_path)
    assert incidents.take([verdict(1)], None, {}, 0.0) is not None
    incidents.close()


def examined(tmp_path: Path, *looks: list[Patient]) -> dict[str, object]:
    done: list[int] = []
    examiner = Examiner(NodeId(3), tmp_path, tmp_path, done.append)
    for number, patients in enumerate(looks):
        examiner.examine(1, patients, {0: [{"op": "all_reduce", "seq": number}]})
    deadline = time.monotonic() + 20
    while len(done) < len(looks) and time.monotonic() < deadline:
        time.sleep(0.01)
    examiner.close()
    found: dict[str, object] = json.loads((tmp_path / "incidents/1/node-3.json").read_text())
    return found


def patient(*, alive: bool, pid: int) -> Patient:
    return Patient(seat=Seat(0), member=MemberId(1), pid=pid, alive=alive, closely=True)


def test_an_agent_keeps_processes_collectives_and_pressure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This process answers to no signal: it is not asked for its stacks. Nor is there a py-spy.
    monkeypatch.setenv("PATH", str(tmp_path))
    found = examined(tmp_path, [patient(alive=True, pid=os.getpid())])
    assert found["node"] == 3
    assert found["stacks"] == {}
    assert found["processes"]["0"]["state"] in ("R", "S")  # type: ignore[index]
    assert found["collectives"]["0"][0]["op"] == "all_reduce"  # type: ignore[index]
    assert found["pressure"] == pressure() or set(found["pressure"]) <= {"cpu", "io", "memory"}  # type: ignore[call-overload]


def test_the_dead_leave_their_collectives(tmp_path: Path) -> None:
    found = examined(tmp_path, [patient(alive=False, pid=1)])
    assert found["processes"] == {"0": None}
    assert found["collectives"] == {"0": [{"op": "all_reduce", "seq": 0}]}


FAKE_PY_SPY = """#!/bin/sh
[ "$1 $2 $3" = "dump --nonblocking --pid" ] || exit 2
echo "Process $4: python train.py"
echo "    forward (train.py:4)"
"""


def fake_py_spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a py-spy on PATH that is none: it says what `script` says."""
    tool = tmp_path / "bin" / "py-spy"
    tool.parent.mkdir()
    tool.write_text(script)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


@pytest.mark.multiproc
def test_what_a_fake_py_spy_says_of_the_culprit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_py_spy(tmp_path, monkeypatch, FAKE_PY_SPY)
    others = replace(patient(alive=True, pid=os.getpid()), seat=Seat(1), closely=False)
    found = examined(tmp_path, [patient(alive=True, pid=os.getpid()), others])
    said = f"Process {os.getpid()}: python train.py\n    forward (train.py:4)\n"
    assert found["stacks"] == {"0": {"text": "", "py_spy": said}}
    assert (tmp_path / "incidents/1/stacks-seat-0.txt").read_text() == said


@pytest.mark.multiproc
@pytest.mark.parametrize("script", ["#!/bin/sh\necho no >&2; exit 1\n", "#!/bin/nowhere\n", None])
def test_a_fake_py_spy_that_fails_costs_nothing_but_its_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None
) -> None:
    monkeypatch.setattr(examiner, "_PY_SPY_S", 0.1)
    fake_py_spy(tmp_path, monkeypatch, script or "#!/bin/sh\nexec sleep 60\n")
    found = examined(tmp_path, [patient(alive=True, pid=os.getpid())])
    assert found["stacks"] == {}
    assert found["processes"]["0"] is not None  # type: ignore[index]


def test_a_second_look_keeps_the_stacks_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "incidents/1"
    folder.mkdir(parents=True)
    (folder / "node-3.json").write_text(json.dumps({"stacks": {"5": {"text": "x"}}}))
    found = examined(tmp_path, [patient(alive=False, pid=1)])
    assert found["stacks"] == {"5": {"text": "x"}}


def test_a_damaged_bundle_is_told_without_what_is_damaged(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path)
    incidents.take([verdict(1)], None, {}, 0.0)
    incidents.close()
    folder = tmp_path / "incidents/1"
    (folder / "node-0.json").write_text('{"stacks": ')
    (folder / "node-1.json").write_text("[]")
    ((told, nodes),) = read_bundles(tmp_path)
    assert nodes == []
    assert "seat 1 is blocked" in paragraph(told, nodes).lower()


def test_the_paragraph_says_where_they_stand_and_what_was_decided() -> None:
    dump = 'Current thread 0x1 (most recent call first):\n  File "/me/train.py", line 4 in f\n'
    incident = {
        "number": 4,
        "verdicts": [
            {"seat": 1, "fault": "stopped", "suspected": True, "reason": "it is stopped"},
            {"seat": 1, "fault": "exited", "reason": "killed"},
        ],
        "decisions": [{"action": "evict", "reason": "r"}, {"action": "halt", "reason": "r"}],
    }
    node = {
        "node": 0,
        "stacks": {"2": {"text": dump}},
        "processes": {"1": {"state": "T"}},
        "pressure": {"io": 0.55, "cpu": 0.01},
    }
    text = paragraph(incident, [node])
    assert text.startswith("Incident 4: suspected stopped. It is stopped.")
    assert "Seat 2, which waits, stands in f at /me/train.py:4, called by" in text
    assert "The process of seat 1 is stopped" in text
    assert "something waited for io for 55 %" in text
    assert "cpu" not in text
    assert text.endswith("Decided: evict, halt.")
