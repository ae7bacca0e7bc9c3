"""Drills of whole nodes: what a seed makes of them, and when and whom they strike."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ftkit.checkpoint.stripes import plan_stripes
from ftkit.core.errors import FtkitError, UsageError
from ftkit.core.ids import NodeId
from ftkit.core.trace import read_run
from ftkit.launch import node_drills
from ftkit.launch.drill_catalogue import CORRUPT_SHARD, LOSE_NODES
from ftkit.launch.drill_faults import LOSE_NODE
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import choose, choose_nodes
from ftkit.launch.node_drills import NodeStriker, flip_bit, pick_victims


def test_one_rank_a_node_unless_nodes_are_given() -> None:
    job = Job().for_nodes(LOSE_NODE)
    assert (job.nodes, job.nproc, job.parity) == (3, 1, "2+1")
    job = Job(nproc=5).for_nodes(LOSE_NODES)
    assert (job.nodes, job.nproc, job.parity) == (5, 1, "3+2")
    job = Job(nodes=4, nproc=2, parity="1+1").for_nodes(CORRUPT_SHARD)
    assert (job.nodes, job.nproc, job.parity) == (4, 2, "1+1")


def test_the_seed_decides_who_is_lost() -> None:
    job = Job().for_nodes(LOSE_NODES)
    drills = [choose_nodes(LOSE_NODES, job, seed=s) for s in range(30)]
    assert drills[3] == choose_nodes(LOSE_NODES, job, seed=3)
    assert {len(d.nodes) for d in drills} == {2}, "as many as parity allows"
    assert len({d.nodes for d in drills}) == 6
    assert all(d.faults() == [] for d in drills), "the ranks do nothing to themselves"


def test_what_cannot_be_drilled_is_refused() -> None:
    with pytest.raises(UsageError, match="--parity"):
        choose_nodes(LOSE_NODES, Job(nodes=3), seed=0)
    with pytest.raises(UsageError, match="embedded"):
        choose_nodes(LOSE_NODES, Job(nodes=3, parity="2+1", engine="ray"), seed=0)
    with pytest.raises(UsageError, match="leave --at out"):
        choose_nodes(LOSE_NODES, Job(nodes=3, parity="2+1"), at="vote", seed=0)
    with pytest.raises(UsageError, match="lose-node, lose-nodes, corrupt-shard, all"):
        choose("lose-everything", None, seed=0, nproc=3, steps=100)


def test_no_stripe_is_hurt_beyond_repair() -> None:
    parts = {NodeId(n): [5 << 20, 3 << 20] for n in range(4)}
    plan = plan_stripes(parts, 2, 2)
    for seed in range(50):
        lost, data, parity = pick_victims(plan, random.Random(seed))
        for number, stripe in enumerate(plan.stripes):
            hurt = {shard for shard, node in enumerate(stripe.nodes) if node == lost}
            hurt |= {p.shard for p in (data, parity) if p.stripe == number}
            assert len(hurt) == (2 if number in (data.stripe, parity.stripe) else 1)
    with pytest.raises(FtkitError, match="too thin"):
        pick_victims(plan_stripes(parts, 3, 1), random.Random(0))


def test_one_bit_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(100))
    flip_bit(tmp_path / "f", 37, random.Random(1))
    found = (tmp_path / "f").read_bytes()
    assert [i for i, b in enumerate(found) if b] == [37]
    assert found[37].bit_count() == 1


class Struck:
    def __init__(self, log: list[object]) -> None:
        self.log = log

    def kill_node(self, node: int) -> None:
        self.log.append(node)


def test_it_strikes_once_when_all_train_and_parity_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[object] = []
    monkeypatch.setattr(node_drills.os, "kill", lambda pid, number: log.append((pid, number)))  # type: ignore[attr-defined]
    running = {100, 101, 102, 200}
    monkeypatch.setattr(node_drills, "all_stopped", lambda pid: pid not in running)
    job = Job(nodes=4, nproc=1, steps=20, parity="2+2")
    drill = choose_nodes(LOSE_NODES, job, seed=1)
    striker = NodeStriker(drill, job, "abc", tmp_path)
    engine: Any = Struck(log)
    file = tmp_path / "events" / "x.jsonl"
    file.parent.mkdir()

    def happens(kind: str, **fields: object) -> None:
        with file.open("a") as out:
            out.write(json.dumps({"mono": time.monotonic(), "kind": kind} | fields) + "\n")
        striker.poll(engine)

    for seat in range(4):
        happens("spawn", seat=seat, member=seat, pid=100 + seat)
    happens("exit", seat=3, member=3)
    happens("commit", step=drill.step)
    happens("parity", step=1)
    assert log == [], "seat 3 is empty"
    happens("spawn", seat=3, member=4, pid=200)
    stopped = [(pid, signal.SIGSTOP) for pid in (100, 101, 102, 200)]
    assert log == stopped
    running -= {100, 101, 200}
    happens("exit", seat=3, member=4)
    running.add(201)
    happens("spawn", seat=3, member=5, pid=201)
    stopped += [(102, signal.SIGSTOP), (102, signal.SIGSTOP), (201, signal.SIGSTOP)]
    assert log == stopped, "seats 2 and 3 would still see the others go"
    running.clear()
    striker.poll(engine)
    killed = [(pid, signal.SIGKILL) for pid in (100, 101, 102, 201)]
    assert log == [*stopped, *drill.nodes, *killed]
    happens("commit", step=drill.step + 1)
    assert len(log) == 13, "once"
    told = [e for e in read_run(tmp_path) if e["kind"] == "drill"]
    assert [(e["seat"], e["member"]) for e in told] == [(0, 0), (1, 1), (2, 2), (3, 5)]


def test_a_rank_that_does_not_stop_ends_the_drill_and_not_the_job_by_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_drills.os, "kill", lambda pid, number: None)  # type: ignore[attr-defined]
    monkeypatch.setattr(node_drills, "all_stopped", lambda pid: pid != 102)
    monkeypatch.setattr(node_drills, "STOPS_WITHIN_S", -1.0)
    drill = choose_nodes(LOSE_NODES, Job(nodes=4, nproc=1, steps=20, parity="2+2"), seed=1)
    striker = NodeStriker(drill, Job(nodes=4, nproc=1, parity="2+2"), "abc", tmp_path)
    happened: list[dict[str, object]] = [
        *({"kind": "spawn", "seat": s, "member": s, "pid": 100 + s} for s in range(4)),
        {"kind": "commit", "step": drill.step},
        {"kind": "parity", "step": 1},
    ]
    file = tmp_path / "events" / "x.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"mono": 1.0} | e) + "\n" for e in happened))
    log: list[object] = []
    with pytest.raises(FtkitError, match=r"seats \[2\] .*nothing was struck"):
        striker.poll(Struck(log))  # type: ignore[arg-type]
    assert log == []
