"""The heat maps: what is dark, what is left out, and that none breaks on odd input."""

import re
from xml.etree import ElementTree

from ftkit.launch.report_heat import (
    COLUMNS_MAX,
    ROWS_MAX,
    Place,
    grid_heat,
    ratio_to_median,
    step_heat,
    wait_heat,
)

SVG = "{http://www.w3.org/2000/svg}"


def cells(picture: str) -> dict[str, float]:
    """What each cell says when pointed at -> how dark it is."""
    root = ElementTree.fromstring(picture.replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ', 1))
    return {
        str(rect.findtext(f"{SVG}title")): float(rect.attrib["fill-opacity"])
        for rect in root.iter(f"{SVG}rect")
    }


def test_the_slow_rank_alone_is_dark():
    seconds = {seat: dict.fromkeys(range(1, 9), 1.0) for seat in range(4)}
    seconds[2] |= {5: 2.0, 6: 1.5}
    found = cells(step_heat(seconds))
    dark = {words: depth for words, depth in found.items() if depth > 0.1}
    assert dark.keys() == {
        "rank 2, step 5: 2.00 x the median",
        "rank 2, step 6: 1.50 x the median",
    }
    assert dark["rank 2, step 5: 2.00 x the median"] == 1.0
    assert len(found) == 32


def test_of_a_long_run_a_column_shows_the_worst_of_its_steps():
    steps = range(10 * COLUMNS_MAX)
    seconds = {seat: dict.fromkeys(steps, 1.0) for seat in range(3)}
    seconds[1][777] = 2.0
    found = cells(step_heat(seconds))
    assert len(found) == 3 * COLUMNS_MAX
    (dark,) = [words for words, depth in found.items() if depth > 0.1]
    assert dark == "rank 1, step 770 to 779: 2.00 x the median"


def test_of_a_large_job_the_ranks_that_differ_most_are_shown():
    seconds = {seat: {1: 1.0} for seat in range(500)}
    seconds[321] = {1: 1.9}
    found = cells(step_heat(seconds))
    assert len(found) == ROWS_MAX
    assert any(words.startswith("rank 321,") for words in found)


def test_missing_steps_and_times_that_are_none_leave_holes():
    seconds = {0: {1: 1.0, 2: float("nan")}, 1: {2: 1.0}, 2: {}, 3: {1: 0.0, 2: 0.0}}
    assert ratio_to_median(seconds) == {0: {1: 2.0}, 1: {2: 2.0}, 2: {}, 3: {1: 0.0, 2: 0.0}}
    assert len(cells(step_heat(seconds))) == 4
    assert "No step" in step_heat({})
    assert "No step" in step_heat({0: {1: 0.0}})


def test_the_column_of_the_one_who_is_late_is_dark():
    waited = {(waiter, 2): 4.0 for waiter in (0, 1, 3)} | {(2, 0): 1.0}
    found = cells(wait_heat(waited))
    assert {words for words, depth in found.items() if depth == 1.0} == {
        f"rank {waiter} waited 4 s for rank 2" for waiter in (0, 1, 3)
    }
    assert found["rank 2 waited 1 s for rank 0"] < 0.5
    assert "Nobody waited" in wait_heat({})
    assert "Nobody waited" in wait_heat({(0, 1): 0.0})


def test_every_rank_of_a_hybrid_job_has_its_place():
    places = {seat: Place(dp=seat % 4, pp=seat // 4 % 2, tp=seat // 8) for seat in range(16)}
    found = cells(grid_heat(places, {5: 1.5} | dict.fromkeys(range(6, 16), 1.0)))
    assert len(found) == 16
    assert found["rank 5 (dp 1, pp 1, tp 0): 1.50 x its role's median"] > 0.5
    assert "rank 0 (dp 0, pp 0, tp 0): not timed" in found
    assert grid_heat({}, {}) == ""


def test_cells_do_not_lie_on_each_other():
    picture = grid_heat({s: Place(dp=s, pp=0, tp=0) for s in range(3)}, {})
    assert len(set(re.findall(r'<rect class="heat" x="([\d.]+)"', picture))) == 3
