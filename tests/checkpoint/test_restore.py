import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.fetch import fetch
from ftkit.checkpoint.restore import execute, plan
from ftkit.checkpoint.serve import RANGE_BYTES_MAX, ArenaServer
from ftkit.checkpoint.slots import Head
from ftkit.core.errors import (
    AuthenticationError,
    IntegrityError,
    ProtocolError,
    StateChanged,
    WireError,
)
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory, Tier
from ftkit.core.wire import authenticate, listen, receive_message, send_message

from .helpers import Training, assert_same, contents, make_arena

JOB = JobId("t")
SECRET = b"secret"
G = Generation(1)


def copy_of(
    seat: int,
    step: int,
    *,
    node: int = 0,
    generation: int = 1,
    path: object = "",
    tier: Tier = Tier.ARENA,
) -> Copy:
    return Copy(
        seat=Seat(seat),
        node=NodeId(node),
        path=str(path) or f"/dev/shm/ftkit-t-{seat}.arena",
        step=Step(step),
        generation=Generation(generation),
        tier=tier,
    )


copies = st.builds(
    copy_of,
    st.integers(0, 2),
    st.integers(0, 4),
    node=st.integers(0, 2),
    generation=st.integers(0, 2),
    tier=st.sampled_from(Tier),
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
def test_newest_complete_has_every_seat(inventory):
    seats = [Seat(0), Seat(1)]
    newest = inventory.newest_complete(seats)
    complete = {s for s in range(5) if {c.seat for c in inventory.at(Step(s))} >= set(seats)}
    if newest is None:
        assert not complete
    else:
        assert newest[1] in complete
    versions = [(c.generation, c.step) for c in inventory.copies]
    assert inventory.newest_complete() == max(versions, default=None)


def test_newest_complete_stories():
    one_behind = Inventory(copies=(copy_of(0, 7), copy_of(0, 6), copy_of(1, 6)))
    assert one_behind.newest_complete([Seat(0), Seat(1)]) == (1, 6)
    assert one_behind.newest_complete() == (1, 7)
    rolled_back = Inventory(copies=(copy_of(0, 7), copy_of(0, 5, generation=2)))
    assert rolled_back.newest_complete() == (2, 5)
    forward = Inventory(
        copies=(copy_of(0, 8), copy_of(1, 8, generation=2), copy_of(0, 7), copy_of(1, 7))
    )
    assert forward.newest_complete([Seat(0), Seat(1)]) == (1, 8)
    assert forward.without(copy_of(0, 8)).newest_complete([Seat(0), Seat(1)]) == (1, 7)


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
    sharded = plan(
        found, seat=Seat(1), node=NodeId(0), servers={}, step=Step(7), seats=[Seat(0), Seat(1)]
    )
    assert [s.copy.seat for s in sharded.sources] == [1]
    with pytest.raises(IntegrityError, match=r"step 9.*\[6, 7\]"):
        plan(found, seat=Seat(0), node=NodeId(0), servers={}, step=Step(9))
    with pytest.raises(IntegrityError, match="no snapshot is complete"):
        plan(Inventory(), seat=Seat(0), node=NodeId(0), servers={})


class Job:
    """Three seats with equal state at step 3, seat 2 on another node behind a server."""

    def __init__(self, tmp_path: Path, chunk_bytes: int = 1024) -> None:
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
                capture.begin(Step(3), G)
        self.server = ArenaServer(tmp_path / "far", JOB, SECRET)

    def plan(self):
        found = [copy_of(s, 3, node=s // 2, path=self.paths[s]) for s in range(3)]
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
        for slot in range(3):
            file.seek(geometry.slot_at(slot) + geometry.data_at + 5000)
            file.write(b"\x5a\xa5\x5a\xa5")


def test_restore_falls_back_from_source_to_source(job):
    for lost in range(3):
        fresh = Training(seed=7)
        done = execute(job.plan(), fresh.state, secret=SECRET)
        assert done.source.copy.seat == lost
        assert len(done.failures) == lost
        assert done.bytes == job.training.state.picture().layout.total_bytes
        assert_same(fresh.state, job.training.state)
        if lost == 0:
            spoil(job.paths[0])
        elif lost == 1:
            job.paths[1].unlink()
    spoil(job.paths[2])
    with pytest.raises(IntegrityError, match=r"any of 3 copies .*digest.*older step"):
        execute(job.plan(), Training().state, secret=SECRET)


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
    assert listed == [{"arena": name, "seat": 2, "step": 3, "generation": 1}]


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
