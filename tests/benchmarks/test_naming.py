"""What counts as named: the first that is said after a fault, of the right member, fittingly."""

from argparse import Namespace

import pytest

from benchmarks.naming import CLASSES, FITS, follow, report


def event(kind: str, mono: float, **fields: object) -> dict[str, object]:
    return {"kind": kind, "mono": mono, **fields}


def named(mono: float, member: int, fault: str, kind: str = "verdict") -> dict[str, object]:
    return event(kind, mono, member=member, seat=member, fault=fault, reason="because")


COMMITS = [event("commit", i / 10, seat=0, member=0, step=i) for i in range(20)]


def test_the_first_word_counts_and_others_are_blame() -> None:
    events = [
        *COMMITS,
        event("drill", 2.0, fault="stop", member=1),
        named(2.9, 1, "stopped", "suspicion"),
        named(4.0, 1, "stopped"),
        named(4.1, 0, "data-stall"),  # a label
        event("drill", 5.0, fault="spin", member=2),
        named(6.5, 0, "hang-blocked", "suspicion"),
        named(6.6, 2, "hang-busy", "suspicion"),
        event("drill", 8.0, fault="stop", member=2),
    ]
    first, second, third = follow("stop", events)
    assert (first.right, first.after_s, first.blamed) == (True, 0.9, 0)
    assert first.step_s == pytest.approx(0.1)
    assert (second.right, second.of, second.blamed) == (False, 0, 1)
    assert (third.right, third.said) == (False, None)


def test_the_right_member_by_the_wrong_name_is_wrong() -> None:
    (found,) = follow("oom", [event("drill", 1.0, fault="oom", member=1), named(1.1, 1, "exited")])
    assert not found.right


def test_figures_have_intervals_and_goals() -> None:
    events = [*COMMITS, event("drill", 2.0, fault="kill", member=1), named(2.2, 1, "exited")]
    made = {f.name: f for f in report(follow("crash", events), [], vars(Namespace())).figures}
    assert made["crash: right class and rank"].holds
    assert "1 of 1, 95 % interval 0.2" in made["crash: right class and rank"].against
    assert made["crash seen p99"].holds is False
    assert made["wrong blame"].value == 0


def test_every_fault_has_a_name_that_fits() -> None:
    assert all(FITS[fault] for kinds in CLASSES.values() for fault in kinds)
