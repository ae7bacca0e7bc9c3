"""An agent's parity: it leads, checks, mends and scrubs as the plan and its memory ask for it."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.chunks import Share
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.parity import holder as holder_file
from ftkit.checkpoint.serve import ArenaServer
from ftkit.core.errors import WireError
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.trace import Trace, read_run
from ftkit.core.world import Member, World
from ftkit.launch.arenas import Arenas
from ftkit.launch.config import JobConfig
from ftkit.launch.parity import ParityTier
from ftkit.recovery.plan import Mode, Plan

JOB, SECRET = JobId("ab12"), b"s" * 32
LAYOUT = StateLayout.of([("w", "float32", (800_000,))])
WORLD = World.of(
    Generation(1),
    [Member(member=n, seat=n, node=n, host="h", port=1) for n in range(3)],  # type: ignore[arg-type]
)
RUNNING = Plan(mode=Mode.RUNNING, world=WORLD)
FORMING = replace(RUNNING, mode=Mode.FORMING, halted=Generation(1))


class Node:
    def __init__(self, config: JobConfig, node: int, trace: Trace) -> None:
        self.node, self.trace = NodeId(node), trace
        self.arenas = Arenas(config, self.node)
        assert config.code is not None
        self.tier = ParityTier(config, config.code, self.node, SECRET, self.arenas, trace)
        self.server = ArenaServer(
            self.arenas.directory, JOB, SECRET, operations=self.tier.operations
        )

    @property
    def arena(self) -> Path:
        return arena_path(JOB, Seat(self.node), self.arenas.directory)

    def write(self, step: int) -> None:
        path = self.arenas.ensure(Seat(self.node), LAYOUT.to_json(), 3)
        with Arena.open(path, writable=True) as arena:
            share = Share(self.node, 3)
            writer = arena.start(Step(step), Generation(1), LAYOUT, share=share)
            writer.reserve()
            writer.data[:] = step
            writer.digest(range(len(writer.table)))
            writer.seal(b"{}")

    def flip(self, step: int) -> None:
        with Arena.open(self.arena) as arena:
            at = arena.data_offset(arena.find(Step(step)))
        with self.arena.open("r+b") as file:
            file.seek(at + 9)
            file.write(b"\xee")

    def close(self) -> None:
        self.server.close()
        self.tier.close()
        self.arenas.remove()


class Job:
    def __init__(self, folder: Path) -> None:
        (folder / "shm").mkdir()
        self.folder = folder
        self.config = JobConfig(
            job=JOB, command=("x",), nodes=3, parity="2+1", shm_root=str(folder / "shm")
        )
        self.trace = Trace(folder / "events" / "all.jsonl")
        self.nodes = [Node(self.config, n, self.trace) for n in range(3)]
        self.tell(RUNNING)

    def tell(self, plan: Plan, every_s: float | None = None) -> None:
        stores = {str(n.node): list(n.server.address) for n in self.nodes}
        for node in self.nodes:
            node.tier.take(plan, stores, every_s)

    def replace(self, node: int) -> None:
        self.nodes[node].close()
        self.nodes[node] = Node(self.config, node, self.trace)

    def look(self) -> None:
        for node in self.nodes:
            node.tier.look()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_run(self.folder) if e["kind"] == kind]

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self.trace.close()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    job.close()


def publish(job: Job, step: int) -> None:
    for node in job.nodes:
        node.write(step)
    job.look()
    assert [e["step"] for e in job.events("parity")][-1] == step


def test_the_lowest_node_leads_and_the_next_when_it_is_gone(job: Job) -> None:
    publish(job, 1)
    (told,) = job.events("parity")
    assert told["bytes"] > 0
    assert told["engine"] in ("isa-l", "numpy")
    for node in job.nodes:
        node.write(2)
    for node in job.nodes[1:]:
        node.tier.look()
    assert len(job.events("parity")) == 1, "they do not lead"
    stores = {str(n.node): list(n.server.address) for n in job.nodes[1:]}
    job.nodes[1].tier.take(RUNNING, stores)
    job.nodes[1].tier.look()
    assert len(job.events("parity")) == 1, "two nodes are too few for 2+1"


def test_rounds_are_as_far_apart_as_they_are_told_to_be(job: Job) -> None:
    job.tell(RUNNING, 3600.0)
    publish(job, 1)
    for node in job.nodes:
        node.write(2)
    job.look()
    assert [e["step"] for e in job.events("parity")] == [1], "an hour has not passed"
    report = job.nodes[0].tier.report()
    assert report["every_s"] == 3600.0
    assert report["round_s"] is not None
    assert report["making"] is False
    # What was made for another world does not count in this one, nor for longer than is said now.
    again = World.of(Generation(2), list(WORLD.members))
    job.tell(replace(RUNNING, world=again), 3600.0)
    job.look()
    assert [e["step"] for e in job.events("parity")] == [1, 2]
    for node in job.nodes:
        node.write(3)
    job.tell(RUNNING, 0.0)
    job.look()
    assert [e["step"] for e in job.events("parity")] == [1, 2, 3]


def test_arenas_have_room_for_what_parity_pins(job: Job) -> None:
    publish(job, 1)
    with Arena.open(job.nodes[0].arena) as arena:
        assert arena.geometry.slabs == 5
    for step in range(2, 9):
        job.nodes[0].write(step)
    with Arena.open(job.nodes[0].arena) as arena:
        assert Step(1) in arena.sealed_steps()


def test_a_lost_node_is_rebuilt_once_all_ranks_are_gone_and_not_before(job: Job) -> None:
    publish(job, 1)
    publish(job, 2)
    job.replace(1)
    job.tell(RUNNING)
    job.nodes[1].tier.look()
    assert job.nodes[1].arenas.copies() == []
    job.tell(FORMING)
    assert job.nodes[1].tier.report()["checked"] != 1
    job.look()
    assert job.nodes[1].tier.report()["checked"] == 1
    (told,) = job.events("rebuild")
    assert (told["step"], told["seats"], told["damaged"]) == (2, [1], [])
    assert [c["step"] for c in job.nodes[1].arenas.copies()] == [2]
    job.look()
    assert len(job.events("rebuild")) == 1
    holds = job.nodes[1].tier.report()["holds"]
    assert isinstance(holds, list)
    assert [h["round"][1] for h in holds] == [2], "it keeps parity again, too"
    json.dumps(job.nodes[1].tier.report())


def test_a_part_that_rotted_is_not_told_of_until_it_is_mended(job: Job) -> None:
    publish(job, 1)
    node = job.nodes[2]
    node.flip(1)
    copies = node.arenas.copies()
    assert node.tier.good(copies) == copies, "nobody has looked"
    job.tell(FORMING)
    node.tier._recovery.check()  # what its first look begins with
    assert node.tier.good(copies) == []
    assert "digest" in job.events("scrub")[0]["reason"]
    node.tier.look()
    assert node.tier.good(copies) == copies
    assert [e["node"] if "node" in e else e["seats"] for e in job.events("rebuild")] == [[2]]


def test_what_cannot_be_rebuilt_is_given_up_and_said(job: Job) -> None:
    publish(job, 1)
    job.nodes[2].flip(1)
    job.replace(1)
    job.tell(FORMING)
    job.look()
    (failed,) = job.events("rebuild-failed")
    assert "lost or corrupt" in failed["reason"]
    assert [n.node for n in job.nodes if n.tier.report()["given_up"]] == [2]
    job.look()
    assert len(job.events("rebuild-failed")) == 1, "nobody tries again"


def test_a_scrub_mends_this_nodes_part_in_place(job: Job) -> None:
    publish(job, 1)
    node = job.nodes[0]
    kept = node.tier._holder.kept()
    assert kept is not None
    node.tier.scrub(kept)
    assert job.events("scrub") == []
    node.flip(1)
    node.tier.scrub(kept)
    (told,) = job.events("scrub")
    assert told["mended"]
    assert told["arenas"] == [node.arena.name]
    with Arena.open(node.arena) as arena:
        arena.verify(arena.find(Step(1)))


def test_a_round_that_fails_is_said_once_and_the_next_goes_through(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in job.nodes:
        node.write(1)

    def fails(*_: object) -> None:
        raise WireError("no way there")

    monkeypatch.setattr(holder_file.Holder, "heads", fails)
    job.look()
    job.look()
    assert len(job.events("parity-failed")) == 1
    monkeypatch.undo()
    publish(job, 2)
