"""Who was late to a collective is told without clocks, and a victim is not blamed for it."""

import pytest

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, MemberId, Seat
from ftkit.detection.lateness import Lateness, join
from ftkit.detection.node_ops import STRIDE, NodeOps
from ftkit.detection.row import OpRecord
from ftkit.detection.signals import CommSeen, from_json, to_json


def record(
    seq: int, enter: float, leave: float, *, op: str = "all_reduce", group: int = 0, ok=True
):
    return OpRecord(
        member=MemberId(1),
        generation=Generation(1),
        group=group,
        seq=seq,
        op=op,
        nbytes=8,
        t_enter_ns=int(enter * 1e9),
        t_leave_ns=int(leave * 1e9),
        ok=ok,
    )


def seen(seat: int, seqs: list[int], spent: list[float], worked: list[float], generation: int = 1):
    return CommSeen(
        seat=Seat(seat),
        generation=Generation(generation),
        group=5,
        at=0.0,
        seqs=seqs,
        spent_s=spent,
        worked_s=worked,
    )


def test_the_last_to_come_waits_for_nothing_but_the_transfer() -> None:
    told = {Seat(0): (1.0, 0.5), Seat(1): (0.25, 1.25), Seat(2): (0.75, 0.75)}
    joined = join(Generation(1), 0, 8, told)
    assert joined.transfer_s == 0.25
    assert joined.late_s == {0: 0.0, 1: 0.75, 2: 0.25}
    assert joined.last == 1
    assert joined.by_itself
    assert joined.waited_s == {0: 0.75, 2: 0.5}


def test_who_was_kept_by_another_group_is_a_victim() -> None:
    told = {Seat(0): (1.0, 0.5), Seat(1): (0.25, 0.5), Seat(2): (1.0, 0.5)}
    assert not join(Generation(1), 0, 8, told).by_itself


def test_what_agents_tell_is_joined_whatever_comes_first() -> None:
    lateness = Lateness()
    assert lateness.ingest(seen(0, [4, 8], [1.0, 1.0], [0.0, 0.0])) == []
    first = lateness.ingest(seen(1, [4], [0.5], [0.5]))
    assert [(j.seq, j.last) for j in first] == [(4, 1)]
    assert lateness.ingest(seen(2, [4], [0.5], [0.5])) == [], "too late for that one"
    second = lateness.ingest(seen(1, [8], [0.5], [0.5]))
    assert second == [], "seat 2 is known by now"
    (third,) = lateness.ingest(seen(2, [8], [0.125], [1.0]))
    assert (third.last, set(third.late_s)) == (2, {0, 1, 2})


def test_a_member_that_tells_nothing_is_not_waited_for_for_ever() -> None:
    lateness = Lateness()
    lateness.ingest(seen(2, [0], [1.0], [0.0]))
    for seat in (0, 1):
        seqs = list(range(4, 2000, 4))
        done = lateness.ingest(seen(seat, seqs, [1.0] * len(seqs), [0.0] * len(seqs)))
    assert len(done) == len(seqs)


def test_a_new_generation_counts_anew() -> None:
    lateness = Lateness()
    lateness.ingest(seen(0, [400], [1.0], [0.0]))
    lateness.ingest(seen(0, [4], [1.0], [0.0], generation=2))
    assert lateness.ingest(seen(1, [404], [1.0], [0.0])) == []
    (joined,) = lateness.ingest(seen(1, [4], [1.0], [0.0], generation=2))
    assert (joined.generation, joined.seq) == (2, 4)


def test_a_node_tells_each_of_its_samples_once() -> None:
    ops = NodeOps()
    records = [
        record(0, 1.0, 2.0),
        record(1, 2.5, 3.0, group=3, op="recv"),
        record(4, 3.25, 4.0, op="all_reduce sum float32"),
        record(8, 4.5, 5.0, op="broadcast"),
        record(12, 5.5, 0.0),
        record(16, 5.5, 6.0, ok=False),
        record(17, 6.0, 7.0),
    ]
    (told,) = ops.take(Seat(3), records)
    assert STRIDE == 4
    assert (told.group, told.seqs) == (0, [0, 4])
    assert told.spent_s == pytest.approx([1.0, 0.75])
    assert told.worked_s == pytest.approx([0.0, 0.25]), "since the receive, of another group"
    assert from_json(to_json(told)) == told
    assert ops.take(Seat(3), records) == []
    (more,) = ops.take(Seat(3), [*records, record(20, 8.0, 9.0)])
    assert (more.seqs, more.worked_s) == ([20], [1.0])


@pytest.mark.parametrize(
    "wrong",
    [
        {"seqs": ["a"]},
        {"seqs": [-4]},
        {"seqs": 4},
        {"seqs": [4, 8]},
        {"spent_s": [float("nan")]},
        {"spent_s": [-0.1]},
        {"spent_s": ["long"]},
        {"worked_s": [float("inf")]},
        {"worked_s": None},
        {"seat": None},
        {"group": -1},
        {"generation": "two"},
        {"at": "noon"},
    ],
)
def test_what_is_no_sample_is_refused_where_it_comes_in(wrong: dict[str, object]) -> None:
    told = to_json(seen(0, [4], [1.0], [0.5]))
    assert from_json(told) == seen(0, [4], [1.0], [0.5])
    with pytest.raises(ProtocolError, match="not a signal"):
        from_json(told | wrong)
