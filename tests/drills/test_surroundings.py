"""What surrounds the ranks of a real job: a clock, a history, metrics, and a blind coordinator."""

import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.fault_plan import Kind, Point
from ftkit.core.trace import read_run
from ftkit.core.verdict import Fault
from ftkit.core.wall_clock import VARIABLE as CLOCK
from ftkit.detection.offenders import DAY_S
from ftkit.launch.arenas import OWNER
from ftkit.launch.engine import Engine
from ftkit.launch.history import History
from ftkit.launch.resource_drills import LABELS, _write_history
from tests.drills.jobs import TRAINING, fault, run

pytestmark = pytest.mark.multiproc

#: More than there is time for: a job ends when its test has seen enough.
STEPS = "100000"


def of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_run(folder) if e["kind"] == kind]


def free_ports() -> int:
    """Two ports, one after the other, that were free a moment ago."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        port = int(first.getsockname()[1])
        second.bind(("127.0.0.1", port + 1))
        return port


def test_a_clock_an_offender_and_what_is_scraped(tmp_path: Path) -> None:
    history, port = tmp_path / "history.jsonl", free_ports()
    _write_history(history, f"{socket.gethostname()}/1", 2)
    scraped: dict[int, str] = {}
    folder = tmp_path / "run"
    ended: list[bool] = []

    def scrape(engine: Engine) -> None:
        for node in {0, 1} - scraped.keys():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port + node}/metrics") as answer:
                    text = answer.read().decode()
            except urllib.error.URLError:
                continue
            if "ftkit_rank_loss_value" in text and "ftkit_node_disk_free_bytes" in text:
                scraped[node] = text
        faults = {e["fault"] for e in of(folder, "verdict")}
        if len(scraped) == 2 and faults >= {"clock", "offender"} and not ended:
            ended.append(True)
            engine.interrupt()

    settings: dict[str, Any] = {
        "env": {CLOCK: "1:3"},
        "history": str(history),
        "metrics_port": port,
    }
    done = run(folder, TRAINING, [STEPS], nproc=1, nodes=2, settings=settings, on_poll=scrape)
    assert ended, done.log
    # Two ranks and their agents share two cores here: one may well be slow for a while.
    passed_over = LABELS | {Fault.SLOW}
    said = {
        (e["fault"], e["seat"]): e["evidence"]
        for e in done.of("verdict")
        if e["fault"] not in passed_over
    }
    assert said.keys() == {("clock", 1), ("offender", 1)}
    assert abs(said["clock", 1]["offset_s"] - 3) <= said["clock", 1]["error_s"] + 0.01
    assert 'node="1",rank="1"' in scraped[1]
    assert "ftkit_agent_coordinator_connected" in scraped[0]
    last = History(str(history), "").read()[-1]
    assert (last["kind"], last["trained"]) == ("end", True)


def test_an_agent_that_stands_still_leaves_its_members_unseen_and_training_goes_on(
    tmp_path: Path,
) -> None:
    folder, shm = tmp_path / "run", tmp_path / "shm"
    agents: list[int] = []
    moves = [signal.SIGSTOP, signal.SIGCONT]
    ended: list[bool] = []

    def blind() -> list[float]:
        found = [e for e in of(folder, "blind") if e["what"] == "members"]
        return [e["mono"] for e in found if 1 in e["members"]]

    def pause(engine: Engine) -> None:
        mine = [e["mono"] for e in of(folder, "commit") if e["seat"] == 1]
        # Not at once: when the optimizer has its state, a rank asks its agent for a larger arena.
        if len(moves) == 2 and len(mine) > 20:
            (owner,) = shm.glob(f"ftkit-*-n1/{OWNER}")
            agents.append(int(owner.read_text().split()[0]))
            os.kill(agents[0], moves.pop(0))
        # It stands still until its member has been out of sight, and has committed meanwhile.
        if len(moves) == 1 and agents and any(mono > late for late in blind() for mono in mine):
            os.kill(agents[0], moves.pop(0))
        back = [e for e in of(folder, "sighted") if not moves and e["mono"] > blind()[0]]
        if back and not ended:
            ended.append(True)
            engine.interrupt()

    # Out of sight after two seconds, and taken for lost after many more.
    done = run(
        folder, TRAINING, [STEPS], nproc=1, nodes=2, on_poll=pause, shm_root=shm, max_stall_s=8.0
    )
    assert ended, done.log
    assert len(done.of("spawn")) == 2, "it was not taken for lost"


def test_a_rank_that_dies_on_a_node_that_fails_again_and_again_comes_back_on_the_spare(
    tmp_path: Path,
) -> None:
    path, host, now = tmp_path / "history.jsonl", socket.gethostname(), time.time()
    history = History(str(path), "earlier")
    nodes = [f"{host}/{i}" for i in range(30)]
    history.append("job", at=now - 60 * DAY_S, chain="earlier", nodes=nodes)
    # Once is bad luck, and the job begins there; its own loss makes it two.
    history.append("fault", at=now - DAY_S, node=f"{host}/1", fault="node-lost")
    folder = tmp_path / "run"

    def end(engine: Engine) -> None:
        if any(e["action"] == "grown" for e in of(folder, "decision")):
            engine.interrupt()

    done = run(
        folder,
        TRAINING,
        [STEPS],
        nodes=2,
        nproc=1,
        settings={"history": str(path), "spare_nodes": 1},
        faults=[fault(Kind.KILL, Point.FORWARD, 1, 5)],
        on_poll=end,
    )
    assert [(e["seat"], e["node"]) for e in done.of("spawn")] in (
        [(0, 0), (1, 1), (1, 2)],
        [(1, 1), (0, 0), (1, 2)],
    )
    (moved,) = (e for e in done.of("decision") if e["action"] == "respawn")
    assert (moved["node"], moved["avoided"]) == (2, 1)
    assert f"({host}/1) failed 2 times" in moved["reason"]
    assert [e["members"] for e in done.of("decision") if e["action"] == "grown"] == [[0, 1]], (
        done.log
    )
