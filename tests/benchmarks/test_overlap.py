"""What `overlap` makes of what its ranks measured."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import overlap
from benchmarks.jobs import JobFailed
from benchmarks.links import Links
from benchmarks.overlap import (
    PARTS,
    PLANS,
    figures_of,
    measure,
    problems_of,
    rate_for,
    times,
)
from benchmarks.overlap_modelled import on_a_model
from benchmarks.wires import Wires


def told(**seconds: list[float]) -> dict[str, Any]:
    return {"times": seconds}


def test_of_each_round_the_slowest_rank_counts() -> None:
    found = [told(a=[1.0, 5.0, 1.0]), told(a=[2.0, 1.0, 3.0])]
    assert times(found) == {"a": 3.0}


def test_a_linear_is_held_against_gloo_and_against_what_is_possible() -> None:
    found = [
        {**told(compute=[0.03], gloo=[0.16], ftkit=[0.1], overlapped=[0.07]), "sent": 3_000_000}
    ] * 2
    gloo, bound, ours = figures_of("linear", 400, found, wires=False)
    assert gloo.value == pytest.approx(0.16 / 0.07)
    assert gloo.holds
    assert bound.value == pytest.approx(0.06 / 0.07)
    assert bound.holds
    assert ours.holds is None
    (free,) = figures_of("linear", None, found, wires=False)
    assert free.value == pytest.approx(0.1 / 0.07)


def test_what_woven_layers_hide_is_of_what_can_be_hidden() -> None:
    found = [told(compute=[0.3], whole=[0.5], halves=[0.34], auto=[0.34])]
    kept, hidden = figures_of("weave", 400, found, wires=False)
    assert hidden.value == pytest.approx(80)
    assert hidden.holds
    assert kept.holds


def test_rings_are_held_against_one_way_or_against_the_better_way() -> None:
    found = [told(kv=[1.6], allgather=[0.8], auto=[0.9])]
    (wires,) = figures_of("grouped", 25, found, wires=True)
    (port,) = figures_of("grouped", 25, found, wires=False)
    assert wires.value == pytest.approx(1.6 / 0.9)
    assert port.value == pytest.approx(0.8 / 0.9)
    assert wires.holds
    assert not port.holds


def test_a_snapshot_is_held_against_training_alone_and_the_windows() -> None:
    seconds = told(none=[4.0], block=[4.8], blast=[4.4], governed=[4.04])
    one = {**seconds, "took": [2.0], "bytes": 75_000_000, "idle_share": 0.45}
    governed, blast, block, used = figures_of("traffic", 1000, [one], wires=False)
    assert [f.value for f in (governed, blast, block)] == [
        pytest.approx(1.0), pytest.approx(10.0), pytest.approx(20.0),
    ]  # fmt: skip
    # Windows of 900 ms passed meanwhile, and 600 ms of bytes went through them.
    assert used.value == pytest.approx(100 * 0.6 / 0.9, rel=0.01)


def test_sums_that_differ_are_problems() -> None:
    good = {**told(a=[1.0]), "digests": {"gloo": 1, "overlapped": 1}, "error": 1e-7}
    assert problems_of("linear", 400, [good]) == []
    assert len(problems_of("linear", 400, [{**good, "digests": {"gloo": 1, "overlapped": 2}}])) == 1
    assert len(problems_of("weave", 400, [{**good, "error": 0.1}, good])) == 1
    assert {*PLANS, "modelled"} == set(PARTS)


def test_woven_layers_run_at_rates_that_give_their_bounds() -> None:
    mbit = rate_for(1.6, 0.5, 19_000_000)
    assert 19_000_000 / (mbit * 125e3) == pytest.approx(0.6 * 0.5, rel=0.01)
    found = [told(compute=[0.5], whole=[0.8], halves=[0.55], auto=[0.55])]
    _, hidden = figures_of("weave", mbit, found, wires=False, bound=1.6)
    assert hidden.name.endswith("bound 1.6")
    assert str(mbit) in hidden.against


def test_what_could_not_be_measured_has_rows_that_do_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **more: Any) -> Any:
        raise JobFailed("child 1 exited with 1")

    monkeypatch.setattr(overlap, "run", failing)
    monkeypatch.setattr(Links, "possible", lambda: True)
    monkeypatch.setattr(Wires, "available", lambda: True)
    rows = measure(["weave", "ddp"], 3, tmp_path, 600).figures
    assert len(rows) == 3 + 2
    assert all(row.value is None and row.holds is False for row in rows)
    assert "exited with 1" in rows[0].against
    late = measure(["ddp"], 3, tmp_path, 0).figures
    assert ["no time left" in row.against for row in late] == [True, True]


def test_on_a_modelled_link_four_fifths_are_hidden() -> None:
    figure = on_a_model()
    assert figure.holds, figure
