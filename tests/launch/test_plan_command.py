"""`ftkit plan`: the choice for given costs, and for those of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ftkit.core import exit_codes
from ftkit.core.trace import read_run
from ftkit.launch.cli import main
from ftkit.launch.run_costs import run_costs
from tests.launch.histories import event
from tests.launch.test_goodput import killed


def ftkit(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def plan(*arguments: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(ftkit("plan", *arguments, "--json"))
    return told


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of three ranks that lost one and got it back."""
    starts = [event(0.0, "spawn", seat=s, member=s, pid=s) for s in range(3)]
    more = [
        event(5.4, "spawn", seat=1, member=3, pid=9),
        event(7.3, "restore", seat=1, member=3, step=6, seconds=0.5, bytes=1_000_000,
              source="ftkit-x-0.arena on this node"),
    ]  # fmt: skip
    (tmp_path / "events").mkdir()
    lines = "".join(json.dumps(e) + "\n" for e in [*starts, *killed(), *more])
    (tmp_path / "events" / "all.jsonl").write_text(lines)
    return tmp_path


def test_the_table_is_that_of_the_policy() -> None:
    told = plan("--world", "64", "--node-lost", "--step-s", "10", "--slots", "512",
                "--cost", "replacement_s=300", "--cost", "respawn_s=0", "--disk-steps", "58")  # fmt: skip
    assert told["choice"]["option"] == "respawn"
    (row,) = [r for r in told["choice"]["table"] if r["option"] == "respawn"]
    assert row["terms"]["degraded"] == pytest.approx(300 / 9, abs=1e-3)
    assert told["growth"]["grow"] is True
    assert [i["tier"] for i in told["intervals"]] == ["snapshot", "parity", "checkpoint"]


def test_costs_are_taken_from_a_run(run_dir: Path) -> None:
    told = plan(str(run_dir))["costs"]
    assert told["step_s"] == {"2": pytest.approx(0.75), "3": pytest.approx(0.5)}
    assert told["detect_s"] == pytest.approx(0.05)
    assert told["regroup_s"] == pytest.approx(0.15)
    assert told["respawn_s"] == pytest.approx(8.6 - 5.4)
    assert told["restart_s"] == pytest.approx(3.5)
    assert told["memory_bps"] == pytest.approx(2e6)
    assert "disk_bps" not in told["measured"]


def test_what_the_user_says_comes_before_what_was_measured(run_dir: Path) -> None:
    told = plan(str(run_dir), "--cost", "detect_s=2", "--step-s", "4")["costs"]
    assert told["detect_s"] == 2
    assert told["step_s"] == {"2": pytest.approx(0.75), "3": 4.0}


def test_failures_of_the_run_are_in_the_rate(run_dir: Path) -> None:
    costs, rate = run_costs(read_run(run_dir))
    assert (costs.world, rate.failures) == (3, 1)
    assert rate.exposure_s == pytest.approx(3 * 9.6)


def test_for_people_it_says_what_was_assumed(run_dir: Path) -> None:
    text = ftkit("plan", str(run_dir))
    assert text.startswith("Respawn loses")
    (assumed,) = [line for line in text.splitlines() if line.startswith("Assumed")]
    assert "disk_bps" in assumed
    assert "detect_s" not in assumed
    approximate = ftkit("plan", "--no-memory", "--stale-steps", "3", "--allow-approximate",
                        "--done-steps", "500")  # fmt: skip
    assert "This changes the result of the training." in approximate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cost", "foo=1"), "no cost 'foo'"),
        (("--cost", "detect_s=soon"), "'soon' is no number"),
        (("--cost", "detect_s=-1"), "not negative"),
        (("--world", "2", "--lost", "3"), "3 of 2 ranks cannot be lost"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[str, ...], message: str) -> None:
    assert message in ftkit("plan", *arguments, code=exit_codes.USAGE)


def test_a_run_without_ranks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    assert "no rank was started" in ftkit("plan", str(tmp_path), code=exit_codes.USAGE)


def test_explain_and_report_say_where_the_time_went(run_dir: Path) -> None:
    assert "Goodput was 52.1%" in ftkit("explain", str(run_dir))
    told = json.loads(ftkit("explain", str(run_dir), "--json"))
    assert told["goodput"]["lost_s"]["degraded"] == pytest.approx(1.0)
    out = run_dir / "r.html"
    told = json.loads(ftkit("report", str(run_dir), "--out", str(out), "--json"))
    assert told["goodput"] == pytest.approx(5 / 9.6)
    assert "<h2>Goodput</h2>" in out.read_text()


def test_it_shows_what_both_placements_of_shards_move() -> None:
    told = plan("--world", "4", "--cost", "lost_bytes=1e9")
    assert [p["name"] for p in told["placements"]] == ["blocks", "contiguous"]
    text = ftkit("plan", "--world", "4", "--cost", "lost_bytes=1e9")
    assert (
        "contiguous  50.0% of the state (2e+09 bytes), 25.0% of the state (1e+09 bytes) to" in text
    )
    assert "blocks      nothing before training goes on" in text
    assert not plan("--world", "4", "--lost", "2")["placements"]


def test_what_a_job_chose_by_itself_is_shown_wherever_one_looks(run_dir: Path) -> None:
    chosen = [
        event(4.0, "parity-interval", seconds=9.5, before=None, reason="assumed", held_s=0.002,
              measured=[]),
        event(6.0, "parity-interval", seconds=42.0, before=9.5, reason="it pays", held_s=0.01,
              measured=["parity_block_s"]),
        event(6.5, "checkpoint-interval", every=80, reason="so it does"),
    ]  # fmt: skip
    with (run_dir / "events" / "all.jsonl").open("a") as file:
        file.writelines(json.dumps(e) + "\n" for e in chosen)
    both = {"parity": "every 42 s: it pays", "checkpoints": "every 80 steps: so it does"}
    told = plan(str(run_dir))
    assert told["chosen"] == both
    assert told["costs"]["parity_block_s"] == 0.01
    assert "The job itself chose parity every 42 s: it pays." in ftkit("plan", str(run_dir))
    state = json.loads(ftkit("status", str(run_dir), "--json"))
    assert both.items() <= state.items()
    watched = ftkit("status", str(run_dir))
    assert all(f"{what} {often}\n" in watched for what, often in both.items())
    assert "The job chose to make parity every 42.0 s (it pays), after 9.5 s." in ftkit(
        "explain", str(run_dir)
    )


@pytest.mark.parametrize("command", ["plan", "explain"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "restore", "seconds": None, "bytes": None, "seat": 0},
        {"kind": "restore", "seconds": 1, "bytes": 1, "seat": "a"},
        {"kind": "snapshot", "begin_s": "a", "gate_s": 1, "step": 1, "seat": 0},
        {"kind": "commit", "seat": 0, "member": 0, "step": None, "generation": 1},
    ],
)
def test_events_that_are_none_of_ours_end_in_no_traceback(run_dir: Path, command, wrong) -> None:
    with (run_dir / "events" / "all.jsonl").open("a") as file:
        file.write(json.dumps({"mono": 8.0} | wrong) + "\n")
    done = CliRunner().invoke(main, [command, str(run_dir)])
    assert done.exit_code in (0, exit_codes.USAGE)
    if done.exit_code:
        assert f"{run_dir} holds events that ftkit did not write so" in done.stderr


def test_costs_that_cannot_be_weighed_are_said_so() -> None:
    assert "cannot be weighed" in ftkit("plan", "--step-s", "1e-320", code=exit_codes.USAGE)
