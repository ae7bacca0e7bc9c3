"""`ftkit doctor network`: how fast each pair of nodes talks, and the ring that follows.

One process a node, with the data plane that a job would use. Every pair meets once, in the
rounds of a tournament; a pair that cannot connect costs its own round and nobody else's.
Node 0 keeps the appointments (a TCPStore), and gathers the results. Without other nodes the
same is done between processes of this machine.
"""

import json
import math
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed

from ftkit.collectives import rates as matrices
from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.group import Group
from ftkit.collectives.rates import Matrix
from ftkit.collectives.ring_order import Ring, edges_of, plan
from ftkit.collectives.tournament import rounds
from ftkit.core.errors import GenerationAborted, UsageError, WireError
from ftkit.core.ids import Generation, MemberId, NodeId, Rank, Seat
from ftkit.core.world import Member, World
from ftkit.detection.clock_skew import OFFSET_MAX_S, offset_of

#: A pair that has not connected by then is called unreachable.
REACH_S = 5.0
#: Exchanges of time stamps with each node; the quickest counts.
EXCHANGES = 5


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found."""

    hosts: tuple[str, ...]
    rates: Matrix
    """Bytes a second from row to column; 0 where they cannot reach each other."""
    by_memory: frozenset[tuple[int, int]]
    """(from, to) measured by reading memory: the two are on one host."""
    ring: Ring
    clocks: tuple[tuple[float, float], ...] = ()
    """Of each node: how far its wall clock is ahead of node 0's, and by how much that may be wrong,
    in seconds."""

    @property
    def skewed(self) -> list[tuple[int, float]]:
        """Nodes whose wall clock is off, and by how much."""
        return [
            (rank, offset)
            for rank, (offset, error) in enumerate(self.clocks)
            if abs(offset) - error > OFFSET_MAX_S
        ]

    @property
    def unreachable(self) -> list[tuple[int, int]]:
        """Pairs that could not connect."""
        size = len(self.hosts)
        return [(a, b) for a in range(size) for b in range(a + 1, size) if not self.rates[a, b]]

    def to_json(self) -> dict[str, object]:
        rates = [
            [None if i == j or math.isnan(rate) else rate for j, rate in enumerate(row)]
            for i, row in enumerate(self.rates.tolist())
        ]
        return {
            "hosts": list(self.hosts),
            "rates": rates,
            "by_memory": sorted(self.by_memory),
            "unreachable": self.unreachable,
            "ring": list(self.ring.order),
            "slowest": self.ring.slowest,
            "slowest_edge": list(self.ring.edge),
            "clocks": [{"offset_s": o, "error_s": e} for o, e in self.clocks],
        }


def examine(
    *, nodes: int, nproc: int, node_rank: int, master: str, host: str, config: CollectivesConfig
) -> Diagnosis | None:
    """Measure, as one of `nodes`, or with `nproc` processes of this machine. Blocks.

    Returns:
      What node 0 found; None on the others.

    Raises:
      UsageError: there are not two to measure between, or an address is none, or not ours.
      WireError: the nodes did not all come together.
    """
    if master and nodes == 1:
        raise UsageError(f"--master {master} is met by several nodes: give --nodes, too")
    if nodes > 1:
        if not master:
            raise UsageError("--master HOST:PORT of node 0 is needed on every node")
        address, _, digits = master.rpartition(":")
        if not address or not digits.isdecimal():
            raise UsageError(f"--master is HOST:PORT, not {master!r}")
        if not 0 <= node_rank < nodes:
            raise UsageError(
                f"--node-rank counts the {nodes} nodes from 0, so it is not {node_rank}"
            )
        host = _ours(host) if host else _own(address)
        return _take_part(node_rank, nodes, address, int(digits), host, config)
    if nproc < 2:
        raise UsageError(f"a network has at least two ends, not {nproc}")
    host = _ours(host or "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    command = [
        sys.executable, "-m", "ftkit.launch.cli", "doctor", "network",
        "--nodes", str(nproc), "--master", f"127.0.0.1:{port}", "--host", host,
        "--seconds", str(config.probe_s), "--transport", config.transport.value,
        "--connections", str(config.connections),
    ]  # fmt: skip
    others = [
        subprocess.Popen([*command, "--node-rank", str(rank)], stdout=subprocess.DEVNULL)
        for rank in range(1, nproc)
    ]
    try:
        found = _take_part(0, nproc, "127.0.0.1", port, host, config)
        for process in others:
            process.wait(REACH_S)
    finally:
        for process in others:
            process.kill()
            process.wait()
    return found


def _take_part(
    me: int, size: int, address: str, port: int, host: str, config: CollectivesConfig
) -> Diagnosis | None:
    patience = timedelta(seconds=60 + size * (REACH_S + config.probe_s))
    try:
        store = TCPStore(address, port, size, is_master=me == 0, timeout=patience)
        if me == 0:
            store.set("secret", secrets.token_hex(32))
        row = _meet_all(me, size, store, host, config)
        row["clock"] = compare_clocks(store, me, size)
        store.set(f"row/{me}", json.dumps(row))
        found = None
        if me == 0:
            found = _diagnose([json.loads(store.get(f"row/{rank}")) for rank in range(size)])
        _all_here(store, "end", size)
    except RuntimeError as error:  # what the store raises
        raise WireError(
            f"the {size} nodes did not all meet at {address}:{port}: {error}"
        ) from error
    return found


def compare_clocks(
    store: TCPStore, me: int, size: int, *, wall: Callable[[], float] = time.time
) -> tuple[float, float]:
    """How far our wall clock is ahead of node 0's, and by how much that may be wrong. Blocks.

    All nodes call it; node 0 answers the others, one after another. Of several exchanges the
    quickest counts.
    """
    if me:
        found = []
        for i in range(EXCHANGES):
            sent = wall()
            store.set(f"clock/{me}/{i}/ask", "")
            received, answered = json.loads(store.get(f"clock/{me}/{i}/answer"))
            found.append(offset_of(sent, received, answered, wall()))
        offset, error = min(found, key=lambda f: f[1])
        return -offset, error
    for rank in range(1, size):
        for i in range(EXCHANGES):
            store.wait([f"clock/{rank}/{i}/ask"])
            received = wall()
            store.set(f"clock/{rank}/{i}/answer", json.dumps([received, wall()]))
    return 0.0, 0.0


def _meet_all(
    me: int, size: int, store: TCPStore, host: str, config: CollectivesConfig
) -> dict[str, Any]:
    """Our row: what we could send to each, what we read from each; 0 where we could not."""
    secret = bytes.fromhex(store.get("secret").decode())
    sent: dict[int, float | None] = {}
    read: dict[int, float | None] = {}
    with Group(
        member=MemberId(me), secret=secret, host=host, config=config, on_fault=_shown_by_rates
    ) as group:
        store.set(f"address/{me}", json.dumps(group.address))
        members = []
        for rank in range(size):
            where, port = json.loads(store.get(f"address/{rank}"))
            members.append(
                Member(
                    member=MemberId(rank), seat=Seat(rank), node=NodeId(0), host=where, port=port
                )
            )
        for number, pairs in enumerate(rounds(size)):
            # A generation a round: those who rest, or cannot meet, are missed by nobody.
            for pair in pairs:
                if me in pair:
                    partner = pair[0] if pair[1] == me else pair[1]
                    world = World.of(Generation(number + 1), [members[rank] for rank in pair])
                    sent[partner], read[partner] = _meet(group, world, MemberId(partner))
            _all_here(store, f"round/{number}", size)
        name = group.address[0]
    return {"host": name, "sent": sent, "read": read}


def _meet(group: Group, world: World, partner: MemberId) -> tuple[float | None, float | None]:
    try:
        group.edit(world, timeout_s=REACH_S)
        rank = world.rank_of(partner)
        assert rank is not None, "we meet the partner in this world"
        group.probe(Rank(rank)).wait()
        traffic = group.traffic[partner]
        # Nobody closes the link while the other still looks at it.
        group.barrier().wait()
    except (WireError, GenerationAborted):
        return 0.0, 0.0
    return traffic.sent.rate, traffic.read.rate if traffic.read is not None else None


def _diagnose(rows: Sequence[dict[str, Any]]) -> Diagnosis:
    hosts = tuple(str(row["host"]) for row in rows)
    rates, by_memory = matrices.unknown(len(rows)), set()
    for rank, row in enumerate(rows):
        for partner, rate in row["sent"].items():
            if rate is not None:
                rates[rank, int(partner)] = rate
        for partner, rate in row["read"].items():
            if rate and not rates[int(partner), rank] > 0:
                rates[int(partner), rank] = rate
                by_memory.add((int(partner), rank))
    np.fill_diagonal(rates, np.nan)
    filled = matrices.filled(rates, hosts)
    clocks = tuple((float(row["clock"][0]), float(row["clock"][1])) for row in rows)
    return Diagnosis(hosts, rates, frozenset(by_memory), plan(filled, hosts), clocks)


def _all_here(store: TCPStore, what: str, size: int) -> None:
    if store.add(f"{what}/here", 1) == size:
        store.set(f"{what}/all", "")
    store.wait([f"{what}/all"])


def _shown_by_rates(generation: Generation, lost: frozenset[MemberId], reason: str) -> None:
    """A pair that breaks shows as unreachable."""


def _own(master: str) -> str:
    """Our address on the way to the master. UsageError where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))  # sends nothing; the kernel picks the route
        except OSError as error:
            raise UsageError(f"--master {master} cannot be reached: {error.strerror}") from error
        return str(probe.getsockname()[0])


