"""Checks of every node before a job's ranks start: run once a machine, kept, and judged."""

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.ids import NodeId
from ftkit.detection.node_health import Check, Health, NodeResult
from ftkit.launch.config import JobConfig
from ftkit.launch.job_preflight import FOLDER, JobPreflight, judge


def result(node: str, *, digest: str = "a", disk: Health = Health.OK) -> dict[str, object]:
    checks = (
        Check(name="gemm", health=Health.OK, digest=digest),
        Check(name="disk", health=disk, note="1 MB/s in /d"),
    )
    return NodeResult(node=node, at=1.0, checks=checks).to_json()


def test_healthy_nodes_may_begin() -> None:
    assert judge({NodeId(0): result("a"), NodeId(1): result("b")}) == []


def test_a_failed_check_is_said_with_its_node() -> None:
    wrong = judge({NodeId(0): result("a"), NodeId(1): result("b", disk=Health.FAILED)})
    assert wrong == ["node 1, b: disk 1 MB/s in /d"]
    assert judge({NodeId(0): result("a", disk=Health.WARNING)}) == []


def test_a_node_that_computes_something_else_than_the_others_fails() -> None:
    results = {NodeId(n): result(f"h{n}", digest="x" if n == 2 else "a") for n in range(3)}
    (wrong,) = judge(results)
    assert wrong.startswith("node 2, h2: gemm")


def test_nonsense_is_a_failure() -> None:
    (wrong,) = judge({NodeId(0): {"node": 1}, NodeId(1): result("b")})
    assert wrong.startswith("node 0: not the result")


def checked(folder: Path, node: int, code: str) -> dict[str, object]:
    config = JobConfig(job="j", command=("x",), run_dir=str(folder), nodes=3)
    came = threading.Event()
    made = JobPreflight(
        config, NodeId(node), changed=came.set, command=(sys.executable, "-c", code)
    )
    assert came.wait(30)
    made.close()
    assert made.result is not None
    return made.result


def test_a_machine_is_checked_once_and_each_node_keeps_the_result(tmp_path: Path) -> None:
    count = tmp_path / "count"
    code = f"""
import json
open({str(count)!r}, "a").write("x")
print({json.dumps(json.dumps(result("here")))})
"""
    told = [checked(tmp_path, node, code) for node in range(2)]
    assert told[0] == told[1] == result("here")
    assert count.read_text() == "x"
    kept = [json.loads((tmp_path / FOLDER / f"node-{n}.json").read_text()) for n in range(2)]
    assert kept == json.loads(json.dumps(told))


def test_checks_that_give_no_result_are_a_failure(tmp_path: Path) -> None:
    told = checked(tmp_path, 0, "print('no json')")
    (wrong,) = judge({NodeId(0): told})
    assert "the checks gave no result" in wrong


def test_an_agent_that_ends_ends_its_checks(tmp_path: Path) -> None:
    config = JobConfig(job="j", command=("x",), run_dir=str(tmp_path))
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    made = JobPreflight(config, NodeId(0), changed=lambda: None, command=command)
    time.sleep(0.2)
    made.close()
    made._thread.join(10)
    assert not made._thread.is_alive()
    assert made.result is None


def test_the_word_for_it_is_stop_or_warn() -> None:
    with pytest.raises(UsageError, match="stop or warn"):
        JobConfig(job="j", command=("x",), preflight="maybe")
