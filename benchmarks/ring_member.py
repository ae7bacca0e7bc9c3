"""What one member of `rings` runs. Prints one JSON line: seconds by kind, and what was computed.

Each round begins a generation, in which the ring has the natural order, and times an all-reduce;
then all plan the ring from what was measured, and time it again.
"""

import argparse
import json
import socket
import time
import zlib
from pathlib import Path

import torch

from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.group import Group
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.world import Member, World

#: From asm-generic/socket.h; Python has no name for it.
SO_MAX_PACING_RATE = 47
TIMEOUT_S = 60.0


def meet(folder: Path, me: int, size: int, address: tuple[str, int]) -> list[Member]:
    """All members, by files that each writes."""
    (folder / f"{me}.part").write_text(json.dumps(address))
    (folder / f"{me}.part").rename(folder / f"{me}.address")
    members = []
    for rank in range(size):
        while not (path := folder / f"{rank}.address").exists():
            time.sleep(0.02)
        host, port = json.loads(path.read_text())
        members.append(
            Member(member=MemberId(rank), seat=Seat(rank), node=NodeId(rank), host=host, port=port)
        )
    return members


def main() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("--folder", type=Path)
    made.add_argument("--rank", type=int)
    made.add_argument("--size", type=int)
    made.add_argument("--host")
    made.add_argument("--megabytes", type=int)
    made.add_argument("--rounds", type=int)
    made.add_argument("--connections", type=int, default=1)
    made.add_argument("--cap", type=int, default=0)
    o = made.parse_args()
    torch.set_num_threads(1)
    faults: list[str] = []
    group = Group(
        member=MemberId(o.rank),
        secret=b"a benchmark keeps no secret",
        host=o.host,
        config=CollectivesConfig(transport=Transport.TCP, connections=o.connections, plan_every=0),
        on_fault=lambda generation, lost, reason: faults.append(reason),
    )
    members = meet(o.folder, o.rank, o.size, group.address)
    own = torch.arange(o.megabytes << 18, dtype=torch.float32).remainder_(1024) + o.rank
    data = torch.empty_like(own)
    seconds: dict[str, list[float]] = {"naive": [], "planned": []}
    rings, crc = [], 0

    def timed(kind: str) -> None:
        nonlocal crc
        data.copy_(own)
        group.barrier().wait(TIMEOUT_S)
        began = time.perf_counter()
        group.all_reduce(data).wait(TIMEOUT_S)
        seconds[kind].append(time.perf_counter() - began)
        crc = zlib.crc32(data.numpy().data, crc)
        if not torch.equal(data, own * o.size + sum(range(o.size)) - o.rank * o.size):
            faults.append("wrong sum")

    for number in range(o.rounds):
        group.edit(World.of(Generation(number + 1), members), timeout_s=TIMEOUT_S)
        if o.cap and not number:
            for link in group._engine.net.links.values():
                for lane in link.lanes:
                    lane.sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, o.cap)
        timed("naive")
        rings.append(group.plan_ring().wait(TIMEOUT_S).order)
        timed("planned")
    group.barrier().wait(TIMEOUT_S)
    group.close()
    print(json.dumps({"seconds": seconds, "rings": rings, "crc": crc, "faults": faults}))


if __name__ == "__main__":
    main()
