"""A verdict that is said again and again is one entry, and its end is told once."""

from dataclasses import replace

from ftkit.core.ids import MemberId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.levels import Levels


def verdict(fault: Fault = Fault.STOPPED, *, member: int = 1, suspected: bool = True) -> Verdict:
    return Verdict(
        fault=fault,
        member=MemberId(member),
        seat=Seat(member),
        reason="",
        since_s=10.0,
        suspected=suspected,
    )


def test_said_once_while_it_holds_and_over_once() -> None:
    levels = Levels(linger_s=5.0)
    one = verdict()
    assert levels.take([one], 11.0) == ([one], [])
    assert levels.take([one], 12.0) == ([], [])
    assert levels.take([], 16.0) == ([], [])
    fresh, (over,) = levels.take([], 18.0)
    assert (fresh, over.verdict, over.lasted_s) == ([], one, 2.0)
    assert levels.take([], 30.0) == ([], [])


def test_one_that_comes_and_goes_is_one() -> None:
    levels = Levels(linger_s=5.0)
    told = [levels.take([verdict()] if at % 4 == 0 else [], float(at)) for at in range(40)]
    assert sum(len(fresh) for fresh, _ in told) == 1
    assert not any(over for _, over in told)


def test_what_becomes_certain_is_said_again_and_has_no_end() -> None:
    levels = Levels(linger_s=5.0)
    levels.take([verdict()], 11.0)
    sure = verdict(suspected=False)
    assert levels.take([sure], 12.0) == ([sure], [])
    assert levels.take([], 99.0) == ([], [])


def test_another_kind_of_the_same_matter_is_said_once() -> None:
    levels = Levels(linger_s=5.0)
    kinds = [verdict(Fault.HANG_BUSY), verdict(Fault.HANG_BLOCKED)] * 3
    fresh = [levels.take([kind], 11.0 + i)[0] for i, kind in enumerate(kinds)]
    assert sum(map(len, fresh)) == 2
    assert len(levels.take([], 99.0)[1]) == 1


def test_members_and_matters_are_kept_apart() -> None:
    levels = Levels(linger_s=5.0)
    said = [verdict(), verdict(member=2), replace(verdict(), fault=Fault.SLOW)]
    assert levels.take(said, 11.0) == (said, [])


def test_with_the_job_all_that_was_said_ends_but_who_was_removed() -> None:
    levels = Levels(linger_s=5.0)
    one, gone = verdict(), verdict(member=2, suspected=False)
    levels.take([one, gone], 11.0)
    (over,) = levels.close()
    assert over.verdict == one
    assert levels.close() == []
