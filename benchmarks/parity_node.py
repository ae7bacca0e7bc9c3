"""One node's agent as far as parity goes, in a process of its own; and how to run some of them.

It owns the node's folder of shared memory, serves its bytes, holds parity, and leads rounds
when it is the first: the real classes, joined by files in a folder in place of a coordinator.

    python -m benchmarks.parity_node CONFIG NODE
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.children import Children, python
from benchmarks.jobs import JobFailed, ended_by_sigterm
from ftkit.checkpoint.serve import ArenaServer
from ftkit.checkpoint.stripes import Code
from ftkit.core.ids import Generation, JobId, MemberId, NodeId, Seat
from ftkit.core.trace import Trace
from ftkit.core.world import Member, World
from ftkit.launch.arenas import Arenas
from ftkit.launch.config import JobConfig, new_job_id
from ftkit.launch.parity import ParityTier
from ftkit.recovery.plan import Mode, Plan

SECRET = b"benchmark" * 4

#: The longest that nodes need to come up, and to end.
STUCK_S = 60.0


@dataclass(frozen=True, slots=True)
class Nodes:
    """Agents that run."""

    config: JobConfig
    folder: Path
    """Where they say where they are, and write their events."""

    @property
    def servers(self) -> dict[NodeId, tuple[str, int]]:
        """Where their byte servers are."""
        return _addresses(self.folder)

    def rounds(self) -> list[int]:
        """The steps that parity was made of."""
        events = self.folder / "events-0"
        lines = map(json.loads, events.read_text().splitlines())
        return [int(e["step"]) for e in lines if e["kind"] == "parity"]

    def await_round(self, step: int) -> None:
        """Return once a step has its parity. JobFailed when it takes too long."""
        until(lambda: step in self.rounds(), f"no parity of step {step}")


@contextmanager
def nodes(folder: Path, code: str, count: int) -> Iterator[Nodes]:
    """Run the agents of so many nodes. They end with the block, and their memory is given back."""
    folder.mkdir()
    config = JobConfig(
        job=new_job_id(), command=("none",), nodes=count, parity=code, run_dir=str(folder)
    )
    (folder / "config.json").write_text(config.to_json())
    with Children(folder) as children:
        started = [
            children.start(
                python("-m", "benchmarks.parity_node", str(folder), str(number)),
                {"OMP_NUM_THREADS": "1"},
            )
            for number in range(count)
        ]
        try:

            def up() -> bool:
                for number, child in enumerate(started):
                    if child.poll() is not None:
                        raise JobFailed(f"node {number} ended: {children.errors(number)}")
                return len(_addresses(folder)) == count

            until(up, "the nodes do not come up")
            yield Nodes(config, folder)
        finally:
            (folder / "stop").touch()
            until(lambda: all(c.poll() is not None for c in started), "a node does not end")


def until(holds: Callable[[], bool], what: str) -> None:
    """Look until it holds. Raises JobFailed when it takes too long."""
    deadline = time.monotonic() + STUCK_S
    while not holds():
        if time.monotonic() > deadline:
            raise JobFailed(f"{what} after {STUCK_S:.0f} s")
        time.sleep(0.02)


def _addresses(folder: Path) -> dict[NodeId, tuple[str, int]]:
    found = {}
    for path in folder.glob("address-*.json"):
        host, port = json.loads(path.read_text())
        found[NodeId(int(path.stem.removeprefix("address-")))] = str(host), int(port)
    return found


def main() -> None:
    folder, node = Path(sys.argv[1]), NodeId(int(sys.argv[2]))
    config = JobConfig.from_json((folder / "config.json").read_text())
    code = config.code
    assert isinstance(code, Code), "nodes() is given one"
    arenas = Arenas(config, node)
    members = [
        Member(member=MemberId(n), seat=Seat(n), node=NodeId(n), host="", port=0)
        for n in range(config.nodes)
    ]
    plan = Plan(mode=Mode.RUNNING, world=World.of(Generation(1), members))
    try:
        with ended_by_sigterm(), Trace(folder / f"events-{node}") as trace:
            tier = ParityTier(config, code, node, SECRET, arenas, trace)
            server = ArenaServer(
                arenas.directory, JobId(config.job), SECRET, operations=tier.operations
            )
            part = folder / f"address-{node}.part"
            part.write_text(json.dumps(server.address))
            part.rename(part.with_suffix(".json"))
            known = dict[NodeId, tuple[str, int]]()
            tier.start()
            # The folder goes when whoever started this is gone.
            while folder.is_dir() and not (folder / "stop").exists():
                if (now := _addresses(folder)) != known:
                    known = now
                    stores = {str(n): address for n, address in known.items()}
                    tier.take(plan, stores)
                time.sleep(0.05)
            server.close()
            tier.close()
    finally:
        arenas.remove()


if __name__ == "__main__":
    main()
