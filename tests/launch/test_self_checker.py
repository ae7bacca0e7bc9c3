"""An agent's runner of self-checks: a process of its own, and whatever goes wrong is a result."""

import sys
import threading

import pytest

from ftkit.core.clock import ManualClock
from ftkit.core.ids import NodeId
from ftkit.detection.node_health import NodeResult
from ftkit.detection.signals import NodeChecked
from ftkit.launch.self_checker import COMMAND, SelfChecker


def ran(*command: str, limit_s: float = 60.0) -> NodeChecked:
    came, told = threading.Event(), list[NodeChecked]()

    def done(found: NodeChecked) -> None:
        told.append(found)
        came.set()

    checker = SelfChecker(NodeId(3), ManualClock(7.0), done, command=command, limit_s=limit_s)
    checker.start()
    assert came.wait(60)
    checker.close()
    (found,) = told
    assert (found.node, found.at) == (3, 7.0)
    return found


@pytest.mark.multiproc
def test_this_machine_computes_and_remembers() -> None:
    found = ran(*COMMAND)
    assert not found.error
    result = NodeResult.from_json(found.result)
    assert [c.name for c in result.checks] == ["gemm", "memory"]
    assert not result.failed


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('no json')", "Expecting value"),
        ("print(3)", "not iterable"),
        ("import time; time.sleep(30)", "timed out"),
    ],
)
def test_what_prints_no_result_or_hangs_is_an_error(code: str, words: str) -> None:
    limit_s = 0.5 if "sleep" in code else 30.0
    assert words in ran(sys.executable, "-c", code, limit_s=limit_s).error


def test_what_cannot_be_started_is_an_error() -> None:
    assert "No such file" in ran("/no/such/program").error


def test_an_agent_that_ends_waits_for_no_check() -> None:
    told = list[NodeChecked]()
    command = (sys.executable, "-c", "import time; time.sleep(30)")
    checker = SelfChecker(NodeId(0), ManualClock(), told.append, command=command)
    checker.start()
    checker.start()  # it is being checked
    checker.close()
    checker.start()
    assert told == []
