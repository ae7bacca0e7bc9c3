"""Faults of more than a rank: all of them, the coordinator, and strangers at the door."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ftkit.core.errors import WireError
from ftkit.core.trace import Trace, read_run
from ftkit.core.wire import connect
from ftkit.launch.engine import Engine
from tests.drills.jobs import STEPS, TRAINING, Run, judge, run
from tests.drills.test_faults import assert_pass

pytestmark = pytest.mark.multiproc


def at_step(folder: Path, step: int, strike: Callable[[Engine], None]) -> Callable[[Engine], None]:
    """Strike once, when any rank has committed `step`."""
    struck: list[bool] = []

    def poll(engine: Engine) -> None:
        if not struck and any(
            e["kind"] == "commit" and e["step"] >= step for e in read_run(folder)
        ):  # fmt: skip
            struck.append(True)
            strike(engine)

    return poll


def test_all_ranks_at_once_are_killed_and_the_job_goes_on_from_memory(
    reference: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"

    def strike(_: Engine) -> None:
        pids = [e["pid"] for e in read_run(folder) if e["kind"] == "spawn"]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that none sees another go
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    # In two steps' time: the first, slow one makes the arenas.
    done = run(folder, TRAINING, [str(STEPS)], on_poll=at_step(folder, 3, strike))
    assert done.stop.code == 0, done.log
    assert len(done.of("spawn")) == 4
    restored = {e["step"] for e in done.of("restore")}
    assert len(restored) == 1
    died_at = min(e["mono"] for e in done.of("exit"))
    last = max(e["step"] for e in done.of("commit") if e["mono"] < died_at)
    assert last - restored.pop() <= 1, "of the last steps, at most the one being captured is lost"
    assert done.params == reference.params


def test_the_coordinator_is_killed_and_a_rank_right_after(reference: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def strike(engine: Engine) -> None:
        engine.kill_coordinator()
        (pid,) = (e["pid"] for e in read_run(folder) if e["kind"] == "spawn" and e["seat"] == 1)
        with Trace(folder / "events" / "drill.jsonl") as trace:
            trace.event("drill", fault="kill", phase="any", seat=1, member=1, step=5)
        os.kill(pid, signal.SIGKILL)

    done = run(folder, TRAINING, [str(STEPS)], on_poll=at_step(folder, 5, strike))
    assert {e["coordinator"] for e in done.events if "coordinator" in e} == {1, 2}
    assert_pass(done, reference, seats=2)


def test_the_agent_is_killed_and_its_ranks_with_it(reference: Run, tmp_path: Path) -> None:
    """Nothing in memory outlives an embedded node; the job begins again by itself."""
    folder = tmp_path / "run"

    def strike(_: Engine) -> None:
        (pid,) = (e["pid"] for e in read_run(folder) if e["kind"] == "spawn" and e["seat"] == 1)
        parent = psutil.Process(pid).parent()
        assert parent is not None
        parent.kill()

    done = run(folder, TRAINING, [str(STEPS)], on_poll=at_step(folder, 5, strike))
    assert done.stop.code == 0, f"{done.stop.reason}\n{done.log}"
    assert done.params == reference.params


def test_an_agent_and_the_coordinator_are_killed_together(reference: Run, tmp_path: Path) -> None:
    """Nobody is left who knew the lost rank; its number is not given to another process."""
    folder = tmp_path / "run"

    def strike(engine: Engine) -> None:
        (pid,) = (e["pid"] for e in read_run(folder) if e["kind"] == "spawn" and e["seat"] == 1)
        parent = psutil.Process(pid).parent()
        assert parent is not None
        engine.kill_coordinator()
        parent.kill()

    done = run(folder, TRAINING, [str(STEPS)], nproc=1, nodes=2, on_poll=at_step(folder, 5, strike))
    assert done.stop.code == 0, f"{done.stop.reason}\n{done.log}"
    assert done.params == reference.params
    spawned = [(e["seat"], e["member"]) for e in done.of("spawn")]
    assert len(spawned) == len({member for _, member in spawned}) == 3, spawned
    # The other node's rank went on: it was neither replaced nor sent back.
    assert [seat for seat, _ in spawned].count(0) == 1
    steps = [e["step"] for e in done.of("commit") if e["seat"] == 0]
    assert steps == sorted(set(steps))


def test_strangers_are_refused_and_disturb_nobody(reference: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    open_still: list[socket.socket] = []
    refused: list[WireError] = []

    def strike(_: Engine) -> None:
        spawns = [e["pid"] for e in read_run(folder) if e["kind"] == "spawn"]
        agent = psutil.Process(spawns[0]).parent()
        assert agent is not None
        ports = [
            c.laddr
            for pid in (*spawns, agent.pid)
            for c in psutil.Process(pid).net_connections("tcp")
            if c.status == psutil.CONN_LISTEN
        ]
        assert len(ports) >= 4, "two data planes, the agent's port and its store"
        for host, port in ports:
            for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, b"ftkit/1\n", b""):
                sock = socket.create_connection((host, port), timeout=5)
                sock.sendall(noise)
                if noise:
                    sock.close()
                else:
                    open_still.append(sock)
            with pytest.raises(WireError) as caught:
                connect((host, port), b"x" * 32, hello={"role": "coordinator", "term": 99})
            refused.append(caught.value)
        unix = next(
            c.laddr for c in agent.net_connections("unix") if str(c.laddr).endswith("agent.sock")
        )
        with pytest.raises(WireError):
            connect(str(unix), b"x" * 32, hello={"role": "rank", "seat": 0, "member": 0})

    try:
        done = run(folder, TRAINING, [str(STEPS)], on_poll=at_step(folder, 3, strike))
    finally:
        for sock in open_still:
            sock.close()
    assert len(refused) >= 4
    outcome = judge(done, reference, seats=2, evicts=False)
    assert outcome.params_equal, outcome.evidence
    assert not outcome.evidence["problems"]
    said = [e["reason"] for e in done.of("refused") if "peer" in e]
    assert any("does not hold this job's secret" in r for r in said)
    assert any("not ftkit's greeting" in r for r in said)
    assert len(done.of("spawn")) == 2
