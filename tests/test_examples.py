"""The examples: the plain one runs, the other one differs little and learns the same thing."""

import difflib
import json
import logging
import os
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from ftkit.core.fault_plan import Kind, Point
from tests.drills.jobs import Run, fault, run
from tests.launch.session_of_one import SessionOfOne

EXAMPLES = Path(__file__).parents[1] / "examples"
SHARDED, ELASTIC = EXAMPLES / "fsdp_plain.py", EXAMPLES / "fsdp_elastic.py"
PRETRAIN, PRETRAIN_ELASTIC = EXAMPLES / "pretrain/plain.py", EXAMPLES / "pretrain/elastic.py"
PLAIN, MINIMAL = EXAMPLES / "ddp_plain.py", EXAMPLES / "ddp_minimal.py"


def changed_lines(before: list[str], after: list[str]) -> int:
    """Lines to type or delete: a hunk that turns n lines into m counts as the larger."""
    hunks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return sum(max(b - a, d - c) for kind, a, b, c, d in hunks if kind != "equal")


def accuracy(output: str) -> float:
    found = re.search(r"accuracy (\d\.\d+)", output)
    assert found, output
    return float(found[1])


def run_plain(script: Path, *arguments: str) -> str:
    """What the only rank of a script said."""
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ
        | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        | {"OMP_NUM_THREADS": "1"},  # as torchrun sets it
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def untested(scripts: Iterable[str], tests: str) -> list[str]:
    """Of the scripts below examples/ those that no test names, by path or without the ending."""
    return [
        script
        for script in scripts
        if not re.search(rf'["/]{re.escape(script.removesuffix(".py"))}(\.py)?"', tests)
    ]


def test_every_script_has_a_test() -> None:
    scripts = [
        str(path.relative_to(EXAMPLES))
        for path in sorted(EXAMPLES.rglob("*.py"))
        if "__main__" in path.read_text()
    ]
    tests = "".join(p.read_text() for p in Path(__file__).parent.rglob("test_*.py"))
    assert len(scripts) > 10
    assert untested(scripts, tests) == []
    new = str(Path("deep") / "new.py")  # in one piece it would be found in this file
    assert untested([new, *scripts], tests) == [new]


def test_a_plain_script_needs_at_most_eight_changed_lines() -> None:
    plain, minimal = (p.read_text().splitlines() for p in (PLAIN, MINIMAL))
    assert plain != minimal
    assert 0 < changed_lines(plain, minimal) <= 8


@pytest.mark.parametrize(
    ("plain", "ours", "lines"),
    [
        ("hf_plain", "hf_trainer", 2),
        ("lightning_plain", "lightning_strategy", 2),
        ("accelerate_plain", "accelerate_steps", 8),
        ("fsdp_plain", "fsdp_elastic", 12),
        ("pretrain/plain", "pretrain/elastic", 30),
    ],
)
def test_a_framework_s_script_needs_few(plain: str, ours: str, lines: int) -> None:
    before, after = ((EXAMPLES / f"{name}.py").read_text().splitlines() for name in (plain, ours))
    assert 0 < changed_lines(before, after) <= lines


@pytest.mark.parametrize(
    ("page", "plain", "ours"),
    [
        ("README.md", "ddp_plain", "ddp_minimal"),
        ("docs/frameworks.md", "hf_plain", "hf_trainer"),
        ("docs/frameworks.md", "lightning_plain", "lightning_strategy"),
        ("docs/frameworks.md", "accelerate_plain", "accelerate_steps"),
        ("docs/frameworks.md", "pretrain/plain", "pretrain/elastic"),
    ],
)
def test_the_documents_show_the_diff_as_it_is(page: str, plain: str, ours: str) -> None:
    before, after = ((EXAMPLES / f"{n}.py").read_text().splitlines() for n in (plain, ours))
    changes = [
        line for line in difflib.unified_diff(before, after, lineterm="", n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]  # fmt: skip
    shown = re.findall(r"```diff\n(.*?)```", (EXAMPLES.parent / page).read_text(), re.DOTALL)
    assert changes in [
        [line for line in block.splitlines() if line[:1] in ("+", "-")] for block in shown
    ]


@pytest.mark.multiproc
@pytest.mark.parametrize("script", [PLAIN, SHARDED])
def test_the_plain_script_runs_as_it_is(script: Path) -> None:
    assert accuracy(run_plain(script)) > 0.9


def test_the_script_with_ftkit_learns_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = types.ModuleType("ftkit.session")
    session = SessionOfOne()
    module.init = lambda: session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ftkit.session", module)
    monkeypatch.setenv("RANK", "0")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with caplog.at_level(logging.INFO, logger="example"):
            runpy.run_path(str(MINIMAL), run_name="__main__")
    finally:
        dist.destroy_process_group()
    assert accuracy(caplog.text) > 0.9
    assert set(session.protected) == {"model", "optimizer"}


@pytest.mark.multiproc
def test_the_sharded_script_with_ftkit_learns_the_same_through_a_loss(tmp_path: Path) -> None:
    faults = [fault(Kind.KILL, Point.FORWARD, 1, 20)]
    done = run(tmp_path / "run", ELASTIC, nproc=2, faults=faults)
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    assert accuracy(done.log) > 0.9
    assert len({e["generation"] for e in done.of("build")}) > 1


@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_a_pretraining_loop_is_killed_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    def played(name: str, **how: Any) -> tuple[Run, dict[int, float]]:
        told = tmp_path / f"{name}.jsonl"
        done = run(tmp_path / name, PRETRAIN_ELASTIC, [*short, f"--metrics.file={told}"], **how)
        assert done.stop.code == 0, f"{done.stop}\n{done.log}"
        return done, losses(told)

    short = ["--training.steps=16", "--metrics.log_freq=1"]
    killed, theirs = played("killed", nproc=3, faults=[fault(Kind.KILL, Point.BACKWARD, 0, 6)])
    alone, ours = played("alone", nproc=1)
    assert len({e["generation"] for e in killed.of("build")}) > 1
    assert killed.params == alone.params
    assert len(alone.params) == 1
    assert theirs == ours
    plain = tmp_path / "plain.jsonl"
    run_plain(PRETRAIN, *short, f"--metrics.file={plain}")
    assert losses(plain) == pytest.approx(ours, rel=1e-4)
    assert ours[16] < ours[1] - 0.3


def losses(path: Path) -> dict[int, float]:
    return {told["step"]: told["loss"] for told in map(json.loads, path.read_text().splitlines())}
