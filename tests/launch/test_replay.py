"""Recorded jobs: read in each format, and judged by the detectors that watch a live one."""

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from click.testing import CliRunner
from pyarrow import parquet

from ftkit.core import exit_codes
from ftkit.core.errors import UsageError
from ftkit.detection.signals import to_json
from ftkit.detection.step_detector import PaceConfig
from ftkit.launch.cli import main
from ftkit.launch.replay import Replayed, replay
from ftkit.launch.traces import read_trace

BATCHES = 4


def operations(
    *, dps: int = 4, stages: int = 2, steps: int = 20, slow: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """A pipeline's operations; its last stage has more to do, and its waits hide nothing."""
    rng = random.Random(0)
    rows = []
    for step in range(100, 100 + 3 * steps, 3):
        for dp in range(dps):
            for stage in range(stages):
                usual = 1.3 if stage == stages - 1 else 1.0
                factor = 1.6 if (dp, stage) == slow else 1.0
                kinds = [("forward-compute", 0.5), ("backward-compute", 1.0), ("forward-recv", 9.0)]
                for batch in range(BATCHES):
                    for op, seconds in kinds:
                        compute = "compute" in op
                        rows.append(
                            {
                                "dp_rank": dp,
                                "stage": stage,
                                "rank": dp * stages + stage,
                                "step": step,
                                "optype": op,
                                "start_ts": 2.0 * batch,
                                "duration": seconds
                                * (usual * factor if compute else 1.0)
                                * rng.lognormvariate(0, 0.004),
                            }
                        )
    return rows


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "trace.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def judged(folder: Path, rows: list[dict[str, Any]]) -> Replayed:
    return replay(read_trace(written(folder, rows), "bytedance"), PaceConfig())


def accused(replayed: Replayed) -> list[object]:
    return [said.verdict.evidence["place"] for said in replayed.accused]


def test_the_slow_worker_is_named_and_nobody_who_waits_for_it(tmp_path) -> None:
    replayed = judged(tmp_path, operations(slow=(2, 1)))
    assert accused(replayed) == ["dp=2 pp=1"]
    (said,) = replayed.accused
    assert said.verdict.evidence["factor"] == pytest.approx(1.6, rel=0.02)
    assert said.steps <= 6
    assert said.lasts


def test_a_last_stage_with_more_to_do_is_uneven_and_nobody_is_accused(tmp_path) -> None:
    replayed = judged(tmp_path, operations())
    assert accused(replayed) == []
    assert [s.verdict.evidence["kind"] for s in replayed.said] == ["role"]


def spoil(rows: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    rng = random.Random(1)
    match how:
        case "shuffled":
            rng.shuffle(rows)
        case "rows lost":
            rows = [r for r in rows if rng.random() > 0.2]
        case "steps of ranks lost":
            gone = {(r["rank"], r["step"]) for r in rows if rng.random() < 0.02}
            rows = [r for r in rows if (r["rank"], r["step"]) not in gone]
        case "a rank lost":
            rows = [r for r in rows if r["rank"] != 0]
        case "no numbers":
            for r in rows:
                if rng.random() < 0.05:
                    r["duration"] = rng.choice([math.nan, math.inf, 0.0, -1.0, None])
        case "two replicas":
            rows = [r for r in rows if r["dp_rank"] >= 2]
        case "text":
            rows = [{**r, "step": str(r["step"]), "duration": str(r["duration"])} for r in rows]
        case "now and then no place":
            rows = [{**r, "stage": None if rng.random() < 0.3 else r["stage"]} for r in rows]
        case "absurd":
            for r in rows:
                if rng.random() < 0.02:
                    r["duration"] = 1e30
        case "played twice":
            rows = rows + [r for r in rows if r["step"] < 120]
        case _:
            rows = [{k: v for k, v in r.items() if k != how} for r in rows]
    return rows


@pytest.mark.parametrize(
    "how",
    [
        *("shuffled", "rows lost", "steps of ranks lost", "a rank lost", "no numbers"),
        *("played twice", "rank", "start_ts", "text", "now and then no place", "absurd"),
    ],
)
def test_traces_that_lack_something(tmp_path, how) -> None:
    rows = operations(slow=(2, 1), stages=3)
    assert accused(judged(tmp_path, spoil(rows, how))) == ["dp=2 pp=1"]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"duration": timedelta(seconds=1)}, "column duration holds no numbers"),
        ({"start_ts": datetime(2026, 1, 1, tzinfo=UTC)}, "column start_ts holds no numbers"),
        ({"rank": None, "dp_rank": "x"}, "column dp_rank holds no numbers"),
    ],
)
def test_columns_of_another_kind_are_refused_by_name(tmp_path, wrong, text) -> None:
    rows = [r | wrong for r in operations(dps=2)]
    with pytest.raises(UsageError, match=text):
        judged(tmp_path, rows)


