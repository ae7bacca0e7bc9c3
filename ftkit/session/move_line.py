"""Move line: the connection over which layers travel to their next owner while training goes on.

One for each pair of ranks, apart from the links of collectives: whatever becomes of it, training does
not wait. The owner sends a sealed snapshot of the layers, then the gradients of each step after it::

    {"kind": "bulk", "base": 41, "sums": [...]}                                      bytes of every tensor
    {"kind": "step", "step": 42, "stepped": true, "has": [1, 1, 0], "sum": ...}      gradients, buffers

Sums are XXH3-64 of the bytes. Each end works on a thread of its own, of low priority; what goes
wrong there is told by `failed`, and ends the migration, not the job.
"""

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.box import Box
from ftkit.checkpoint.shadow import Hyper, Moving, Shadow, fill
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.checkpoint.state import bytes_of
from ftkit.core.errors import IntegrityError, ProtocolError, WireError
from ftkit.core.ids import Generation
from ftkit.core.wire import authenticate, listen, receive_message, send_message

#: Niceness of both threads.
NICE = 10
#: Between two looks for a snapshot that is being sealed.
LOOK_S = 0.002
#: How often the copy begins anew because the snapshot was overwritten meanwhile.
COPIES_MAX = 5
#: Gradients that wait to be sent may have so many times the bytes of what moves: a target that is
#: further behind is too slow.
BACKLOG = 8
#: Of a message: one hash for each tensor.
MESSAGE_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class Base:
    """A snapshot of what moves, copied out of the arena."""

    step: int
    parts: tuple[bytearray, ...]


def copy_out(
    path: Path,
    generation: Generation,
    first: int,
    moving: Sequence[Moving],
    stopped: Callable[[], bool],
    *,
    timeout_s: float,
) -> Base:
    """The newest sealed snapshot from step `first` on, as far as it moves, every chunk checked. Blocks.

    Args:
      path: of this rank's arena.
      generation: of the snapshot.
      first: the first step that will do.
      moving: what to copy.
      stopped: whether nobody wants it any more.
      timeout_s: how long to wait until one is sealed.

    Raises:
      IntegrityError: there is none in time, or each was overwritten before it was copied.
      OSError: there is no arena.
    """
    deadline, tries = time.monotonic() + timeout_s, 0
    while True:
        with Arena.open(path) as arena:
            newest = arena.newest()
            if newest is not None and newest.generation == generation and newest.step >= first:
                parts = tuple(bytearray(m.nbytes) for m in moving)
                try:
                    source = SnapshotSource.of_arena(arena, newest.step, generation)
                    for m, part in zip(moving, parts, strict=True):
                        source.read(m.name, Box.whole(m.shape), memoryview(part))
                except (IntegrityError, ValueError) as error:
                    tries += 1
                    if tries >= COPIES_MAX:
                        raise IntegrityError(f"no snapshot could be copied: {error}") from error
                else:
                    return Base(newest.step, parts)
                finally:
                    source = None  # type: ignore[assignment]  # its views would keep the file open
        if stopped() or time.monotonic() > deadline:
            raise IntegrityError(f"no snapshot was sealed from step {first} on")
        time.sleep(LOOK_S)


@dataclass(frozen=True, slots=True)
class Sent:
    """What one step adds. Owned by the line."""

    step: int
    gradients: tuple[torch.Tensor | None, ...]
    """Of trained parameters, in order; empty where the optimizer did not step."""
    buffers: tuple[torch.Tensor, ...]
    stepped: bool

    @property
    def nbytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in (*self.gradients, *self.buffers) if t is not None
        )


