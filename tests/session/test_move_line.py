"""Layers over a line of their own: the copy, the gradients after it, and all that can go wrong."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from torch import nn

from ftkit.checkpoint.arena import arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.provision import create_arena
from ftkit.checkpoint.shadow import Owned, Shadow, hash_of, hyper_of
from ftkit.checkpoint.state import ProtectedState, bytes_of
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Generation, JobId, Seat, Step
from ftkit.core.wire import authenticate, send_message
from ftkit.session import move_line
from ftkit.session.move_line import Base, Incoming, Outgoing, Sent, copy_out

SECRET = b"sixteen bytes and more"


class Rank:
    """A layer in training."""

    def __init__(self, width: int = 8) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state = ProtectedState(model=self.model, optimizer=[self.optimizer])
        self.width, self.done = width, 0
        self.step()

    def step(self) -> Sent:
        self.model(torch.randn(4, self.width)).square().sum().backward()
        self.done += 1
        gradients = tuple(p.grad.clone() for p in self.owned.trained if p.grad is not None)
        self.optimizer.step()
        self.optimizer.zero_grad()
        buffers = tuple(b.clone() for b in self.owned.buffers)
        return Sent(step=self.done, gradients=gradients, buffers=buffers, stepped=True)

    @property
    def owned(self) -> Owned:
        return Owned.of(self.state, [self.model], self.optimizer)

    def base(self) -> Base:
        parts = tuple(bytearray(bytes_of(t.contiguous())) for t in self.owned.live)
        return Base(self.done, parts)

    def hashes(self) -> dict[str, int]:
        owned = self.owned
        return {m.name: hash_of(t) for m, t in zip(owned.moving, owned.live, strict=True)}


class Pair:
    """An owner and its target, and the line between them."""

    def __init__(self, base: Callable[[Any], Base] | None = None, *, timeout_s: float = 20) -> None:
        self.owner, self.target = Rank(), Rank()
        first = self.owner.base()
        moving = self.owner.owned.moving
        self.out = Outgoing(
            "127.0.0.1", SECRET, base or (lambda stopped: first),
            state_bytes=sum(m.nbytes for m in moving), timeout_s=timeout_s,
        )  # fmt: skip
        self.into = Incoming(
            Shadow(moving, self.target.optimizer), self.out.address, SECRET, timeout_s=timeout_s
        )

    def step(self) -> None:
        hyper = hyper_of(self.target.optimizer)
        self.out.offer(self.owner.step())
        self.into.note(self.owner.done, hyper)

    def close(self) -> None:
        self.out.close(wait=True)
        self.into.close(wait=True)


@pytest.fixture
def pair() -> Any:
    made = Pair()
    yield made
    made.close()


def until(there: Callable[[], object], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.002)


def test_the_copy_and_what_follows_make_the_owner_s_state(pair: Pair) -> None:
    for _ in range(5):
        pair.step()
    assert pair.into.wait(6, 20)
    assert pair.into.shadow.hashes() == pair.owner.hashes()
    assert pair.into.bulk_bytes == pair.out.bulk_bytes == pair.into.shadow.nbytes
    assert pair.into.gradient_bytes == pair.out.gradient_bytes > 0
    assert not pair.out.failed
    assert not pair.into.failed


def test_gradients_of_steps_that_the_copy_has_are_left_out() -> None:
    """The copy is of a later step than that from which on gradients are sent."""
    go = threading.Event()
    owner: list[Rank] = []

    def late(stopped: Any) -> Base:
        go.wait(20)
        return owner[0].base()

    pair = Pair(late)
    try:
        owner.append(pair.owner)
        pair.step()
        pair.step()
        go.set()
        until(lambda: pair.into.applied)
        assert pair.into.applied == 3
        pair.step()
        assert pair.into.wait(4, 20)
        assert pair.into.shadow.hashes() == pair.owner.hashes()
        assert pair.into.gradient_bytes == pair.owner.step().nbytes
    finally:
        pair.close()


def test_a_shadow_waits_for_this_rank_s_own_step(pair: Pair) -> None:
    """Its hyperparameters are known once this rank has made the step as well."""
    until(lambda: pair.into.applied)
    hyper = hyper_of(pair.target.optimizer)
    pair.out.offer(pair.owner.step())
    assert not pair.into.wait(2, 0.05)
    pair.into.note(2, hyper)
    assert pair.into.wait(2, 20)


def test_an_owner_that_is_gone_is_told(pair: Pair) -> None:
    until(lambda: pair.into.applied)
    pair.out.close(wait=True)
    until(lambda: pair.into.failed)
    assert not pair.into.wait(2, 5)


def test_a_target_that_is_gone_is_told(pair: Pair) -> None:
    until(lambda: pair.into.applied)
    pair.into.close(wait=True)
    while not pair.out.failed:
        pair.step()


def test_a_target_that_never_comes_is_told() -> None:
    out = Outgoing("127.0.0.1", SECRET, lambda stopped: Base(1, ()), state_bytes=1, timeout_s=0.1)
    until(lambda: out.failed)
    out.close(wait=True)


def test_a_target_that_is_too_slow_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing: what waits to be sent is bounded, and training was never kept waiting."""
    monkeypatch.setattr(move_line, "BACKLOG", 0.0001)
    owner = Rank()
    out = Outgoing(
        "127.0.0.1", SECRET, lambda stopped: Base(1, (bytearray(64 << 20),)), state_bytes=1,
        timeout_s=20,
    )  # fmt: skip
    with socket.create_connection(out.address) as sock:
        authenticate(sock, SECRET, server=False)
        start = time.monotonic()
        while not out.failed:
            out.offer(owner.step())
        assert time.monotonic() - start < 5
    assert "behind" in out.failed
    out.close(wait=True)