def test_operations_of_nobody_are_refused(tmp_path) -> None:
    rows = [{k: r[k] for k in ("step", "optype", "duration")} for r in operations(dps=2)]
    with pytest.raises(UsageError, match="whose"):
        judged(tmp_path, rows)


def test_two_replicas_of_three_stages(tmp_path) -> None:
    rows = operations(slow=(2, 1), stages=3)
    assert accused(judged(tmp_path, spoil(rows, "two replicas"))) == ["dp=2 pp=1"]


def test_one_replica_has_nobody_to_be_compared_with(tmp_path) -> None:
    assert accused(judged(tmp_path, operations(slow=(0, 1), dps=1))) == []


@pytest.mark.parametrize("seed", range(5))
def test_workers_of_two_kinds_and_gaps(tmp_path, seed) -> None:
    rng = random.Random(seed)
    path = tmp_path / "job.csv"
    lines = [",worker,gpu,time,batch_time_norm"]
    for n in range(60):
        for worker in range(10):
            value = (400 if worker % 2 else 120) * rng.lognormvariate(0, 0.03)
            if rng.random() > 0.1:
                lines.append(f"{n},{worker},25,{10 * n + 1},{value:.0f}")
        lines.append(f"{n},3,25,{10 * n + 1},")
    path.write_text("\n".join(lines))
    replayed = replay(read_trace(path, "alibaba"), PaceConfig())
    assert accused(replayed) == []
    assert {s.verdict.evidence["kind"] for s in replayed.said} == {"kinds"}


def test_our_own_signals_and_what_else_stands_between_them(tmp_path) -> None:
    steps = read_trace(written(tmp_path, operations(slow=(0, 0))), "bytedance")
    path = tmp_path / "signals.jsonl"
    path.write_text(
        "\n".join([json.dumps(to_json(s)) for s in steps] + ['{"kind": "another"}', ""])
    )
    assert read_trace(path, "jsonl") == steps
    ran = CliRunner().invoke(main, ["detect", "replay", str(path), "--format", "jsonl", "--json"])
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.output)
    assert [(a["place"], a["fault"], a["phase"]) for a in told["accused"]] == [
        ("dp=0 pp=0", "slow", "backward")
    ]
    assert (told["ranks"], told["steps"], told["alarms_per_day"]) == (8, 20, 0.5)
    shown = CliRunner().invoke(main, ["detect", "replay", str(path), "--format", "jsonl"])
    assert "SLOW from step 115 on: seat 0" in shown.output


@pytest.mark.parametrize(
    ("content", "format_", "text"),
    [
        (b"no parquet", "bytedance", "cannot be read as bytedance"),
        (b"a,b\n1,2\n", "alibaba", "worker, time, batch_time_norm are missing"),
        (b"worker,time,batch_time_norm\n", "alibaba", "no step"),
        (b'{"kind": "step"}\n', "jsonl", "line 1"),
        (b"{\n", "jsonl", "line 1"),
        (b"[" * 100_000 + b"\n", "jsonl", "recursion"),
        (b"worker,time,batch_time_norm\n1,inf,2\n", "alibaba", "infinity"),
    ],
)
def test_what_is_no_trace_is_refused_with_the_reason(tmp_path, content, format_, text) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=text):
        read_trace(path, format_)
    with pytest.raises(UsageError, match="not a file"):
        read_trace(tmp_path / "none", format_)


def test_options_that_make_no_sense_are_refused(tmp_path) -> None:
    path = written(tmp_path, operations(steps=2))
    ran = CliRunner().invoke(
        main, ["detect", "replay", str(path), "--format", "bytedance", "--effect", "0"]
    )
    assert ran.exit_code == exit_codes.USAGE