class Outgoing:
    """The owner's end: listens for one target, and sends. `offer` and `close` are the training thread's."""

    def __init__(
        self,
        host: str,
        secret: bytes,
        base: Callable[[Callable[[], bool]], Base],
        *,
        state_bytes: int,
        timeout_s: float,
        reached: Callable[[int], None] = lambda stage: None,
    ) -> None:
        """Listen, and begin.

        Args:
          host: address to bind and be reached at.
          secret: the job's.
          base: makes the copy that is sent first; called on the line's thread, with what tells
            whether the line was closed.
          state_bytes: of what moves.
          timeout_s: the longest that the target may keep silent.
          reached: (drills) told that the copy (1), or what follows it (2), is on its way.

        Raises:
          OSError: nothing can listen on `host`.
        """
        self._secret, self._base, self._timeout_s, self._reached = secret, base, timeout_s, reached
        self._backlog_max = BACKLOG * max(state_bytes, 1 << 20)
        self._changed = threading.Condition()
        self._queue: deque[Sent] = deque()
        self._backlog = 0
        self._closed = False
        self.failed = ""
        """Why nothing more will be sent."""
        self.bulk_bytes = 0
        self.gradient_bytes = 0
        self._listener = listen(host)
        self._sock: socket.socket | None = None
        self.address: tuple[str, int] = (host, int(self._listener.getsockname()[1]))
        self._thread = threading.Thread(target=self._run, name="ftkit-move-out", daemon=True)
        self._thread.start()

    def offer(self, sent: Sent) -> None:
        """Send this when its turn has come. Does not block."""
        with self._changed:
            self._queue.append(sent)
            self._backlog += sent.nbytes
            if self._backlog > self._backlog_max and not self.failed:
                self.failed = f"the target is {len(self._queue)} steps behind"
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Give it up."""
        with self._changed:
            self.failed = self.failed or reason

    def close(self, *, wait: bool = False) -> None:
        """End it, and (`wait`) the thread with it, which else ends soon. May be called again."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        _hang_up(self._listener)
        _hang_up(self._sock)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        _be_nice()
        try:
            self._listener.settimeout(self._timeout_s)
            base = self._base(lambda: self._closed)
            sock, _ = self._listener.accept()
            with sock:
                self._sock = sock
                authenticate(sock, self._secret, server=True)
                sock.settimeout(self._timeout_s)
                self._send_base(sock, base)
                first = base.step + 1
                del base
                self._reached(2)
                while (sent := self._next()) is not None:
                    if sent.step >= first:
                        self._send(sock, sent)
        except Exception as error:  # noqa: BLE001 - the next ballot says so
            if not self._closed:
                self.fail(f"{type(error).__name__}: {error}")
        finally:
            self._listener.close()  # or a target would wait for an answer

    def _send_base(self, sock: socket.socket, base: Base) -> None:
        sums = [xxhash.xxh3_64_intdigest(part) for part in base.parts]
        send_message(sock, {"kind": "bulk", "base": base.step, "sums": sums})
        for index, part in enumerate(base.parts):
            if 2 * index >= len(base.parts):
                self._reached(1)
            sock.sendall(part)
            self.bulk_bytes += len(part)

    def _send(self, sock: socket.socket, sent: Sent) -> None:
        hosts = [
            t.detach().cpu().contiguous() for t in (*sent.gradients, *sent.buffers) if t is not None
        ]
        digest = xxhash.xxh3_64()
        for host in hosts:
            digest.update(bytes_of(host))
        message = {
            "kind": "step",
            "step": sent.step,
            "stepped": sent.stepped,
            "has": [int(g is not None) for g in sent.gradients],
            "sum": digest.intdigest(),
        }
        send_message(sock, message)
        for host in hosts:
            sock.sendall(bytes_of(host))
            self.gradient_bytes += host.numel() * host.element_size()

    def _next(self) -> Sent | None:
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            sent = self._queue.popleft()
            self._backlog -= sent.nbytes
            return sent


