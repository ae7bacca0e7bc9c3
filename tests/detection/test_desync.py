"""Members whose records differ: which of them, at which collective, and what it did instead."""

import json
from dataclasses import replace

import pytest

from ftkit.core.ids import Generation, MemberId, Seat
from ftkit.core.verdict import Fault
from ftkit.detection.desync import Slip, disagreements, evidence, reason
from ftkit.detection.observations import RowSeen
from ftkit.detection.row import OpRecord
from tests.detection.scene import Scene, facts, row

STEP = ["all_reduce sum float32", "broadcast", "all_gather", "exchange"]


def records(
    member: int, ops: list[str], *, nbytes: dict[int, int] | None = None, generation: int = 1
) -> list[OpRecord]:
    return [
        OpRecord(
            member=MemberId(member),
            generation=Generation(generation),
            group=0,
            seq=seq,
            op=op,
            nbytes=(nbytes or {}).get(seq, 100),
            t_enter_ns=1000 + seq,
            t_leave_ns=0,
            ok=False,
        )
        for seq, op in enumerate(ops)
    ]


def of(*ops: list[str], **more: dict[int, int]) -> dict[MemberId, list[OpRecord]]:
    return {
        MemberId(m): records(m, list(called), nbytes=more.get(f"m{m}"))
        for m, called in enumerate(ops)
    }


def test_who_calls_the_same_agrees_however_far_each_has_come() -> None:
    assert disagreements(of(STEP * 3, STEP * 2, [*STEP * 2, STEP[0]])) == []


@pytest.mark.parametrize(
    ("called", "slip"),
    [
        ([*STEP, STEP[0], STEP[2]], Slip.SKIPPED),
        ([*STEP, STEP[0], STEP[0]], Slip.REPEATED),
        ([*STEP, STEP[0], STEP[2], STEP[1]], Slip.SWAPPED),
        ([*STEP, "all_reduce max float32"], Slip.REDUCTION),
        ([*STEP, "all_reduce sum float64"], Slip.DTYPE),
        ([*STEP, "barrier"], Slip.OTHER),
    ],
)
def test_the_one_that_differs_is_named_with_what_it_did(called, slip) -> None:
    (found,) = disagreements(of([*STEP, *STEP[:2]], called, [*STEP, *STEP[:2]], [*STEP, *STEP[:2]]))
    assert found.majority
    assert set(found.slips) == {1}
    assert found.slips[MemberId(1)][0] is slip
    assert found.seq in (4, 5)
    said = reason(found, MemberId(1), 1)
    assert "seat 1 (member 1)" in said
    assert f"collective {found.seq} of group 0" in said
    assert json.loads(json.dumps(evidence(found, MemberId(1))))["kind"] == slip


def test_another_size_is_told_and_where_ranks_may_differ_it_is_not() -> None:
    same = [STEP[0], "all_to_all", "exchange"]
    (found,) = disagreements(of(same, same, same, m2={0: 50}))
    assert found.slips[MemberId(2)][0] is Slip.SIZE
    assert "of 50 bytes" in reason(found, MemberId(2), 2)
    assert disagreements(of(same, same, same, m2={1: 50, 2: 7})) == []
    sized = ["reduce_slots 512 float32"], ["reduce_slots 512 float32"], ["reduce_slots 256 float32"]
    (found,) = disagreements(of(*map(list, sized)))
    assert found.slips[MemberId(2)][0] is Slip.SIZE


def test_of_two_both_are_named_and_nobody_is_blamed() -> None:
    (found,) = disagreements(of(STEP, [STEP[0], STEP[2]]))
    assert not found.majority
    assert set(found.slips) == {0, 1}
    assert "nobody can say" in reason(found, MemberId(0), 0)


LAYERS = ["all_gather"] * 3 + ["reduce_scatter"] * 3 + ["all_reduce sum float32"]


@pytest.mark.parametrize("at", range(len(LAYERS)))
@pytest.mark.parametrize("fault", ["skip", "repeat", "other"])
def test_without_a_majority_what_used_to_follow_is_right(at, fault) -> None:
    right = LAYERS * 4
    begin = 2 * len(LAYERS) + at
    wrong = list(right)
    match fault:
        case "skip":
            del wrong[begin]
        case "repeat":
            wrong.insert(begin, right[begin])
        case "other":
            wrong[begin] = "barrier"
    parted = next(i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b)
    for sides in ((right, wrong), (wrong, right)):
        # The third has not come to it.
        (found,) = disagreements(of(*(ops[: parted + 1] for ops in sides), right[:begin]))
        assert (found.majority, found.by_history, found.decided) == (False, True, True)
        assert (found.members, found.awaited) == (2, 1)
        assert set(found.slips) == {sides.index(wrong)}
        assert "each time before" in reason(found, MemberId(sides.index(wrong)), 0)


def test_a_generation_before_tells_what_follows_as_well() -> None:
    told = of([STEP[0], STEP[1], STEP[2]], [STEP[0], STEP[1], STEP[3]])
    told[MemberId(0)] += records(0, STEP * 2, generation=0)
    (found,) = disagreements(told)
    assert found.by_history
    assert set(found.slips) == {1}


def test_what_followed_both_ways_says_nothing() -> None:
    past = ["all_gather", "barrier", "all_reduce", "all_gather", "barrier", "broadcast"]
    told = of(*([*past, "all_gather", "barrier", last] for last in ("all_reduce", "broadcast")))
    (found,) = disagreements(told)
    assert not found.decided
    assert set(found.slips) == {0, 1}


