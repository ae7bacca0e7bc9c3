"""Figures and their goals, and the page of kept results."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.figures import Figure, Report, finish, overview, parser, percentile, save, table


def report(*, problems: tuple[str, ...] = (), value: float | None = 0.25) -> Report:
    return Report(
        name="sample",
        figures=[
            Figure(name="repair p50", value=value, unit="s", at_most=0.3, against="torchft 5 s"),
            Figure(name="step", value=0.05, unit="s"),
        ],
        computed={"parameters": "aa11"},
        problems=problems,
        notes=["one thing was patched"],
        options={"quick": True, "venv": Path("/tmp/x")},
        samples=[1, 2],
    )


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**({"json": False, "save": None} | given))


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([3, 1, 2], 50, 2),
        ([4, 1, 3, 2], 50, 2),
        (list(range(1, 21)), 95, 19),
        (list(range(1, 21)), 100, 20),
        ([7], 95, 7),
        ([], 50, None),
    ],
)
def test_a_percentile_is_a_value_that_was_measured(values, percent, expected):
    assert percentile(values, percent) == expected


@pytest.mark.parametrize(
    ("value", "goal", "holds"),
    [(0.3, 0.3, True), (0.31, 0.3, False), (None, 0.3, False), (9.0, None, None)],
)
def test_a_goal_is_reached_or_not_and_what_was_not_measured_reaches_none(value, goal, holds):
    assert Figure(name="x", value=value, unit="s", at_most=goal).holds is holds


@pytest.mark.parametrize(("value", "holds"), [(0.9, True), (0.89, False), (None, False)])
def test_a_goal_may_be_the_least_there_should_be(value, holds):
    figure = Figure(name="x", value=value, unit="x", at_least=0.9)
    assert figure.holds is holds
    assert figure.goal == ">= 0.9"


def test_the_table_shows_goals_digests_notes_and_problems():
    text = table(report(problems=("the bits differ",)))
    assert "repair p50" in text
    assert "0.25 s" in text
    assert "<= 0.3" in text
    assert "holds" in text
    assert "computed parameters: aa11" in text
    assert "note: one thing was patched" in text
    assert text.splitlines()[-1] == "PROBLEM: the bits differ"
    assert "FAILS" in table(report(value=0.4))


def test_json_is_one_line_and_everything_in_it_can_be_read_back(capsys):
    assert finish(report(), options(json=True)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert told["figures"][0] == {
        "name": "repair p50",
        "value": 0.25,
        "unit": "s",
        "goal": "<= 0.3",
        "holds": True,
        "against": "torchft 5 s",
    }
    assert told["computed"] == {"parameters": "aa11"}
    assert told["options"] == {"quick": True, "venv": "/tmp/x"}
    assert told["versions"]["python"]


def test_figures_of_a_run_with_problems_are_not_kept(tmp_path, capsys):
    assert finish(report(problems=("the bits differ",)), options(save=tmp_path)) == 1
    assert not list(tmp_path.iterdir())
    assert finish(report(), options(save=tmp_path)) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "sample.json"]


def test_what_is_kept_is_what_was_printed_however_late_it_is_written(tmp_path, capsys, monkeypatch):
    loads = iter([(0.5, 0.5, 0.5), (2.0, 2.0, 2.0)])
    monkeypatch.setattr("os.getloadavg", lambda: next(loads))
    finish(report(), options(json=True, save=tmp_path))
    told = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "sample.json").read_text()) == told
    assert "load 0.5" in told["machine"]


def test_the_page_of_results_is_made_of_all_that_was_kept(tmp_path):
    save(report().to_json(), tmp_path)
    save(Report(name="other", figures=[], computed={}, notes=["nothing"]).to_json(), tmp_path)
    save(report(value=0.4).to_json(), tmp_path)
    page = (tmp_path / "README.md").read_text()
    kept = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("*.json"))]
    assert page == overview(kept)
    (row,) = [line for line in page.splitlines() if "repair p50" in line]
    assert "0.4 s" in row
    assert "**no**" in row
    assert "(quick)" in row
    assert "- other: nothing" in page


def test_every_benchmark_takes_the_same_options():
    given = parser("What it does.").parse_args(["--quick", "--json", "--save", "/tmp/here"])
    assert (given.quick, given.json, given.save) == (True, True, Path("/tmp/here"))