def _ours(host: str) -> str:
    """`host`, where this machine can listen. UsageError where it cannot."""
    try:
        socket.create_server((host, 0)).close()
    except OSError as error:
        raise UsageError(
            f"--host {host} is no address of this machine ({error.strerror}); leave it out for the "
            "one on the way to the master"
        ) from error
    return host


def show(found: Diagnosis) -> None:
    """Print the matrix, the pairs that failed, and the ring."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="from row to column")
    table.add_column("node")
    table.add_column("host")
    for rank in range(len(found.hosts)):
        table.add_column(str(rank), justify="right")
    ring = set(edges_of(found.ring.order))
    for rank, host in enumerate(found.hosts):
        cells = []
        for other in range(len(found.hosts)):
            text = "" if other == rank else speed(float(found.rates[rank, other]))
            if (rank, other) in found.by_memory:
                text += " (memory)"
            if (rank, other) == found.ring.edge:
                text = f"[bold red]{text}[/]"
            elif (rank, other) in ring:
                text = f"[bold green]{text}[/]"
            cells.append(text)
        table.add_row(str(rank), host, *cells)
    console = Console()
    console.print(table)
    for a, b in found.unreachable:
        console.print(
            f"[red]nodes {a} ({found.hosts[a]}) and {b} ({found.hosts[b]}) cannot reach each other[/]"
        )
    for rank, offset in found.skewed:
        way = "ahead of" if offset > 0 else "behind"
        console.print(
            f"[yellow]the wall clock of node {rank} ({found.hosts[rank]}) is {abs(offset) * 1e3:.0f} ms "
            f"{way} node 0's[/]"
        )
    if found.clocks and not found.skewed:
        most = max(abs(offset) + error for offset, error in found.clocks)
        console.print(f"all wall clocks are within {most * 1e3:.1f} ms of node 0's")
    order = " → ".join(str(rank) for rank in (*found.ring.order, found.ring.order[0]))
    a, b = found.ring.edge
    console.print(f"ring {order}; its slowest edge {a} → {b}: {speed(found.ring.slowest)}")


def speed(rate: float) -> str:
    """A rate for people."""
    if math.isnan(rate):
        return "?"
    if rate == 0:
        return "none"
    return f"{rate / 1e9:.2f} GB/s" if rate >= 1e9 else f"{rate / 1e6:.1f} MB/s"


def configured(seconds: float, transport: str, connections: int) -> CollectivesConfig:
    """The data plane to measure with. Raises UsageError for what cannot be."""
    try:
        return CollectivesConfig(
            probe_s=seconds, transport=Transport(transport), connections=connections
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
