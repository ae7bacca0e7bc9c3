"""Faults of whole nodes: who is struck, and how. The drills that parity has to survive."""

import os
import random
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.parity.buffer import ParityHead, data_offset, read_head
from ftkit.checkpoint.stripes import Place, StripePlan
from ftkit.core.errors import FtkitError, IntegrityError
from ftkit.core.ids import NodeId
from ftkit.core.process_stat import all_stopped
from ftkit.core.trace import Trace
from ftkit.launch.config import JobConfig
from ftkit.launch.drill_catalogue import LOSE_NODES
from ftkit.launch.drill_faults import LOSE_NODE
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import Drill
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail

#: With all ranks frozen, what is published changes no more after so long.
SETTLED_S = 1.5
#: A rank that has not stopped so long after it was told to is waiting in the kernel.
STOPS_WITHIN_S = 30.0


class NodeStriker:
    """Loses nodes once the job has committed the drill's step and parity has been published."""

    def __init__(self, drill: Drill, job: Job, job_id: str, run_dir: Path) -> None:
        self._drill, self._job, self._run_dir = drill, job, run_dir
        self._config = JobConfig(job=job_id, command=("-",), nodes=job.nodes, nproc=job.nproc)
        self._tail = EventTail(run_dir)
        self._ranks: dict[int, tuple[int, int]] = {}
        """The member in each seat, and its process."""
        self._reached = False
        self._published = not job.parity
        self._told_at: float | None = None
        """When the ranks were first told to stop."""
        self._frozen_at: float | None = None
        """When all of them had."""
        self._done = False

    def poll(self, engine: Engine) -> None:
        """Strike when it is time. Called while the job runs."""
        if self._done:
            return
        for event in self._tail.poll():
            self._take(event)
        if self._told_at is None:
            if not (self._reached and self._published):
                return
            if len(self._ranks) < self._job.world_size:
                return  # somebody is being replaced
            if self._drill.fault == LOSE_NODE:
                seats = [s for s in self._ranks if s // self._job.nproc in self._drill.nodes]
                self._strike(engine, self._drill.nodes, seats)
                return
            self._told_at = time.monotonic()
        if not self._freeze(self._told_at):
            return
        if self._frozen_at is None:
            self._frozen_at = time.monotonic()
        if self._drill.fault == LOSE_NODES:
            self._strike(engine, self._drill.nodes, list(self._ranks))
        elif time.monotonic() - self._frozen_at > SETTLED_S:
            self._strike(engine, self._corrupt(), list(self._ranks))

    def _take(self, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "spawn":
                self._ranks[event["seat"]] = event["member"], event["pid"]
            case "exit" if self._ranks.get(event["seat"], (None,))[0] == event["member"]:
                del self._ranks[event["seat"]]
            case "commit":
                self._reached = self._reached or event["step"] >= self._drill.step
            case "parity":
                self._published = True

    def _strike(self, engine: Engine, nodes: tuple[int, ...], seats: list[int]) -> None:
        self._done = True
        with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
            for seat in seats:
                trace.event(
                    "drill",
                    fault=self._drill.fault,
                    phase="any",
                    seat=seat,
                    member=self._ranks[seat][0],
                    step=self._drill.step,
                )
        for node in nodes:
            engine.kill_node(node)
        if self._drill.fault != LOSE_NODE:
            self._signal([pid for _, pid in self._ranks.values()], signal.SIGKILL)

    def _freeze(self, told_at: float) -> bool:
        """Whether all ranks are stopped; those that are not are told to, and whoever replaced one.

        So that none sees another go, and commits, votes or repairs the world on its own.

        FtkitError: one does not stop.
        """
        running = {s: pid for s, (_, pid) in self._ranks.items() if not all_stopped(pid)}
        if running and time.monotonic() - told_at > STOPS_WITHIN_S:
            raise FtkitError(
                f"the ranks in seats {sorted(running)} were told to stop {STOPS_WITHIN_S:.0f} s ago "
                "and still run, or wait in the kernel for a device: nothing was struck"
            )
        self._signal(running.values(), signal.SIGSTOP)
        return not running

    def _signal(self, pids: Iterable[int], number: signal.Signals) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it ended with its node

    def _corrupt(self) -> tuple[int, ...]:
        """Flip a bit in one node's part, and one in another's parity; who is to be lost."""
        rng = random.Random(self._drill.seed)
        heads = {node: newest_parity(self._config, node) for node in range(self._job.nodes)}
        stripes = heads[0][1].stripes
        lost, data, parity = pick_victims(stripes.plan, rng)
        piece = stripes.plan.stripes[data.stripe].data[data.shard]
        span = rng.choice(piece.spans)
        part = stripes.parts[piece.node][span.part]
        arena = self._config.shm_dir(piece.node) / part.arena
        with Arena.open(arena) as opened:
            at = opened.data_offset(opened.find(part.step, part.generation)) + span.at
        flip_bit(arena, at + rng.randrange(span.count), rng)
        stripe = stripes.plan.stripes[parity.stripe]
        path, head = heads[stripe.nodes[parity.shard]]
        at = data_offset(path) + head.shards[parity][0]
        flip_bit(path, at + rng.randrange(stripe.length), rng)
        return (lost,)


def pick_victims(plan: StripePlan, rng: random.Random) -> tuple[NodeId, Place, Place]:
    """Who is lost, which piece rots and which parity shard: each in another stripe; pure.

    FtkitError: more would be lost than parity makes up for.
    """
    if plan.m < 2:
        raise FtkitError(
            "parity is too thin for this drill: a stripe may lose a node and a shard, so m is 2 "
            "or more"
        )
    places = [
        Place(number, shard)
        for number, stripe in enumerate(plan.stripes)
        for shard in range(len(stripe.nodes))
        if stripe.shard_bytes(shard)
    ]
    k = [len(stripe.data) for stripe in plan.stripes]
    data = rng.choice([p for p in places if p.shard < k[p.stripe]])
    parity = rng.choice([p for p in places if p.shard >= k[p.stripe] and p.stripe != data.stripe])
    hurt = {plan.stripes[p.stripe].nodes[p.shard] for p in (data, parity)}
    lost = rng.choice(sorted({n for group in plan.groups for n in group} - hurt))
    return lost, data, parity


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
