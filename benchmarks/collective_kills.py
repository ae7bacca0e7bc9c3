"""SIGKILL to one rank in the middle of an all-reduce, seen by the others.

Each of the ranks is a process of its own with a `Group`, and nothing else: no agent, no
coordinator. The survivors edit the group as soon as it reports the loss, and reduce again. The
victim tells when it strikes itself, from the clock that all processes of a host share.
"""

import multiprocessing as mp
import os
import random
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

SECRET = b"nothing to hide in a benchmark"
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "ftkit.collectives.group"])
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """What one kill cost, in seconds after it, at the survivor that was last."""

    ranks: int
    size: int
    detect_s: float
    edit_s: float
    """From a survivor's own notice of the loss until its group can be used."""
    first_s: float
    """Until the first all-reduce of the survivors ended."""
    messages: int
    """Frames that a survivor sent from the notice to the end of the edit."""
    connections: int
    """Connections between survivors that are not the ones from before."""
    wrong: int
    """Survivors whose first all-reduce gave something else than the sum."""


def kill_one(ranks: int, size: int, seed: int) -> Kill:
    """Start `ranks` processes, let one die in an all-reduce of `size` bytes. Blocks."""
    pipes, processes = list[Connection](), list[Any]()
    try:
        for rank in range(ranks):
            mine, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_rank, args=(rank, ranks, size, seed, theirs))
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        addresses = [_hear(pipe) for pipe in pipes]
        for pipe in pipes:
            pipe.send(addresses)
        struck = _hear(pipes[-1])
        told = [_hear(pipe) for pipe in pipes[:-1]]
        for pipe in pipes[:-1]:
            pipe.send("all are through")
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()
    return Kill(
        ranks=ranks,
        size=size,
        detect_s=max(t["noticed"] for t in told) - struck,
        edit_s=max(t["edited"] - t["noticed"] for t in told),
        first_s=max(t["reduced"] for t in told) - struck,
        messages=max(t["messages"] for t in told),
        connections=sum(t["connections"] for t in told),
        wrong=sum(not t["right"] for t in told),
    )


def _hear(pipe: Connection) -> Any:
    if not pipe.poll(_TIMEOUT_S):
        raise TimeoutError(f"a rank said nothing for {_TIMEOUT_S:.0f} s")
    return pipe.recv()


def _rank(rank: int, ranks: int, size: int, seed: int, pipe: Connection) -> None:
    import torch

    from ftkit.collectives.group import Group
    from ftkit.core.errors import GenerationAborted
    from ftkit.core.ids import Generation, MemberId, NodeId, Seat
    from ftkit.core.world import Member, World

    torch.set_num_threads(1)
    noticed, lost = threading.Event(), set[int]()
    at = 0.0

    def on_fault(generation: Generation, members: frozenset[MemberId], reason: str) -> None:
        nonlocal at
        at = time.monotonic()
        lost.update(members)
        noticed.set()

    group = Group(member=MemberId(rank), secret=SECRET, on_fault=on_fault)
    pipe.send(group.address)
    members = [
        Member(member=MemberId(r), seat=Seat(r), node=NodeId(0), host=host, port=port)
        for r, (host, port) in enumerate(pipe.recv())
    ]
    group.edit(World.of(Generation(1), members), timeout_s=_TIMEOUT_S)
    data = torch.zeros(size // 4)
    for _ in range(3):
        start = time.monotonic()
        group.all_reduce(data).wait()
    group.barrier().wait()
    if rank == ranks - 1:
        # Somewhere in one of the operations that follow.
        delay = random.Random(seed).uniform(0.2, 3.0) * (time.monotonic() - start)
        threading.Thread(target=_strike, args=(pipe, delay), daemon=True).start()
    try:
        while True:
            group.all_reduce(data).wait()
    except GenerationAborted:
        pass
    noticed.wait()
    net = group._engine.net
    before = {link.peer: link.fd for link in net.links.values()}
    sent, queue = Counter[str](), net.queue

    def counted(*args: Any, **more: Any) -> None:
        sent["frames"] += 1
        queue(*args, **more)

    vars(net)["queue"] = counted
    survivors = [m for m in members if m.member not in lost]
    group.edit(World.of(Generation(2), survivors), timeout_s=_TIMEOUT_S)
    edited = time.monotonic()
    del vars(net)["queue"]
    data.fill_(rank + 1)
    group.all_reduce(data).wait()
    reduced = time.monotonic()
    after = {link.peer: link.fd for link in net.links.values()}
    total = sum(m.member + 1 for m in survivors)
    pipe.send(
        {
            "noticed": at,
            "edited": edited,
            "reduced": reduced,
            # The flood of the abort went out before the notice.
            "messages": sent["frames"] + len(survivors),
            "connections": sum(after[p] != before.get(p) for p in after),
            "right": bool((data == total).all()) and lost == {ranks - 1},
        }
    )
    pipe.recv()
    group.close()


def _strike(pipe: Connection, delay_s: float) -> None:
    time.sleep(delay_s)
    pipe.send(time.monotonic())
    os.kill(os.getpid(), signal.SIGKILL)
