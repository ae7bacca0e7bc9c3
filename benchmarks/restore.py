"""How long until the state is back? From every tier of ftkit, and by dcp.load of the same state.

One process, a GPT with AdamW, whose state is kept once in each way and brought back into the
live tensors over and over, one way after another in each round; before each the tensors are
cleared, after each every byte is compared by digest. ::

    arena    this seat's own arena, as after the death of the process
    peers    a joiner without anything: three nodes' byte servers, in processes of their own, a
             third of the state each
    parity   one of three nodes is lost with all it held: its third is rebuilt from the parity
             and the parts of the others (2+1), then the state restored from it and from them
    disk     an ftkit checkpoint; every chunk's CRC-32C is checked
    dcp      dcp.load: nothing is checked

Disk and dcp are read warm, from the page cache, and cold, with their files dropped from it.

    python -m benchmarks.restore [--mib 1024] [--rounds 5] [--quick] [--json] [--save]
"""

import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import xxhash
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks import limits
from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import scratch
from benchmarks.parity_node import SECRET, Nodes, nodes
from benchmarks.saving import Loop, be_quiet
from ftkit.checkpoint.arena import SHM, arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.chunks import Share
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.fetch import list_copies
from ftkit.checkpoint.lines import Lines
from ftkit.checkpoint.parity.combine import Pace
from ftkit.checkpoint.parity.leader import ask_all
from ftkit.checkpoint.parity.mend import fetch_head, mend, missing_parts
from ftkit.checkpoint.parity.protocol import awaited
from ftkit.checkpoint.parity.streams import Peers
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.restore import execute, plan
from ftkit.checkpoint.slabs import SLABS
from ftkit.checkpoint.standalone import load, save
from ftkit.checkpoint.state import bytes_of
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Inventory
from ftkit.launch.arenas import PARITY_SLABS
from ftkit.launch.workload.gpt import parameters_digest

CODE, NODES = "2+1", 3
STEP, GENERATION = Step(1), Generation(1)
LOST = NodeId(0)

#: The node of a joiner that holds nothing.
NEW = NodeId(NODES)

Seconds = dict[str, list[float]]


class Kept:
    """The state, kept in every way that it is to come back from."""

    def __init__(self, loop: Loop, folder: Path, stack: ExitStack) -> None:
        self._loop = loop
        self._own = SHM / f"{folder.name}"
        self._own.mkdir(mode=0o700)
        stack.callback(shutil.rmtree, self._own)
        self._job = JobId(folder.name)
        _capture(loop, arena_path(self._job, Seat(0), self._own), Share(), SLABS)
        self._agents = stack.enter_context(nodes(folder / "nodes", CODE, NODES))
        for node in range(NODES):
            _capture(loop, _part(self._agents, node), Share(node, NODES), SLABS + PARITY_SLABS)
        self._agents.await_round(STEP)
        self._disk, self._dcp = folder / "disk", folder / "dcp"
        save(self._disk, STEP, model=loop.model, optimizer=loop.optimizer)
        dcp_save(loop.state_dict, checkpoint_id=self._dcp, no_dist=True)
        self._lines = Lines(SECRET)
        stack.callback(self._lines.close)
        self.rebuild_s = list[float]()

    def ways(self) -> dict[str, Callable[[], object]]:
        """How each brings the state back."""
        return {
            "arena": self.arena,
            "peers": self.peers,
            "parity": self.parity,
            "disk warm": self.disk,
            "disk cold": self.disk,
            "dcp warm": self.dcp,
            "dcp cold": self.dcp,
        }

    def prepare(self, way: str) -> None:
        """Have the page cache as it is to be, and no trace of an earlier rebuild. Not timed."""
        for folder in (self._disk, self._dcp):
            if way.endswith("cold"):
                limits.forget(folder)
            else:
                for path in folder.rglob("*"):
                    if path.is_file():
                        path.read_bytes()
        shutil.rmtree(self._own / "new", ignore_errors=True)
        (self._own / "new").mkdir()

    def arena(self) -> None:
        self._execute(local_copies(self._job, self._own, LOST), LOST, {})

    def peers(self) -> None:
        servers = self._agents.servers
        copies = [c for n, server in servers.items() for c in list_copies(server, SECRET, n)]
        self._execute(copies, NEW, servers)

    def parity(self) -> None:
        """As the agent of a node that came in place of the lost one, and then its rank."""
        start, where = time.perf_counter(), self._own / "new"
        servers = {n: a for n, a in self._agents.servers.items() if n != LOST}
        peers = Peers(servers, self._lines)
        states = ask_all(peers, list(servers))
        wanted = awaited(
            [copy for s in states.values() for copy, _ in s.parts],
            {n: s.holds for n, s in states.items()},
            (),
        )
        assert wanted is not None, (
            "two of three parts are no whole step, if the state has enough chunks"
        )
        head = fetch_head(peers, wanted, LOST)
        missing = missing_parts(where, head, LOST)
        mend(where, head, LOST, missing, peers, Pace(share=1.0), slabs=SLABS + PARITY_SLABS)
        self.rebuild_s.append(time.perf_counter() - start)
        copies = [c for n, server in servers.items() for c in list_copies(server, SECRET, n)]
        copies += local_copies(JobId(self._agents.config.job), where, LOST)
        self._execute(copies, LOST, servers)

    def disk(self) -> None:
        load(self._disk, STEP, model=self._loop.model, optimizer=self._loop.optimizer)

    def dcp(self) -> None:
        dcp_load(self._loop.state_dict, checkpoint_id=self._dcp, no_dist=True)

    def _execute(
        self, copies: Sequence[Copy], node: NodeId, servers: Mapping[NodeId, tuple[str, int]]
    ) -> None:
        found = plan(Inventory(copies=tuple(copies)), seat=Seat(0), node=node, servers=servers)
        done = execute(found, self._loop.state, secret=SECRET)
        assert not done.failures, done.failures


