"""Faults of whole nodes: who is struck, and how. The drills that parity has to survive."""

import os
import random
import signal
import time
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import Any

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.parity.buffer import ParityHead, data_offset, read_head
from ftkit.checkpoint.stripes import StripePlan
from ftkit.core.errors import FtkitError, IntegrityError
from ftkit.core.ids import NodeId
from ftkit.core.trace import Trace, read_run
from ftkit.launch.config import JobConfig
from ftkit.launch.drills import CORRUPT_SHARD, LOSE_NODE, Drill, Job
from ftkit.launch.engine import Engine

#: With all ranks frozen, what is published changes no more after so long.
SETTLED_S = 1.5


class NodeStriker:
    """Loses nodes once the job has committed the drill's step and parity has been published."""

    def __init__(self, drill: Drill, job: Job, job_id: str, run_dir: Path) -> None:
        self._drill, self._job, self._run_dir = drill, job, run_dir
        self._config = JobConfig(job=job_id, command=("-",), nodes=job.nodes, nproc=job.nproc)
        self._frozen_at: float | None = None
        self._done = False

    def poll(self, engine: Engine) -> None:
        """Strike when it is time. Called while the job runs."""
        if self._done:
            return
        events = read_run(self._run_dir)
        ranks = _running(events)
        if self._frozen_at is None:
            reached = any(e["kind"] == "commit" and e["step"] >= self._drill.step for e in events)
            published = any(e["kind"] == "parity" for e in events)
            # Step 1 may be published while the ranks go on to the next without each other.
            trained = published or not self._job.parity
            if not (reached and trained and len(ranks) == self._job.world_size):
                return
            if self._drill.fault == LOSE_NODE:
                self._tell(ranks, [s for s in ranks if s // self._job.nproc in self._drill.nodes])
                self._strike(engine, {})
                return
            # So that none sees another go, and commits or votes on its own.
            _signal(ranks.values(), signal.SIGSTOP)
            self._frozen_at = time.monotonic()
        if self._drill.fault == CORRUPT_SHARD:
            if time.monotonic() - self._frozen_at < SETTLED_S:
                return
            lost = self._corrupt()
        else:
            lost = self._drill.nodes
        self._tell(ranks, ranks)
        self._strike(engine, ranks, lost)

    def _strike(
        self, engine: Engine, ranks: dict[int, int], lost: tuple[int, ...] | None = None
    ) -> None:
        self._done = True
        for node in self._drill.nodes if lost is None else lost:
            engine.kill_node(node)
        _signal(ranks.values(), signal.SIGKILL)

    def _tell(self, ranks: dict[int, int], seats: Iterable[int]) -> None:
        members = {e["seat"]: e["member"] for e in _spawns(read_run(self._run_dir))}
        with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
            for seat in seats:
                trace.event(
                    "drill",
                    fault=self._drill.fault,
                    phase="any",
                    seat=seat,
                    member=members[seat],
                    pid=ranks[seat],
                    step=self._drill.step,
                )

    def _corrupt(self) -> tuple[int, ...]:
        """Flip a bit in one node's part, and one in another's parity; who is to be lost."""
        rng = random.Random(self._drill.seed)
        heads = {node: newest_parity(self._config, node) for node in range(self._job.nodes)}
        path, head = heads[0]
        stripes = head.stripes
        lost, data, parity = pick_victims(stripes.plan, sorted(stripes.parts), rng)
        part = stripes.parts[data][0]
        arena = self._config.shm_dir(data) / part.arena
        with Arena.open(arena) as opened:
            at = opened.data_offset(opened.find(part.step, part.generation))
        flip_bit(arena, at + rng.randrange(part.bytes), rng)
        path, head = heads[parity]
        (first, _), place = max((spot, place) for place, spot in head.shards.items())
        length = stripes.plan.stripes[place.stripe].length
        flip_bit(path, data_offset(path) + first + rng.randrange(max(1, length)), rng)
        return (lost,)


def pick_victims(
    plan: StripePlan, nodes: list[NodeId], rng: random.Random
) -> tuple[NodeId, NodeId, NodeId]:
    """Who is lost, whose part rots and whose parity, so that no stripe lacks more than m; pure.

    FtkitError: there is no such choice.
    """
    choices = list(permutations(nodes, 3))
    rng.shuffle(choices)
    for lost, data, parity in choices:
        short = (
            sum(
                1
                for shard, node in enumerate(stripe.nodes)
                if stripe.shard_bytes(shard)
                and (
                    node == lost
                    or (node == data and shard < len(stripe.data))
                    or (node == parity and shard >= len(stripe.data))
                )
            )
            for stripe in plan.stripes
        )
        has_data = any(p.node == data and p.count for s in plan.stripes for p in s.data)
        if has_data and all(count <= plan.m for count in short):
            return lost, data, parity
    raise FtkitError(
        "parity is too thin for this drill: a lost node and two corrupt shards need m=2"
    )


def newest_parity(config: JobConfig, node: int) -> tuple[Path, ParityHead]:
    """The newest parity in a node's shared memory. FtkitError when there is none."""
    found = list[tuple[Path, ParityHead]]()
    for path in config.shm_dir(node).glob("*.parity"):
        try:
            found.append((path, ParityHead.parse(read_head(path), NodeId(node))))
        except IntegrityError:
            continue  # being made
    if not found:
        raise FtkitError(f"node {node} has no parity yet; is the job long enough?")
    return max(found, key=lambda f: f[1].stripes.round)


def flip_bit(path: Path, at: int, rng: random.Random) -> None:
    """Flip one bit of a byte of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def _running(events: list[dict[str, Any]]) -> dict[int, int]:
    """The process of each seat, of those that have not ended."""
    ended = {e["member"] for e in events if e["kind"] == "exit"}
    return {e["seat"]: e["pid"] for e in _spawns(events) if e["member"] not in ended}


def _spawns(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in events if e["kind"] == "spawn"]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue  # it ended with its node
