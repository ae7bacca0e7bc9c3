"""Keeper: an agent's thread that keeps an older copy of another node's shards, for approximate recovery.

Every node keeps those of the node before it, in a ring of those that live. So a stage whose rank and
node are lost, with all that its arena held, still has a copy that is `EVERY_STEPS` steps old at most.
Not exact, so it is no tier of the state: it has a folder and a byte server of its own, and nothing
counts on it but `recovery.approximation`.

A copy is read while the owner trains on and may overwrite it. Then it does not prove whole, is dropped,
and the next one is tried: the one that is kept goes only when another is there.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from ftkit.checkpoint.arena import arena_path
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.fetch import fetch, list_copies
from ftkit.checkpoint.gate import Gate, OpenGate, go_through
from ftkit.checkpoint.parity.combine import be_nice
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.serve import ArenaServer
from ftkit.core.errors import FtkitError
from ftkit.core.ids import Generation, JobId, NodeId, Seat
from ftkit.core.inventory import Copy
from ftkit.core.trace import Trace

logger = logging.getLogger(__name__)

#: Steps between two copies of a shard. Measured on a toy, a shard of 100 to 200 steps ago sets training
#: back by 2 to 11 (`benchmarks/approximate.py`), so more often would gain little.
EVERY_STEPS = 100

#: Between two looks at what the other node has.
LOOK_S = 0.5

#: The longest that an end waits for the thread.
CLOSE_S = 2.0

FOLDER = "kept"

#: Pages are made for a copy as it comes, not for all slabs of the arena in which it is kept.
_PAGES_LATER = 1 << 16


class Keeper:
    """Owns one thread, a folder and its byte server; `close` ends them."""

    def __init__(
        self,
        job: JobId,
        node: NodeId,
        secret: bytes,
        shm_dir: Path,
        trace: Trace,
        *,
        host: str,
        changed: Callable[[], None],
        gate: Gate | None = None,
        every_steps: int = EVERY_STEPS,
    ) -> None:
        """Begin to keep, as soon as it is known where others serve their arenas.

        Args:
          job: whose shards.
          node: this one.
          secret: the job's.
          shm_dir: the node's folder of shared memory; the copies are in one inside.
          trace: told of every copy.
          host: the address to serve at.
          changed: called, on the thread, when `report` would say something new.
          gate: asked before each chunk, so that it keeps out of training's way.
          every_steps: between two copies of a shard.
        """
        self._job, self._node, self._secret = job, node, secret
        self._trace, self._changed, self._every = trace, changed, every_steps
        self._gate = gate or OpenGate()
        self._folder = shm_dir / FOLDER
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._server = ArenaServer(self._folder, job, secret, host=host)
        self._ended = threading.Event()
        self._servers: Mapping[NodeId, tuple[str, int]] = {}
        """Replaced, never changed."""
        self._thread = threading.Thread(target=self._run, name="ftkit-keep", daemon=True)
        self._thread.start()

    def take(self, servers: Mapping[NodeId, tuple[str, int]]) -> None:
        """Where the nodes that live serve their arenas. Any thread."""
        self._servers = dict(servers)

    def report(self) -> dict[str, object]:
        """What is kept here, and where it is served. Any thread."""
        return {
            "store": list(self._server.address),
            "copies": [
                c.to_json() | {"path": Path(c.path).name}
                for c in local_copies(self._job, self._folder, self._node)
            ],
        }

    def close(self) -> None:
        """End the thread, and serve no more. Safe to call twice."""
        self._ended.set()
        self._thread.join(timeout=CLOSE_S)
        self._server.close()

    def _run(self) -> None:
        """(keeping thread) Look, and copy what is due."""
        be_nice()
        while not self._ended.wait(LOOK_S):
            ward = ward_of(self._node, self._servers)
            if ward is None:
                continue
            try:
                self._look(ward, self._servers[ward])
            except (FtkitError, OSError, KeyError) as error:
                logger.debug("no copy of node %s's shards this time: %s", ward, error)

    def _look(self, ward: NodeId, server: tuple[str, int]) -> None:
        held = local_copies(self._job, self._folder, self._node)
        there = list_copies(server, self._secret, ward)
        for copy in due(held, there, self._every):
            self._keep(copy, server)
        newest = max((c.generation for c in there), default=Generation(0))
        mine = {c.seat for c in there}
        if any(c.seat in mine and c.generation == newest for c in held):
            for old in held:
                if old.generation < newest and old.seat not in mine:
                    # Of a node that is gone, or that another keeps for: the world has gone on.
                    Path(old.path).unlink(missing_ok=True)

    def _keep(self, copy: Copy, server: tuple[str, int]) -> None:
        start = time.monotonic()
        path = arena_path(self._job, copy.seat, self._folder)
        with fetch(server, self._secret, copy.path, copy.step, copy.generation) as remote:
            head = remote.head
            with ensure_arena(path, head.layout, replicas=_PAGES_LATER) as arena:
                older = arena.snapshots()
                mirror = arena.adopt(remote.head_bytes)
                mirror.reserve()
                at = 0
                for block in remote.blocks():
                    self._gate.given_up(go_through(self._gate, len(block), check=self._check))
                    mirror.data[at : at + len(block)] = np.frombuffer(block, dtype=np.uint8)
                    at += len(block)
                mirror.seal()
                for sealed in older:
                    arena.drop(sealed)
        self._trace.event(
            "kept",
            seat=copy.seat,
            step=copy.step,
            generation=copy.generation,
            bytes=head.sealed.data_bytes,
            seconds=round(time.monotonic() - start, 6),
        )
        self._changed()

    def _check(self) -> None:
        if self._ended.is_set():
            raise FtkitError("the agent ends")


def ward_of(node: NodeId, nodes: Iterable[NodeId]) -> NodeId | None:
    """Whose shards a node keeps: the one before it in the ring of those that live; pure.

    None while it is alone, or not among them.
    """
    ring = sorted(nodes)
    if node not in ring or len(ring) < 2:
        return None
    return ring[ring.index(node) - 1]


def due(held: Iterable[Copy], there: Iterable[Copy], every_steps: int) -> list[Copy]:
    """What is to be copied now: of each seat the newest, where what is held is too old; pure.

    What was cut otherwise (another world, layers that moved) fits nothing any more and is replaced
    at once.
    """
    newest = dict[Seat, Copy]()
    for copy in sorted(there, key=lambda c: (c.generation, c.step)):
        if copy.part.layouts > 1:
            newest[copy.seat] = copy
    kept = {c.seat: c for c in sorted(held, key=lambda c: (c.generation, c.step))}
    return [
        copy
        for seat, copy in sorted(newest.items())
        if (old := kept.get(seat)) is None
        or (old.generation, old.part.layout) != (copy.generation, copy.part.layout)
        or copy.step - old.step >= every_steps
    ]
