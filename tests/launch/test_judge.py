"""The judge: what agents report, put before the detectors on one clock."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step, Term
from ftkit.core.verdict import Fault
from ftkit.core.world import Member, World
from ftkit.detection import signals
from ftkit.detection.observations import Observation, RowSeen
from ftkit.detection.row import Phase, Row
from ftkit.launch.config import JobConfig
from ftkit.launch.judge import Judge, SeatRow
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Mode, Plan, first_plan


def judge() -> Judge:
    return Judge(JobConfig(job="j", command=("python", "x.py")))


def member(number: int, **fields: object) -> MemberFacts:
    base = {"member": MemberId(number), "seat": Seat(0), "node": NodeId(0), "stage": Stage.ACTIVE}
    return MemberFacts(**(base | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("node", [0, 1])
def test_rows_are_put_on_our_clock_wherever_the_node_is(monkeypatch, node) -> None:
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
    judging = judge()
    monkeypatch.setattr(judging._panel, "ingest", seen.append)
    judging.take_report(NodeId(node), [told], [member(7)], sent=1100.0, at=100.0)
    rows = [one.row for one in seen if isinstance(one, RowSeen)]
    assert [r.t_progress_ns for r in rows] == [99_000_000_000]


WORLD = World.of(
    Generation(1),
    [
        Member(member=MemberId(7 + i), seat=Seat(i), node=NodeId(i), host="127.0.0.1", port=1)
        for i in range(2)
    ],
)


def plan() -> Plan:
    seats = [replace(s, member=MemberId(7 + s.seat)) for s in first_plan(2, 1, term=Term(1)).seats]
    return replace(first_plan(2, 1, term=Term(1)), world=WORLD, seats=tuple(seats))


def test_a_node_that_falls_silent_is_named_once_it_is_lost() -> None:
    judging = judge()
    judging.take_plan(plan(), at=100.0)
    assert judging.verdicts(plan(), {}, 100.1).fresh == []
    found = judging.verdicts(plan(), {}, 161.0, lost={NodeId(1): 60.5})
    assert [(v.fault, v.seat, v.suspected) for v in found.fresh] == [(Fault.NODE_LOST, 1, False)]
    assert "60.5 s" in found.fresh[0].reason
    assert found.evictions == {}, "what follows, the protocol says"
    deaf = judge()
    deaf.take_plan(plan(), at=100.0)
    assert deaf.verdicts(plan(), {}, 161.0, lost={NodeId(0): 60.0, NodeId(1): 60.0}).fresh == []


def test_what_else_is_said_of_a_node_does_not_hide_that_it_is_lost() -> None:
    judging = judge()
    judging.take_plan(plan(), at=100.0)
    for at in (100.0, 130.0):
        judging.take(signals.ClockSeen(node=NodeId(1), at=at, offset_s=3.0, error_s=0.001))
    assert [v.fault for v in judging.verdicts(plan(), {}, 131.0).fresh] == [Fault.CLOCK]
    found = judging.verdicts(plan(), {}, 191.0, lost={NodeId(1): 60.5})
    assert [(v.fault, v.seat) for v in found.fresh] == [(Fault.NODE_LOST, 1)]


def test_a_node_that_hangs_up_is_suspected_then_lost() -> None:
    judging = judge()
    judging.take_plan(plan(), at=100.0)
    judging.node_gone(NodeId(1), 101.0)
    (first,) = judging.verdicts(plan(), {}, 101.1).fresh
    assert (first.fault, first.suspected) == (Fault.NODE_LOST, True)
    (second,) = judging.verdicts(plan(), {}, 161.2, lost={NodeId(1): 60.2}).fresh
    assert (second.fault, second.suspected) == (Fault.NODE_LOST, False)


def test_nobody_is_late_for_a_world_while_a_node_of_it_is_out_of_reach() -> None:
    judging = judge()
    limit_s = judging._detector.limit_s
    waiting = {MemberId(n): member(n, seat=Seat(n - 7), node=NodeId(n - 7)) for n in (7, 8)}
    running = replace(plan(), mode=Mode.RUNNING)
    judging.take_plan(running, at=100.0)
    judging.node_gone(NodeId(1), 101.0)
    assert judging.verdicts(running, waiting, 101.0 + 2 * limit_s).evictions == {}
    back = 102.0 + 2 * limit_s
    judging.node_back(NodeId(1), back)
    assert judging.verdicts(running, waiting, back + 0.9 * limit_s).evictions == {}
    late = judging.verdicts(running, waiting, back + 1.1 * limit_s).evictions
    assert late.keys() == {7, 8}
    assert "did not enter generation 1" in late[MemberId(7)]


@pytest.mark.parametrize("mode", [Mode.HALTING, Mode.FORMING])
def test_who_keeps_its_shards_from_a_job_that_stands_still_has_to_go(mode: Mode) -> None:
    # Its control thread has told where it stands; its training thread hangs in the user's code.
    judging = judge()
    limit_s = judging._detector.limit_s
    halted = {
        MemberId(n): member(
            n,
            seat=Seat(n - 7),
            node=NodeId(n - 7),
            stage=stage,
            generation=Generation(1),
            step=Step(13),
            sharded=True,
            stepping=True,
        )
        for n, stage in ((7, Stage.READY), (8, Stage.HALTED))
    }
    standing = replace(plan(), mode=mode, halted=Generation(1))
    judging.take_plan(standing, at=100.0)
    assert judging.verdicts(standing, halted, 100.0 + 0.9 * limit_s).evictions == {}
    late = judging.verdicts(standing, halted, 100.0 + 1.1 * limit_s).evictions
    assert late == {
        MemberId(8): f"did not let go of its shards within {limit_s:g} s of being told to"
    }
    judging.node_gone(NodeId(1), 140.0)
    assert judging.verdicts(standing, halted, 100.0 + 2 * limit_s).evictions == {}, "not told yet"
    whole = {m: replace(f, sharded=False) for m, f in halted.items()}
    assert judging.verdicts(standing, whole, 100.0 + 2 * limit_s).evictions == {}


def test_a_node_out_of_reach_stays_so_while_the_world_about_it_grows() -> None:
    judging = judge()
    judging.take_plan(plan(), at=100.0)
    judging.node_gone(NodeId(1), 101.0)
    third = Member(member=MemberId(9), seat=Seat(2), node=NodeId(2), host="127.0.0.1", port=1)
    grown = replace(
        plan(), mode=Mode.RUNNING, world=World.of(Generation(2), [*WORLD.members, third])
    )
    judging.take_plan(grown, at=102.0)
    waiting = {MemberId(8): member(8, seat=Seat(1), node=NodeId(1), generation=Generation(1))}
    assert judging.verdicts(grown, waiting, 200.0).evictions == {}


def test_who_killed_a_member_is_told() -> None:
    judging = judge()
    judging.take_plan(plan(), at=100.0)
    dead = member(7, stage=Stage.DEAD, exit_code=-9, ours=True)
    judging.take_report(NodeId(0), [], [dead], sent=101.0, at=101.0)
    (found,) = judging.verdicts(plan(), {}, 101.1).fresh
    assert (found.fault, found.evidence["ours"]) == (Fault.EXITED, True)
    assert "killed by ftkit" in found.reason


def test_what_ranks_found_is_said_however_long_their_agent_takes_to_report() -> None:
    judging = Judge(JobConfig(job="j", command=("x",), nodes=5000))
    judging.take_plan(plan(), at=100.0)
    found = signals.Found(
        fault="sdc", member=MemberId(7), seat=Seat(0), step=Step(3), at=100.0, reason="other bits"
    )
    judging.take_report(
        NodeId(0), [], [member(7)], measured=[signals.to_json(found)], sent=108.0, at=108.0
    )
    assert [v.fault for v in judging.verdicts(plan(), {}, 108.5).fresh] == [Fault.SDC]


def test_slow_transfers_of_a_script_without_a_session_are_named() -> None:
    judging, script = judge(), replace(plan(), world=None)
    judging.take_plan(script, at=100.0)
    for step in range(300):
        now = 100.0 + 0.1 * step
        for seat in (0, 1):
            row = Row(
                member=MemberId(7 + seat), pid=1, generation=Generation(0), step=Step(step),
                phase=Phase.FORWARD, group=0, entered=step, left=step, op="all_reduce",
                t_progress_ns=int(now * 1e9), t_enter_ns=0, t_heartbeat_ns=int(now * 1e9),
                allowance_ns=0, warm=True, plain=True,
            )  # fmt: skip
            comm = {
                "kind": "comm", "seat": seat, "generation": 0, "group": 0, "at": now,
                "seqs": [4 * step], "spent_s": [0.01 if step < 150 else 0.05], "worked_s": [0.1],
                "nbytes": [1 << 20],
            }  # fmt: skip
            judging.take_report(
                NodeId(seat), [SeatRow(seat=Seat(seat), row=row, facts=None)],
                [member(7 + seat, seat=Seat(seat), node=NodeId(seat))],
                measured=[comm], sent=now, at=now,
            )  # fmt: skip
        judging.verdicts(script, {}, now)
    (said,) = judging._pace.tick(now)
    assert (said.fault, said.evidence["seats"]) == (Fault.SLOW_COMM, [0, 1])
    assert "5.0 times" in said.reason
    # Agents are asked to test the path between the nodes: at the beginning, and once it is slow.
    assert [(o.a, o.b) for o in judging.inquiry.orders()] == [(0, 1)] * 2


#: One of each kind, so that a field can be spoilt while all others are right.
SAMPLES = [
    {"kind": "step", "member": 7, "seat": 0, "generation": 1, "step": 3, "at": 100.0,
     "seconds": {"forward": 0.1}, "waited_s": 0.1, "cpu_s": 0.1, "slots": 1, "loss": 1.0},
    {"kind": "found", "fault": "sdc", "member": 7, "seat": 0, "step": 3, "at": 100.0,
     "reason": "other bits", "evidence": {"tensors": []}, "confidence": 0.9, "peer": 1},
    {"kind": "node-scored", "node": 0, "name": "a", "at": 100.0, "faults": 9, "recent": 9.0,
     "rate_per_day": 1.0, "fleet_per_day": 0.1, "factor": 3.0, "certainty": 0.99,
     "offender": True},
    {"kind": "clock", "node": 0, "at": 100.0, "offset_s": 1.0, "error_s": 0.01},
    {"kind": "node-gap", "node": 0, "at": 100.0, "gap_s": 3.0},
    {"kind": "node-checked", "node": 0, "at": 100.0, "result": {}, "error": ""},
    {"kind": "node", "node": 0, "at": 100.0, "available_bytes": 1, "pressure": {"cpu": 0.1},
     "disks": {"/": [1, 2]}},
    {"kind": "io", "node": 0, "at": 100.0, "path": "/", "op": "write", "count": 1,
     "seconds": 1.0, "nbytes": 1},
    {"kind": "comm", "seat": 0, "generation": 1, "group": 0, "at": 100.0, "seqs": [1, 2],
     "spent_s": [0.1, 0.1], "worked_s": [0.1, 0.1]},
    {"kind": "paths", "member": 7, "seat": 0, "generation": 1, "step": 3, "at": 100.0,
     "rates": {"1": 1e9}},
    {"kind": "pair", "order": 1, "sender": 0, "receiver": 1, "at": 100.0, "nbytes": 1,
     "seconds": [0.1]},
    {"kind": "reach", "order": 1, "node": 0, "via": 1, "at": 100.0, "reached": True},
]  # fmt: skip

_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, -1, 10**400, 1e308, 7])
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@st.composite
def spoilt(draw: st.DrawFn) -> object:
    """Any JSON, or a signal of which some fields are something else."""
    if draw(st.integers(0, 9)) == 0:
        return draw(_JSON)
    sample = dict(draw(st.sampled_from(SAMPLES)))
    for name in draw(st.lists(st.sampled_from(sorted(sample)), min_size=1, max_size=3)):
        sample[name] = draw(_JSON)
    return sample


def test_the_samples_are_signals_of_every_kind() -> None:
    assert {signals.from_json(s).KIND for s in SAMPLES} == set(signals._KINDS)


@given(st.lists(spoilt(), min_size=1, max_size=4))
def test_whatever_a_rank_sends_does_not_end_the_judge(values) -> None:
    judging = judge()
    judging.take_plan(plan(), at=99.0)
    judging.take_report(NodeId(0), [], [], measured=values, sent=100.0, at=100.0)
    for now in (100.5, 101.0):
        json.dumps([str(v.reason) for v in judging.verdicts(plan(), {}, now).fresh])
    judging.steps(102.0, rest=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"member": [1]},
        {"seconds": [0.1]},
        {"seconds": {"forward": "0.1"}},
        {"seconds": {"forward": float("nan")}},
        {"generation": "1"},
        {"at": None},
        {"step": True},
        {"more": 1},
    ],
)
def test_a_step_with_a_wrong_field_is_no_signal(wrong) -> None:
    with pytest.raises(ProtocolError):
        signals.from_json(SAMPLES[0] | wrong)


def test_a_loss_may_be_no_number() -> None:
    seen = signals.from_json(SAMPLES[0] | {"loss": float("nan")})
    assert isinstance(seen, signals.StepSeen)
    assert seen.loss is not None
    assert seen.loss != seen.loss
