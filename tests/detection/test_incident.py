"""The story of an incident: who, where, who waited, what was decided, and how long it took."""

import json
from itertools import combinations

import pytest

from ftkit.detection.incident import explain, incidents

HANG = [
    {"kind": "commit", "mono": 99.0, "seat": 0, "member": 100, "generation": 1, "step": 16},
    {"kind": "drill", "mono": 100.0, "fault": "stop", "seat": 2, "phase": "forward"},
    {
        "kind": "verdict",
        "mono": 131.0,
        "fault": "stopped",
        "member": 102,
        "seat": 2,
        "generation": 1,
        "since_s": 100.1,
        "reason": "seat 2 is stopped",
        "evidence": {
            "phase": "forward",
            "step": 17,
            "in_collective": False,
            "waiters": [
                {"seat": 0, "op": "all_reduce", "seq": 88, "waited_s": 30.4},
                {"seat": 1, "op": "all_reduce", "seq": 88, "waited_s": 30.2},
            ],
        },
    },
    {"kind": "halt", "mono": 131.1, "generation": 1, "reason": "member 102 must go"},
    {"kind": "report", "mono": 131.2, "member": 100, "seat": 0, "generation": 1, "step": 17, "phase": "reduce"},
    {"kind": "report", "mono": 131.2, "member": 101, "seat": 1, "generation": 1, "step": 17, "phase": "reduce"},
    {"kind": "exit", "mono": 131.3, "member": 102, "seat": 2, "code": None, "signal": 9},
    {
        "kind": "decision",
        "mono": 131.4,
        "action": "repair in place",
        "reason": "2 of 3 members hold step 16",
        "generation": 2,
        "step": 16,
        "members": [100, 101],
    },
    {"kind": "resume", "mono": 131.5, "generation": 2, "step": 16, "members": [100, 101]},
    {"kind": "commit", "mono": 131.6, "seat": 1, "member": 101, "generation": 1, "step": 16},
    {"kind": "commit", "mono": 132.0, "seat": 0, "member": 100, "generation": 2, "step": 17},
    {"kind": "spawn", "mono": 133.0, "seat": 2, "member": 103, "pid": 5, "reason": "refill"},
    {"kind": "commit", "mono": 134.0, "seat": 0, "member": 100, "generation": 2, "step": 18},
]  # fmt: skip


def test_the_whole_story_in_one_paragraph() -> None:
    assert explain(HANG) == (
        "In a drill of stop, seat 2 (member 102) was found stopped; it stood in forward of step "
        "17, and seats 0, 1 waited for it in all_reduce 88, the first for 30.4 s. The job was "
        "halted: member 102 must go. The others stood in reduce of step 17 (seats 0, 1). It was "
        "decided to repair in place from step 16 with 2 members, because 2 of 3 members hold step "
        "16. Training resumed after step 16 with 2 members in generation 2 and committed step 17, "
        "32.00 s after the fault (31.00 s of them to detect it)."
    )


def test_the_summary_has_the_numbers() -> None:
    (incident,) = incidents(HANG)
    found = json.loads(json.dumps(incident.to_json()))
    assert found["drill"] == "stop"
    assert (found["detect_s"], found["repair_s"]) == (31.0, 32.0)
    assert [c["member"] for c in found["culprits"]] == [102]
    assert found["culprits"][0]["fault"] == "stopped"
    assert found["resumed_members"] == 2


def test_a_crash_without_a_drill_counts_from_its_exit() -> None:
    text = explain(
        [
            {"kind": "exit", "mono": 5.0, "member": 101, "seat": 1, "code": None, "signal": 11},
            {"kind": "verdict", "mono": 5.01, "fault": "exited", "member": 101, "seat": 1,
             "reason": "killed", "since_s": 5.0, "generation": 1, "evidence": {"signal": 11}},
            {"kind": "resume", "mono": 5.5, "generation": 2, "step": 3, "members": 2},
        ]
    )  # fmt: skip
    assert text == (
        "Seat 1 (member 101) was found exited by signal 11. Training resumed after step 3 with 2 "
        "members in generation 2, 0.50 s after the fault (0.00 s of them to detect it)."
    )


