"""What `collectives` makes of what its ranks tell; no process is started."""

from typing import Any

import pytest

from benchmarks.collective_kills import Kill
from benchmarks.collectives import case_figures, disagreements, goal, kill_figures, merge, mistakes

MB = 1 << 20


def rank(case: str, seconds: dict[str, list[float]], digests: dict[str, str]) -> dict[str, Any]:
    return {"case": case, "times": seconds, "spent": seconds, "digests": digests}


def test_the_slowest_rank_of_each_block_counts_and_the_median_of_the_blocks() -> None:
    one = rank(f"all_reduce:{16 * MB}", {"gloo": [4, 9, 2], "ftkit": [1, 1, 5]}, {})
    two = rank(f"all_reduce:{16 * MB}", {"gloo": [3, 6, 7], "ftkit": [2, 3, 1]}, {})
    for told in (one, two):
        told["digests"] = {"gloo": "a", "ftkit": "a"}
    case = merge([one, two], 2, hosts=False)
    assert case["times"] == {"gloo": [4, 9, 7], "ftkit": [2, 3, 5]}
    (figure,) = case_figures(case)
    assert figure.value == pytest.approx(3 / 7)
    assert figure.holds is False
    assert "0.00 GiB/s" in figure.against


@pytest.mark.parametrize(
    ("name", "size", "world", "hosts", "most"),
    [
        ("all_reduce", 4096, 2, False, None),
        ("all_reduce", MB, 4, False, 1 / 2),
        ("all_reduce", 16 * MB, 2, False, 1 / 3),
        ("all_reduce", 16 * MB, 4, False, 1 / 2.5),
        ("all_reduce", 4096, 2, True, 1 / 3),
        ("all_reduce", MB, 2, True, None),
        ("all_reduce", 16 * MB, 2, True, 1 / 1.5),
        ("reduce_scatter", 64 * MB, 2, False, 1 / 5),
        ("all_gather", 64 * MB, 4, False, 1 / 4),
    ],
)
def test_goals(name: str, size: int, world: int, hosts: bool, most: float | None) -> None:
    assert goal(name, size, world, hosts=hosts) == most


def test_a_resident_tensor_is_held_against_the_bound() -> None:
    times = {"gloo": [8.0], "ftkit": [4.0], "resident": [2.0], "bound": [1.6]}
    digests = {"gloo": "a", "ftkit": "a", "resident": "a", "bound": "whatever"}
    case = merge([rank(f"all_reduce:{64 * MB}", times, digests)] * 2, 2, hosts=False)
    _, figure = case_figures(case)
    assert figure.value == pytest.approx(1.25)
    assert figure.holds
    assert not disagreements([case])


def test_sides_that_computed_something_else_make_a_problem() -> None:
    times = {"gloo": [1.0], "ftkit": [1.0]}
    one = rank("all_reduce:65536", times, {"gloo": "a", "ftkit": "a"})
    two = rank("all_reduce:65536", times, {"gloo": "a", "ftkit": "b"})
    (problem,) = disagreements([merge([one, two], 2, hosts=False)])
    assert "ftkit and gloo computed different results" in problem


def test_exposed_communication_is_what_a_step_takes_beyond_its_own() -> None:
    times = {"alone": [30.0], "gloo": [90.0], "ftkit": [60.0], "canonical": [66.0]}
    same = dict.fromkeys(times, "a")
    case = merge([rank("step:8", times, same)] * 3, 3, hosts=False)
    ddp, own, step = case_figures(case)
    assert ddp.value == pytest.approx(30 / 60)
    assert own.value == pytest.approx(36 / 60)
    assert step.value == pytest.approx(66 / 60)
    assert step.at_most == 1.5
    other = rank("step:8", times, same | {"canonical": "b"})
    assert disagreements([merge([rank("step:8", times, same), other], 2, hosts=False)])


def test_a_kill_with_a_new_connection_or_a_wrong_sum_is_a_problem() -> None:
    good = Kill(
        ranks=4,
        size=64 * MB,
        detect_s=0.02,
        edit_s=0.003,
        first_s=0.06,
        messages=3,
        connections=0,
        wrong=0,
    )
    assert not mistakes([good])
    first, _, edit = kill_figures([good])
    assert first.holds
    assert edit.holds
    bad = Kill(**{name: getattr(good, name) for name in Kill.__slots__} | {"wrong": 1})
    assert mistakes([good, bad])
