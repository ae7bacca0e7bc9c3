"""A step is restored from the nearest parts that prove whole, whatever is lost or lies."""

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.chunks import Share
from ftkit.checkpoint.fetch import fetch
from ftkit.checkpoint.restore import Source, cover, execute, plan
from ftkit.checkpoint.serve import RANGE_BYTES_MAX, ArenaServer
from ftkit.checkpoint.slabs import Head
from ftkit.core.errors import (
    AuthenticationError,
    IntegrityError,
    ProtocolError,
    StateChanged,
    WireError,
)
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory, Part, Tier
from ftkit.core.wire import authenticate, listen, receive_message, send_message

from .helpers import Training, assert_same, contents, make_arena

JOB = JobId("t")
SECRET = b"secret"
G = Generation(1)
WHOLE_PART = Part(layout="a", first=0, end=3, total=3)


def thirds(*held: int) -> Iterator[Part]:
    for third in held:
        yield Part(layout="a", first=third, end=third + 1, total=3)


def copy_of(
    seat: int,
    step: int,
    *,
    node: int = 0,
    generation: int = 1,
    path: object = "",
    tier: Tier = Tier.ARENA,
    part: Part = WHOLE_PART,
) -> Copy:
    return Copy(
        seat=Seat(seat),
        node=NodeId(node),
        path=str(path) or f"/dev/shm/ftkit-t-{seat}.arena",
        step=Step(step),
        generation=Generation(generation),
        tier=tier,
        part=part,
    )


parts = st.builds(
    lambda layout, a, b, layouts: Part(
        layout=layout, first=min(a, b), end=max(a, b), total=3, layouts=layouts
    ),
    st.sampled_from("ab"),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 2),
)
copies = st.builds(
    copy_of,
    st.integers(0, 2),
    st.integers(0, 4),
    node=st.integers(0, 2),
    generation=st.integers(0, 2),
    tier=st.sampled_from(Tier),
    part=parts,
)
inventories = st.lists(copies, max_size=10).map(lambda c: Inventory(copies=tuple(c)))


@given(inventories)
def test_inventory_round_trip(inventory):
    assert Inventory.from_json(json.loads(json.dumps(inventory.to_json()))) == inventory


@pytest.mark.parametrize("value", [None, {}, {"copies": [{}]}, {"copies": [7]}])
def test_inventory_refuses_nonsense(value):
    with pytest.raises(ProtocolError):
        Inventory.from_json(value)


@given(inventories)
def test_a_complete_step_has_every_byte_of_every_layout(inventory):
    def whole(copies: list[Copy]) -> bool:
        held = {
            layout: {
                byte
                for c in copies
                if c.part.layout == layout
                for byte in range(c.part.first, c.part.end)
            }
            for layout in {c.part.layout for c in copies}
        }
        enough = max((c.part.layouts for c in copies), default=9)
        return sum(found == {0, 1, 2} for found in held.values()) >= enough

    def counting(copies: tuple[Copy, ...], g: int) -> list[Copy]:
        layouts = max((c.part.layouts for c in copies if c.generation == g), default=0)
        newest = 2 if layouts == 1 else g  # shards of two worlds do not make up one state
        return [c for c in copies if c.part.layouts == layouts and g <= c.generation <= newest]

    expected = {
        step: max(generations)
        for step in range(5)
        if (generations := [g for g in range(3) if whole(counting(inventory.at(Step(step)), g))])
    }
    assert inventory.complete() == expected
    newest = max(((g, s) for s, g in inventory.complete().items()), default=None)
    assert inventory.newest_complete() == newest