def test_a_copy_that_cannot_be_made_is_told() -> None:
    def torn(stopped: Any) -> Base:
        raise IntegrityError("overwritten")

    pair = Pair(torn)
    until(lambda: pair.out.failed and pair.into.failed)
    assert "overwritten" in pair.out.failed
    pair.close()


@pytest.mark.parametrize("what", ["bulk", "step", "order", "other"])
def test_damaged_bytes_are_not_taken(what: str) -> None:
    """A server that says one thing and sends another."""
    owner = Rank()
    base, sent = owner.base(), owner.step()
    good = owner.owned

    def serve(listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(OSError):  # the target hangs up as soon as it knows
            authenticate(sock, SECRET, server=True)
            sums = [xxhash.xxh3_64_intdigest(p) for p in base.parts]
            if what == "bulk":
                base.parts[0][5] ^= 1
            kind = "loaf" if what == "other" else "bulk"
            send_message(sock, {"kind": kind, "base": 1, "sums": sums})
            for part in base.parts:
                sock.sendall(part)
            step = 3 if what == "order" else 2
            has = [1] * len(sent.gradients)
            send_message(
                sock, {"kind": "step", "step": step, "stepped": True, "has": has, "sum": 12345}
            )
            for tensor in (*sent.gradients, *sent.buffers):
                assert tensor is not None
                sock.sendall(bytes_of(tensor))
            sock.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        shadow = Shadow(good.moving, Rank().optimizer)
        into = Incoming(shadow, listener.getsockname(), SECRET, timeout_s=20)
        until(lambda: into.failed)
        assert not into.wait(2, 0.1)
        expected = {"bulk": "damaged", "step": "damaged", "order": "follows", "other": "expected"}
        assert expected[what] in into.failed
        into.close(wait=True)
        thread.join()


def test_a_snapshot_is_copied_out_of_the_arena(tmp_path: Path) -> None:
    rank = Rank()
    path = arena_path(JobId("j"), Seat(0), tmp_path)
    layout = rank.state.layout()
    with (
        create_arena(path, data_bytes=layout.total_bytes, meta_bytes=layout.meta_bytes) as arena,
        Capture(arena, rank.state) as capture,
    ):
        owned, want = rank.owned, rank.hashes()
        stopped = threading.Event()
        with pytest.raises(IntegrityError, match="no snapshot was sealed"):
            copy_out(path, Generation(1), 1, owned.moving, stopped.is_set, timeout_s=0.01)
        capture.begin(Step(1), Generation(1))
        capture.gate()
        base = copy_out(path, Generation(1), 1, owned.moving, stopped.is_set, timeout_s=5)
        assert base.step == 1
        sums = [xxhash.xxh3_64_intdigest(part) for part in base.parts]
        assert sums == [want[m.name] for m in owned.moving]
        sealed = arena.newest()
        assert sealed is not None
        arena._file.bytes[arena.data_offset(sealed) + 3] ^= 1  # rot
        with pytest.raises(IntegrityError, match="could be copied"):
            copy_out(path, Generation(1), 1, owned.moving, stopped.is_set, timeout_s=5)
        stopped.set()
        with pytest.raises(IntegrityError, match="no snapshot was sealed"):
            copy_out(path, Generation(2), 1, owned.moving, stopped.is_set, timeout_s=99)