class Incoming:
    """The target's end: receives into a shadow, and replays. `note`, `wait`, `close`: the training thread's."""

    def __init__(
        self,
        shadow: Shadow,
        address: tuple[str, int],
        secret: bytes,
        *,
        timeout_s: float,
        reached: Callable[[int], None] = lambda stage: None,
    ) -> None:
        """Connect, and begin.

        Args:
          shadow: where to; the line's until it is closed, or `wait` has returned True.
          address: of the owner's end.
          secret: the job's.
          timeout_s: the longest silence of the owner before the copy is there.
          reached: (drills) as in `Outgoing`.
        """
        self.shadow = shadow
        self._address, self._secret, self._timeout_s = address, secret, timeout_s
        self._reached = reached
        self._changed = threading.Condition()
        self._hyper: dict[int, Hyper] = {}
        self._noted = 0
        self._closed = False
        self._sock: socket.socket | None = None
        self.applied = 0
        """The step that the shadow is of; 0 before the copy is there."""
        self.failed = ""
        """Why nothing more will be received."""
        self.bulk_bytes = 0
        self.gradient_bytes = 0
        self._thread = threading.Thread(target=self._run, name="ftkit-move-in", daemon=True)
        self._thread.start()

    def note(self, step: int, hyper: Hyper | None) -> None:
        """Step `step` was committed here, with these hyperparameters; None: no optimizer stepped."""
        with self._changed:
            if hyper is not None:
                self._hyper[step] = hyper
            self._noted = step
            self._changed.notify_all()

    def wait(self, step: int, timeout_s: float) -> bool:
        """Whether the shadow has come to be of `step`. Blocks until it has, or cannot."""
        with self._changed:
            self._changed.wait_for(lambda: self.applied >= step or self.failed, timeout_s)
            return self.applied == step and not self.failed

    def close(self, *, wait: bool = False) -> None:
        """End it, as `Outgoing.close`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        _hang_up(self._sock)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        _be_nice()
        try:
            with socket.create_connection(self._address, timeout=self._timeout_s) as sock:
                self._sock = sock
                authenticate(sock, self._secret, server=False)
                sock.settimeout(self._timeout_s)
                self._receive_base(sock)
                self._reached(2)
                sock.settimeout(None)  # steps take as long as they take; `close` ends it
                while not self._closed:
                    self._receive_step(sock)
        except Exception as error:  # noqa: BLE001 - the next ballot says so
            with self._changed:
                if not self._closed:
                    self.failed = f"{type(error).__name__}: {error}"
                self._changed.notify_all()

    def _receive_base(self, sock: socket.socket) -> None:
        message = _message(sock, "bulk")
        sums, base = message.get("sums"), message.get("base")
        moving = self.shadow.moving
        if not isinstance(sums, list) or len(sums) != len(moving) or type(base) is not int:
            raise ProtocolError(f"not a copy of {len(moving)} tensors")
        for index, (m, expected) in enumerate(zip(moving, sums, strict=True)):
            if 2 * index >= len(moving):
                self._reached(1)
            data = _bytes(sock, m.nbytes)
            if xxhash.xxh3_64_intdigest(data) != expected:
                raise IntegrityError(f"{m.name} was damaged on its way")
            fill(self.shadow.tensors[m.name], data)
            self.bulk_bytes += m.nbytes
        self.shadow.complete()
        self._advance(base)

    def _receive_step(self, sock: socket.socket) -> None:
        message = _message(sock, "step")
        step, has, stepped = message.get("step"), message.get("has"), bool(message.get("stepped"))
        trained = [m for m in self.shadow.moving if m.group >= 0]
        if step != self.applied + 1 or not isinstance(has, list) or len(has) > len(trained):
            raise ProtocolError(f"step {step!r:.20} follows step {self.applied}")
        digest, gradients = xxhash.xxh3_64(), list[torch.Tensor | None]()
        for m, there in zip(trained, has or [0] * len(trained), strict=True):
            gradients.append(self._tensor(sock, m, digest) if there else None)
        buffers = [(m, self._tensor(sock, m, digest)) for m in self.shadow.moving if m.early]
        if digest.intdigest() != message.get("sum"):
            raise IntegrityError(f"gradients of step {step} were damaged on their way")
        with self._changed:
            self._changed.wait_for(lambda: self._noted >= step or self._closed)
            if self._closed:
                return
            hyper = self._hyper.pop(step, None)
            for old in [s for s in self._hyper if s < step]:
                del self._hyper[old]
        if stepped and hyper is None:
            raise ProtocolError(f"the owner's optimizer made step {step}, and this rank's did not")
        self.shadow.replay(gradients, hyper or [], stepped=stepped)
        with torch.no_grad():
            for m, value in buffers:
                self.shadow.tensors[m.name].copy_(value)
        self._advance(step)

    def _tensor(self, sock: socket.socket, m: Moving, digest: xxhash.xxh3_64) -> torch.Tensor:
        data = _bytes(sock, m.nbytes)
        digest.update(data)
        self.gradient_bytes += m.nbytes
        made = torch.empty(m.shape, dtype=getattr(torch, m.dtype), device=m.device)
        fill(made, data)
        return made

    def _advance(self, step: int) -> None:
        with self._changed:
            self.applied = step
            self._changed.notify_all()


def _message(sock: socket.socket, kind: str) -> dict[str, object]:
    message = receive_message(sock, bytes_max=MESSAGE_BYTES_MAX)
    if message.get("kind") != kind:
        raise ProtocolError(f"expected {kind!r}, got {message.get('kind')!r:.40}")
    return message


def _bytes(sock: socket.socket, count: int) -> memoryview:
    data = memoryview(bytearray(count))
    at = 0
    while at < count:
        got = sock.recv_into(data[at:])
        if not got:
            raise WireError(f"the owner hung up, {count - at} of {count} bytes missing")
        at += got
    return data


def _hang_up(sock: socket.socket | None) -> None:
    """End what blocks on this socket, and close it."""
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        sock.close()


def _be_nice() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