def _part(agents: Nodes, node: int) -> Path:
    return arena_path(JobId(agents.config.job), Seat(node), agents.config.shm_dir(node))


def _capture(loop: Loop, path: Path, share: Share, slabs: int) -> None:
    """Snapshot one share of the state into an arena of its own."""
    layout = loop.state.layout()
    with (
        ensure_arena(path, layout, replicas=share.count, slabs=slabs) as arena,
        Capture(arena, loop.state) as capture,
    ):
        capture.begin(STEP, GENERATION, share=share)
        capture.gate()


def digest(loop: Loop) -> str:
    """xxh3_128 (hex) of every live byte."""
    hasher = xxhash.xxh3_128()
    for tensor in loop.state.tensors():
        hasher.update(bytes_of(tensor))
    return hasher.hexdigest()


def measure(loop: Loop, kept: Kept, rounds: int) -> tuple[Seconds, list[str]]:
    """Each way in turn, over and over; seconds, and what went wrong."""
    ways = kept.ways()
    found: Seconds = {name: [] for name in ways}
    problems, right = list[str](), digest(loop)
    for number in range(-1, rounds):  # the first round warms up and is not counted
        for name in list(ways)[:: -1 if number % 2 else 1]:
            kept.prepare(name)
            with torch.no_grad():
                for tensor in loop.state.tensors():
                    tensor.zero_()
            spent = limits.seconds(ways[name])
            if digest(loop) != right:
                problems.append(f"{name} did not bring the state back")
            if number >= 0:
                found[name].append(spent)
                say(f"{name}: {spent:.3f} s")
    return found, problems


def report(
    found: Mapping[str, Sequence[float]],
    rebuild_s: Sequence[float],
    total_bytes: int,
    memcpy_s: float,
    problems: Sequence[str],
    computed: str,
    options: Mapping[str, object],
) -> Report:
    """The figures with goals; pure. A ratio is the median of the rounds' ratios."""
    middle = {name: statistics.median(spent) for name, spent in found.items()}

    def faster(way: str, than: str, at_least: float | None) -> Figure:
        pairs = zip(found[than], found[way], strict=True)
        return Figure(
            name=f"{than} / from {way}",
            value=statistics.median(theirs / ours for theirs, ours in pairs),
            unit="x",
            at_least=at_least,
            against=f"{middle[than]:.3f} s / {middle[way]:.3f} s",
        )

    return Report(
        name="restore",
        figures=[
            faster("arena", "dcp warm", 1.8),
            faster("arena", "dcp cold", 4.0),
            faster("peers", "dcp warm", None),
            faster("peers", "dcp cold", None),
            faster("parity", "dcp warm", 1.2),
            faster("parity", "dcp cold", None),
            faster("disk warm", "dcp warm", 1.0),
            faster("disk cold", "dcp cold", 1.0),
            Figure(name="of parity, the rebuild", value=statistics.median(rebuild_s), unit="s"),
            Figure(name="the limit: memcpy of the state, one thread", value=memcpy_s, unit="s",
                   against=f"{total_bytes / memcpy_s / 1e9:.1f} GB/s"),
        ],
        computed={"state": computed},
        problems=problems,
        options=dict(options),
        samples={name: list(spent) for name, spent in found.items()},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--mib", type=int, help="size of the state in MiB (1024; quick: 128)")
    made.add_argument("--rounds", type=int, help="rounds that count (5; quick: 2)")
    options = made.parse_args(argv)
    be_quiet()
    torch.set_num_threads(1)
    mib = options.mib or (128 if options.quick else 1024)
    loop = Loop(mib << 20, positions=8)
    memcpy_s = limits.memcpy_s(loop.state.tensors())
    with scratch("restore") as folder, ExitStack() as stack:
        kept = Kept(loop, folder, stack)
        found, problems = measure(loop, kept, options.rounds or (2 if options.quick else 5))
    computed = parameters_digest(loop.model)
    return finish(
        report(
            found, kept.rebuild_s[1:], loop.total_bytes, memcpy_s, problems, computed,
            vars(options),
        ),
        options,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