def test_only_the_first_difference_counts() -> None:
    (found,) = disagreements(of(STEP * 2, STEP * 2, [STEP[0], *STEP[2:], *STEP]))
    assert found.seq == 1


def test_groups_generations_and_pairs_are_kept_apart() -> None:
    a, b = of(STEP, STEP[::-1]).values()
    apart = {
        MemberId(0): a,
        MemberId(1): [replace(r, group=7) for r in b],
        MemberId(2): [replace(r, generation=Generation(2)) for r in b],
    }
    assert disagreements(apart) == []
    assert disagreements(of(["send 1"], ["recv 0"], ["recv 1"])) == []


def test_the_detector_says_it_while_all_wait_and_of_nobody_else() -> None:
    scene = Scene(3)
    scene.wait(0, 1, 2)
    told = {0: STEP, 1: [STEP[0], STEP[2]], 2: STEP}
    for seat, ops in told.items():
        now = scene.clock.now()
        scene.detector.ingest(
            RowSeen(
                member=MemberId(100 + seat),
                seat=scene.world.members[seat].seat,
                row=row(100 + seat, moved=now, pending_since=now, entered=51),
                facts=facts(),
                at=now,
                ops=records(100 + seat, ops),
            )
        )
    (verdict,) = scene.tick()
    assert (verdict.seat, verdict.fault, verdict.evicts) == (1, Fault.DESYNC, False)
    assert verdict.evidence["ours"] == {"op": "all_gather", "nbytes": 100}
    assert verdict.evidence["theirs"] == {"op": "broadcast", "nbytes": 100}
    # Nobody tells records any more: what they showed is over.
    assert scene.until(3.0) == []


def _tell(scene: Scene, told: dict[int, list[str]]) -> None:
    for seat, ops in told.items():
        now = scene.clock.now()
        scene.detector.ingest(
            RowSeen(
                member=MemberId(100 + seat),
                seat=Seat(seat),
                row=row(100 + seat, moved=now, pending_since=now, entered=51),
                facts=facts(),
                at=now,
                ops=records(100 + seat, ops),
            )
        )


def test_one_against_one_waits_for_the_third_who_decides() -> None:
    scene = Scene(3)
    scene.wait(0, 1, 2)
    _tell(scene, {0: STEP[:2], 1: [STEP[0], STEP[2]], 2: STEP[:1]})
    assert scene.tick(0.2) == []
    _tell(scene, {0: STEP[:2], 1: [STEP[0], STEP[2]], 2: STEP[:2]})
    assert [(v.seat, v.confidence) for v in scene.tick(0.1)] == [(1, 1.0)]


def test_who_does_not_come_is_not_waited_for_long() -> None:
    scene = Scene(3)
    scene.wait(0, 1, 2)
    told = {0: STEP[:2], 1: [STEP[0], STEP[2]], 2: STEP[:1]}
    said = list[int]()
    for _ in range(6):
        _tell(scene, told)
        said.append(len(scene.tick(0.1)))
    assert said == [0, 0, 0, 0, 0, 2]
    # What used to follow says it, where it was told before.
    scene = Scene(3)
    scene.wait(0, 1, 2)
    for _ in range(6):
        _tell(scene, {seat: [*STEP * 2, *ops] for seat, ops in told.items()})
        verdicts = scene.tick(0.1)
    assert [(v.seat, v.evidence["by_history"]) for v in verdicts] == [(1, True)]
    assert 0.5 < verdicts[0].confidence < 1


def test_what_was_found_is_said_though_newer_records_do_not_reach_back_to_it() -> None:
    scene = Scene(3)
    scene.wait(0, 1, 2)
    known = {0: STEP[:2], 1: [STEP[0], STEP[2]], 2: STEP[:1]}
    _tell(scene, {seat: [*STEP * 2, *ops] for seat, ops in known.items()})
    assert scene.tick(0.1) == []
    for seat in known:
        now = scene.clock.now()
        later = [replace(r, seq=r.seq + 100) for r in records(100 + seat, STEP)]
        seen = RowSeen(
            member=MemberId(100 + seat),
            seat=Seat(seat),
            row=row(100 + seat, moved=now, pending_since=now, entered=51),
            facts=facts(),
            at=now,
            ops=later,
        )
        scene.detector.ingest(seen)
    said = [v.seat for _ in range(6) for v in scene.tick(0.1) if v.fault is Fault.DESYNC]
    assert set(said) == {1}
    assert scene.until(3.0) == []


def test_what_a_majority_decided_holds_when_one_of_it_is_gone() -> None:
    scene = Scene(3)
    scene.wait(0, 1, 2)
    told = {0: STEP, 1: [STEP[0], STEP[2]], 2: STEP}

    def tell(*seats: int) -> None:
        for seat in seats:
            now = scene.clock.now()
            scene.detector.ingest(
                RowSeen(
                    member=MemberId(100 + seat),
                    seat=Seat(seat),
                    row=row(100 + seat, moved=now, pending_since=now, entered=51),
                    facts=facts(),
                    at=now,
                    ops=records(100 + seat, told[seat]),
                )
            )

    tell(0, 1, 2)
    assert [v.seat for v in scene.tick()] == [1]
    scene.hidden.add(0)
    for _ in range(6):
        tell(1, 2)
        assert [v.seat for v in scene.tick() if v.fault is Fault.DESYNC] == [1]
