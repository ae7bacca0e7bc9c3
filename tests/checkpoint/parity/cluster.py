"""Nodes of a job without processes: arenas, byte servers and holders, on real memory."""

import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.chunks import Share
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.lines import Lines
from ftkit.checkpoint.parity.combine import Pace
from ftkit.checkpoint.parity.holder import Holder
from ftkit.checkpoint.parity.leader import Round, lead_round
from ftkit.checkpoint.parity.mend import Mended, fetch_head, mend, missing_parts
from ftkit.checkpoint.parity.operations import NodeState, operations
from ftkit.checkpoint.parity.parts import local_parts
from ftkit.checkpoint.parity.protocol import standing
from ftkit.checkpoint.parity.rounds import NOBODY, Ballot, Holding
from ftkit.checkpoint.parity.streams import Peers
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.serve import ArenaServer
from ftkit.checkpoint.slabs import SLABS
from ftkit.checkpoint.stripes import Code
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from tests.checkpoint.helpers import pattern

JOB, SECRET = JobId("job"), b"s" * 32


def hurry(wanted: Callable[[], bool]) -> Pace:
    return Pace(wanted, share=1.0)


class Machine:
    """One node: its arenas, its parity, its byte server."""

    def __init__(self, cluster: "Cluster", node: NodeId, directory: Path) -> None:
        self.node, self.directory = node, directory
        directory.mkdir()
        self.holder = Holder(directory, JOB, node, cluster.peers, make_pace=hurry)
        self.server = ArenaServer(
            directory, JOB, SECRET, operations=operations(self.holder, self.state)
        )
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.killed = False
        answer = self.server._answer

        def wait(sock: socket.socket, request: dict[str, Any]) -> None:
            self.goes_on.wait()
            if self.killed:
                raise ConnectionResetError
            answer(sock, request)

        self.server._answer = wait  # type: ignore[method-assign]

    def state(self) -> NodeState:
        return NodeState(
            promised=self.holder.promised,
            parts=tuple((c, p) for c, p, _ in local_parts(self.directory, JOB, self.node)),
            holds=tuple(self.holder.holdings()),
            given_up=frozenset(),
        )

    def stop(self) -> None:
        """As SIGSTOP does: whatever is asked of it is answered once it goes on."""
        self.goes_on.clear()

    def kill(self) -> None:
        """As SIGKILL does, for the others: all connections end, and no new one is answered."""
        self.killed = True
        for sock in list(self.server._clients):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.goes_on.set()
        self.server.close()
        self.holder.close()


class Cluster:
    """A job of so many nodes, all of whose seats hold the same state."""

    def __init__(
        self,
        folder: Path,
        code: Code,
        nodes: int,
        *,
        seats: int = 1,
        layout: StateLayout | None = None,
        chunk_bytes: int = 1024,
        timeout_s: float = 5.0,
    ) -> None:
        self.folder, self.code, self.seats = folder, code, seats
        self.layout = layout or StateLayout.of([("w", "float32", (9000,)), ("b", "int8", (77,))])
        self.chunk_bytes = chunk_bytes
        self.machines: dict[NodeId, Machine] = {}
        self.lines = Lines(SECRET, timeout_s=timeout_s)
        self.ballot = NOBODY
        self._born = 0
        for node in range(nodes):
            self.start(NodeId(node))
        self.world = list(self.machines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines.values():
            machine.close()
        self.lines.close()

    def peers(self) -> Peers:
        return Peers({n: m.server.address for n, m in self.machines.items()}, self.lines)

    def start(self, node: NodeId) -> Machine:
        self._born += 1
        found = self.machines[node] = Machine(self, node, self.folder / f"n{node}-{self._born}")
        return found

    def lose(self, *nodes: NodeId | int) -> None:
        for node in nodes:
            machine = self.machines.pop(NodeId(node))
            machine.close()
            shutil.rmtree(machine.directory)

    def seats_of(self, node: NodeId) -> range:
        return range(node * self.seats, (node + 1) * self.seats)

    def arena(self, seat: int) -> Path:
        machine = self.machines[NodeId(seat // self.seats)]
        return arena_path(JOB, Seat(seat), machine.directory)

    def write(self, step: int, *, generation: int = 1, seats: Sequence[int] | None = None) -> None:
        """Every seat captures its share of a step."""
        count = len(self.world) * self.seats
        for seat in range(count) if seats is None else seats:
            with ensure_arena(
                self.arena(seat),
                self.layout,
                replicas=count,
                chunk_bytes=self.chunk_bytes,
                slabs=SLABS + 2,
            ) as arena:
                writer = arena.start(
                    Step(step), Generation(generation), self.layout, share=Share(seat, count)
                )
                whole = self.state_of(step)
                first = writer_first(writer.table.nbytes // 8, seat, count, self)
                writer.data[:] = whole[first : first + writer.data.nbytes]
                writer.digest(range(len(writer.table)))
                writer.seal(b'{"step":%d}' % step)

    def state_of(self, step: int) -> np.ndarray:
        return np.frombuffer(pattern(step, self.layout.total_bytes), dtype=np.uint8)[
            : self.layout.total_bytes
        ]

    def round(self, leader: int = 0) -> Round:
        done, self.ballot = lead_round(self.peers(), NodeId(leader), self.code, self.ballot)
        return done

    def stands(self) -> Holding | None:
        return standing({n: m.holder.holdings() for n, m in self.machines.items()})

    def mend(self, node: int, holding: Holding, pace: Pace | None = None) -> Mended:
        where = self.machines[NodeId(node)].directory
        head = fetch_head(self.peers(), holding, NodeId(node))
        missing = missing_parts(where, head, NodeId(node))
        pace = pace or hurry(lambda: True)
        return mend(where, head, NodeId(node), missing, self.peers(), pace, slabs=5)

    def assert_state(self, step: int, nodes: Sequence[int] | None = None) -> None:
        """Every byte of a step is in the arenas, and right."""
        count = len(self.world) * self.seats
        for seat in range(count):
            if nodes is not None and seat // self.seats not in nodes:
                continue
            with Arena.open(self.arena(seat)) as arena:
                sealed = arena.find(Step(step))
                head = arena.head(sealed)
                data = b"".join(bytes(b) for b in arena.blocks(head))
                assert head.small == {"step": step}
            first = sealed.first_byte
            assert data == self.state_of(step)[first : first + len(data)].tobytes()


def writer_first(chunks: int, seat: int, count: int, cluster: Cluster) -> int:
    total = -(-cluster.layout.total_bytes // cluster.chunk_bytes)
    share = Share(seat, count).chunks(total)
    assert len(share) == chunks
    return share.start * cluster.chunk_bytes


def ballot(number: int, node: int) -> Ballot:
    return Ballot(number, NodeId(node))