def test_newest_complete_stories():
    rolled_back = Inventory(copies=(copy_of(0, 7), copy_of(0, 5, generation=2)))
    assert rolled_back.newest_complete() == (2, 5)
    a, b, c = thirds(0, 1, 2)
    one_late = Inventory(
        copies=(
            *(copy_of(seat, 6, part=p) for seat, p in enumerate((a, b, c))),
            copy_of(0, 7, part=a),
            copy_of(2, 7, part=c),
        )
    )
    assert one_late.newest_complete() == (1, 6)
    again = Inventory(copies=(*one_late.copies, copy_of(0, 7, generation=2, part=b)))
    assert again.complete() == {6: 1, 7: 1}, "shares of two generations make up step 7"
    sharded = Part(layout="b", first=0, end=9, total=9, layouts=2)
    assert not Inventory(copies=(copy_of(0, 7, part=sharded),)).complete()
    other = Part(layout="a", first=0, end=9, total=9, layouts=2)
    both = Inventory(copies=(copy_of(0, 7, part=sharded), copy_of(1, 7, part=other)))
    assert both.newest_complete() == (1, 7)
    assert plan(both, seat=Seat(1), node=NodeId(0), servers={}).layout == "a"
    with pytest.raises(IntegrityError, match="not complete for seat 2"):
        plan(both, seat=Seat(2), node=NodeId(0), servers={})


def test_plan_prefers_own_then_near_then_far():
    found = Inventory(
        copies=(
            copy_of(2, 7, node=1),
            copy_of(1, 7),
            copy_of(0, 7),
            copy_of(3, 7, node=2),
            copy_of(0, 7, tier=Tier.DISK),
            copy_of(0, 6),
        )
    )
    made = plan(found, seat=Seat(0), node=NodeId(0), servers={NodeId(1): ("h", 1)})
    assert made.step == 7
    assert [(s.copy.seat, s.server) for s in made.sources] == [
        (0, None),
        (1, None),
        (2, ("h", 1)),
    ]
    assert {c.tier for c in made.unreachable} == {Tier.ARENA, Tier.DISK}
    older = plan(found, seat=Seat(0), node=NodeId(0), servers={}, step=Step(6))
    assert [s.copy.step for s in older.sources] == [6]
    with pytest.raises(IntegrityError, match=r"step 9.*\[6, 7\]"):
        plan(found, seat=Seat(0), node=NodeId(0), servers={}, step=Step(9))
    with pytest.raises(IntegrityError, match="no snapshot is complete"):
        plan(Inventory(), seat=Seat(0), node=NodeId(0), servers={})


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6))
def test_cover_reads_every_byte_once_from_the_best_that_has_it(bounds):
    sources = [
        Source(copy=copy_of(i, 1, part=Part(layout="a", first=min(b), end=max(b), total=9)))
        for i, b in enumerate(bounds)
    ]
    best = {
        byte: next((i for i, b in enumerate(bounds) if min(b) <= byte < max(b)), None)
        for byte in range(9)
    }
    if None in best.values():
        with pytest.raises(IntegrityError, match="in none of"):
            cover(sources, 9)
        return
    reads = cover(sources, 9)
    got = [(byte, read.source.copy.seat) for read in reads for byte in range(read.first, read.end)]
    assert got == sorted(best.items())