def test_verdicts_are_levels_and_late_echoes_open_nothing() -> None:
    again = [dict(HANG[2], mono=131.0 + i / 10) for i in range(20)]
    late_exit = {"kind": "exit", "mono": 140.0, "member": 102, "seat": 2, "code": None, "signal": 9}
    late = dict(HANG[2], mono=141.0, member=100, seat=0)  # of generation 1, told after 2 began
    (incident,) = incidents([*HANG[:3], *again, *HANG[3:], late_exit])
    assert len(incident.culprits) == 1
    assert len(incidents([*HANG, late])) == 1


def test_a_second_fault_before_the_resumption_is_the_same_incident_and_after_it_another() -> None:
    other = dict(HANG[2], mono=131.05, member=101, seat=1, fault="exited")
    (incident,) = incidents([*HANG[:3], other, *HANG[3:]])
    assert [c.member for c in incident.culprits] == [102, 101]
    assert len(incidents([*HANG, dict(other, mono=150.0, generation=2)])) == 2


def test_what_removes_nobody_is_reported_and_counts_once() -> None:
    stall = {"kind": "verdict", "mono": 9.0, "fault": "hang-comm", "member": 100, "seat": 0,
             "since_s": 1.0, "reason": "all 2 members wait", "generation": 1}  # fmt: skip
    events = [dict(stall, seat=s, member=100 + s, mono=9.0 + i) for i in range(5) for s in (0, 1)]
    (incident,) = incidents(events)
    assert incident.reported == ["hang-comm: all 2 members wait"]
    assert incident.detect_s == 8.0
    text = explain(events)
    assert "Nobody was named." in text
    assert "has not resumed" in text


def test_a_clean_run() -> None:
    events = [
        {"kind": "commit", "mono": 1.0, "step": 1},
        {"kind": "commit", "mono": 2.0, "step": 2},
        {"kind": "exit", "mono": 3.0, "member": 1, "seat": 0, "code": 0, "signal": None},
    ]
    assert explain(events) == "No incident in 3 events; 2 is the last step committed."
    assert explain([]) == "No incident in 0 events."


@pytest.mark.parametrize("missing", list(combinations(range(len(HANG)), 2)))
def test_any_two_events_may_be_missing(missing) -> None:
    text = explain([e for i, e in enumerate(HANG) if i not in missing])
    assert "member 102" in text
    assert "None" not in text


@pytest.mark.parametrize("index", range(len(HANG)))
def test_any_event_may_have_lost_its_fields(index) -> None:
    events = [{"kind": e["kind"]} if i == index else e for i, e in enumerate(HANG)]
    text = explain(events)
    assert "102" in text
    assert "None" not in text


def test_what_was_rebuilt_is_told() -> None:
    rebuilt = {"kind": "rebuild", "mono": 130.2, "node": 1, "step": 40, "seconds": 0.25,
               "bytes": 900, "damaged": ["shard 2 of stripe 0, node 3: chunk 7"]}  # fmt: skip
    failed = {"kind": "rebuild-failed", "mono": 130.3, "node": 2, "step": 40, "reason": "too few"}
    text = explain([*HANG[:3], rebuilt, failed, *HANG[3:]])
    assert "Node 1 rebuilt 900 bytes of step 40 from parity in 0.25 s" in text
    assert "lost or corrupt were shard 2 of stripe 0, node 3: chunk 7." in text
    assert "Node 2 could not rebuild step 40 from parity: too few." in text


def test_a_decision_is_told_with_what_it_costs() -> None:
    events = [
        {"kind": "halt", "mono": 1.0, "generation": 1, "reason": "member 0 is gone"},
        {
            "kind": "decision",
            "mono": 1.1,
            "action": "respawn",
            "reason": "member 0 died",
            "costs": {"reason": "respawn loses 2 s, wait would lose 6 s", "table": []},
        },
    ]
    assert (
        "replace the process, because member 0 died (respawn loses 2 s, wait would lose 6 s)."
        in explain(events)
    )
