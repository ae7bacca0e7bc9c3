"""Steps are brought together whole, in order, and nobody is waited for in vain."""

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.aligned import Aligned
from ftkit.detection.signals import StepSeen
from tests.detection.scene import world

A, B, C = (MemberId(100 + i) for i in range(3))


def seen(member: MemberId, step: int, *, at: float = 0.0, generation: int = 1) -> StepSeen:
    return StepSeen(
        member=member,
        seat=Seat(member - 100),
        generation=Generation(generation),
        step=Step(step),
        at=at,
    )


def told(aligned: Aligned, *all_seen: StepSeen, rest: bool = False) -> list[tuple[int, set[int]]]:
    for one in all_seen:
        aligned.add(one)
    return [
        (next(iter(step.values())).step, {m - 100 for m in step})
        for step in aligned.take(rest=rest)
    ]


def three() -> Aligned:
    aligned = Aligned()
    aligned.change(world(3))
    return aligned


def test_one_member_after_another_as_agents_report_them() -> None:
    aligned = three()
    assert told(aligned, *(seen(A, s) for s in range(20))) == []
    assert told(aligned, *(seen(B, s) for s in range(20))) == []
    assert told(aligned, *(seen(C, s) for s in range(19))) == [(s, {0, 1, 2}) for s in range(19)]


def test_a_record_that_was_lost_is_not_waited_for_once_a_later_one_came() -> None:
    aligned = three()
    assert told(aligned, seen(A, 1), seen(B, 1)) == []
    assert told(aligned, seen(C, 2)) == [(1, {0, 1})]


def test_a_member_that_says_nothing_is_left_behind_after_a_while() -> None:
    aligned = three()
    quick = [seen(m, s, at=0.01 * s) for s in range(200) for m in (A, B)]
    assert told(aligned, *quick) == [], "an agent may be late by a second"
    assert told(aligned, seen(A, 200, at=12.0), seen(B, 200, at=12.0))[:2] == [
        (0, {0, 1}),
        (1, {0, 1}),
    ]
    assert told(aligned, seen(A, 201, at=12.1), seen(B, 201, at=12.1)) == [(201, {0, 1})]
    patient = Aligned(report_s=8.0)
    patient.change(world(3))
    assert told(patient, *quick, seen(A, 200, at=12.0), seen(B, 200, at=12.0)) == []
    # It is back: from now on it is waited for again.
    told(aligned, seen(C, 202, at=12.2))
    assert told(aligned, seen(A, 203, at=12.3), seen(B, 203, at=12.3)) == [(202, {2})]
    assert told(aligned, seen(C, 203, at=12.3)) == [(203, {0, 1, 2})]


def test_a_generation_may_begin_with_an_older_step() -> None:
    aligned = three()
    told(aligned, *(seen(m, 9) for m in (A, B, C)))
    aligned.change(world(3, generation=2))
    again = [seen(m, 5, generation=2) for m in (A, B, C)]
    assert told(aligned, *again) == [(5, {0, 1, 2})]
    assert told(aligned, seen(A, 10)) == [], "of the generation before"


def test_strangers_and_latecomers_are_passed_over() -> None:
    aligned = three()
    told(aligned, *(seen(m, 1) for m in (A, B, C)))
    assert told(aligned, seen(A, 1), seen(MemberId(7), 2), rest=True) == []


def test_what_never_becomes_whole_does_not_pile_up() -> None:
    aligned = three()
    handed = sum(len(told(aligned, seen(A, s), seen(B, s))) for s in range(3000))
    assert handed > 1900