class Job:
    """Three seats with equal state at step 3, seat 2 on another node behind a server."""

    def __init__(self, tmp_path: Path, chunk_bytes: int = 1024, shares: int = 1) -> None:
        self.training = Training(seed=1)
        for step in range(1, 4):
            self.training.train(step)
        self.paths = []
        for seat in range(3):
            directory = tmp_path / ("far" if seat == 2 else "near")
            directory.mkdir(exist_ok=True)
            self.paths.append(arena_path(JOB, Seat(seat), directory))
            layout = self.training.state.layout()
            with (
                make_arena(self.paths[seat], layout, chunk_bytes=chunk_bytes) as arena,
                Capture(arena, self.training.state) as capture,
            ):
                capture.begin(Step(3), G, share=Share(seat % shares, shares))
        self.parts = []
        for path in self.paths:
            with Arena.open(path) as arena:
                self.parts.append(arena.find(Step(3)).part)
        self.server = ArenaServer(tmp_path / "far", JOB, SECRET)

    def plan(self):
        found = [
            copy_of(s, 3, node=s // 2, path=self.paths[s], part=self.parts[s]) for s in range(3)
        ]
        return plan(
            Inventory(copies=tuple(found)),
            seat=Seat(0),
            node=NodeId(0),
            servers={NodeId(1): self.server.address},
        )


@pytest.fixture
def job(tmp_path):
    made = Job(tmp_path)
    yield made
    made.server.close()


def spoil(path: Path) -> None:
    with Arena.open(path) as arena:
        geometry = arena.geometry
    with path.open("r+b") as file:
        for slab in range(3):
            file.seek(geometry.slab_at(slab) + geometry.data_at + 5000)
            file.write(b"\x5a\xa5\x5a\xa5")


def test_restore_falls_back_from_source_to_source(job):
    for lost in range(3):
        fresh = Training(seed=7)
        done = execute(job.plan(), fresh.state, secret=SECRET)
        assert [read.source.copy.seat for read in done.reads] == [lost]
        assert len(done.failures) == lost
        assert done.bytes == job.training.state.picture().layout.total_bytes
        assert_same(fresh.state, job.training.state)
        if lost == 0:
            spoil(job.paths[0])
        elif lost == 1:
            job.paths[1].unlink()
    spoil(job.paths[2])
    with pytest.raises(IntegrityError, match=r"any of 3 copies.*digest.*older step"):
        execute(job.plan(), Training().state, secret=SECRET)


@pytest.mark.parametrize("chunk_bytes", [1024, 1234, 1 << 20])
def test_shares_of_three_seats_make_up_the_state(tmp_path, chunk_bytes):
    job = Job(tmp_path, chunk_bytes=chunk_bytes, shares=3)
    try:
        fresh = Training(seed=7)
        done = execute(job.plan(), fresh.state, secret=SECRET)
        assert_same(fresh.state, job.training.state)
        assert done.bytes == job.parts[0].total
        if chunk_bytes < 2000:
            assert [read.source.copy.seat for read in done.reads] == [0, 1, 2]
            job.paths[1].unlink()
            with pytest.raises(IntegrityError, match=r"bytes \[\(\d+, \d+\)\].*in none of 2 parts"):
                execute(job.plan(), Training().state, secret=SECRET)
    finally:
        job.server.close()


def test_another_model_is_refused_without_trying_the_rest(job):
    narrow = Training(width=4)
    before = contents(narrow.state)[0]
    with pytest.raises(StateChanged):
        execute(job.plan(), narrow.state, secret=SECRET)
    after = contents(narrow.state)[0]
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_without_a_server_the_remote_source_fails_alone(job):
    for path in job.paths[:2]:
        path.unlink()
    made = job.plan()
    job.server.close()
    with pytest.raises(IntegrityError, match="cannot reach the byte server"):
        execute(made, Training().state, secret=SECRET, timeout_s=5)


# --------------------------------------------------------------------------- byte server


def ask(server: ArenaServer, **request: object) -> dict[str, Any]:
    sock = socket.create_connection(server.address, timeout=10)
    try:
        authenticate(sock, SECRET, server=False)
        sock.settimeout(10)
        send_message(sock, request)
        return receive_message(sock)
    finally:
        sock.close()


def test_only_arenas_of_this_job_in_this_directory_are_served(job, tmp_path):
    name = job.paths[2].name
    (tmp_path / "far" / "secret.txt").write_text("x")
    os.link(job.paths[0], tmp_path / "far" / "ftkit-other-0.arena")
    os.link(job.paths[0], tmp_path / "far" / "ftkit-t-1-0.arena")  # job "t-1", not "t"
    (tmp_path / "far" / "ftkit-t-8.arena").symlink_to(job.paths[0])
    (tmp_path / "far" / "ftkit-t-9.arena").mkdir()
    good = {"op": "head", "arena": name, "step": 3, "generation": 1}
    assert ask(job.server, **good)["bytes"] > 4096
    for refused in (
        {"arena": "secret.txt"},
        {"arena": "ftkit-other-0.arena"},
        {"arena": "ftkit-t-1-0.arena"},
        {"arena": f"../near/{job.paths[0].name}"},
        {"arena": str(job.paths[0])},
        {"arena": name + "\n"},
        {"arena": None},
        {"op": "write"},
        {"step": "3"},
        {"step": -1},
        {"generation": True},
        {"op": "data"},
        {"op": "data", "at": 0, "bytes": RANGE_BYTES_MAX + 1},
        {"op": "data", "at": 1 << 60, "bytes": 1},
        {"op": "data", "at": -1, "bytes": 1},
    ):
        reply = ask(job.server, **(good | refused))
        assert reply.get("lost") is False, (refused, reply)
    for lost in (
        {"arena": "ftkit-t-8.arena"},  # a link
        {"arena": "ftkit-t-9.arena"},
        {"arena": "ftkit-t-7.arena"},
        {"step": 4},
        {"generation": 2},
    ):
        reply = ask(job.server, **(good | lost))
        assert reply.get("lost") is True, (lost, reply)
    listed = ask(job.server, op="list")["copies"]
    part = job.parts[2].to_json()
    assert listed == [{"arena": name, "seat": 2, "step": 3, "generation": 1, "part": part}]


def test_a_wrong_secret_gets_nothing(job):
    with pytest.raises((AuthenticationError, WireError)):
        fetch(job.server.address, b"wrong", job.paths[2].name, Step(3), G, timeout_s=5)
    with fetch(job.server.address, SECRET, job.paths[2].name, Step(3), G) as remote:
        assert remote.head.sealed.step == 3


def test_several_ranges_and_odd_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("ftkit.checkpoint.fetch.RANGE_BYTES_MAX", 5000)
    job = Job(tmp_path, chunk_bytes=1234)
    try:
        with Arena.open(job.paths[2]) as arena:
            head = arena.head(arena.find(Step(3)))
            local = b"".join(bytes(b) for b in arena.blocks(head))
        with fetch(job.server.address, SECRET, job.paths[2].name, Step(3), G) as remote:
            assert remote.head.layout == head.layout
            assert b"".join(bytes(b) for b in remote.blocks()) == local
        assert len(local) > 3 * 5000
    finally:
        job.server.close()


def test_a_server_that_dies_or_lies_is_an_error_not_bad_state(job):
    """A false server: the true head, then data of its own choosing."""
    with Arena.open(job.paths[2]) as arena:
        sealed = arena.find(Step(3))
        head = arena.head_bytes(sealed)
    total = Head.parse(head).sealed.data_bytes

    def serve(listener, answer):
        sock, _ = listener.accept()
        with sock:
            authenticate(sock, SECRET, server=True)
            receive_message(sock)
            send_message(sock, {"bytes": len(head)})
            sock.sendall(head)
            receive_message(sock)
            answer(sock)

    def lie(sock):
        send_message(sock, {"bytes": total})
        sock.sendall(bytes(total))

    def die(sock):
        send_message(sock, {"bytes": total})
        sock.sendall(bytes(total // 2))

    def boast(sock):
        send_message(sock, {"bytes": 1 << 60})

    for answer, error, words in (
        (lie, IntegrityError, "chunk 0"),
        (die, WireError, "missing"),
        (boast, ProtocolError, "announces"),
    ):
        with listen("127.0.0.1") as listener:
            thread = threading.Thread(target=serve, args=(listener, answer))
            thread.start()
            with (
                fetch(listener.getsockname(), SECRET, "x", Step(3), G) as remote,
                pytest.raises(error, match=words),
            ):
                list(remote.blocks())
            thread.join(10)
            assert not thread.is_alive()


def test_close_ends_every_thread_and_client(tmp_path):
    before = threading.active_count()
    server = ArenaServer(tmp_path, JOB, SECRET)
    sock = socket.create_connection(server.address, timeout=10)
    authenticate(sock, SECRET, server=False)
    server.close()
    server.close()
    assert threading.active_count() == before
    sock.settimeout(10)
    assert sock.recv(1) == b""
    sock.close()
