"""Drills: one drill from start to end.

A drill is four parts: the fault (`drill_catalogue`), the schedule that a seed makes of it (pure,
`drill_plan`), the history (the run's event stream) and the checker (pure, `checker`). The disturbed run is compared with an
undisturbed one of the same job, which is run once and used by all drills of a series.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftkit.core.corruption_plan import to_environ as corruption_environ
from ftkit.core.fault_plan import KILL_COORDINATOR
from ftkit.core.pace_plan import to_environ as pace_environ
from ftkit.core.trace import Trace
from ftkit.launch import (
    detector_drills,
    number_drills,
    pace_drills,
    resource_drills,
    restart_drill,
    rot_drills,
)
from ftkit.launch.checker import Expectation, Outcome, check, expectation_of
from ftkit.launch.clean_drill import CLEAN, CleanStriker, judge_clean
from ftkit.launch.config import JobConfig, new_job_id
from ftkit.launch.drill_catalogue import (
    CHURN,
    CORRUPT_SHARD,
    FLAP,
    JOIN,
    LINK_FAULTS,
    LOSE_NODES,
    NAMES,
    NOBODY_LOST,
    NODE_FAULTS,
    PARTITION_HALF,
    SHRINK_GROW,
    SPARE,
    STAGE_LOST,
    STRIKES,
    TWO_AT_ONCE,
)
from ftkit.launch.drill_faults import PREEMPT
from ftkit.launch.drill_job import Job
from ftkit.launch.drill_plan import Drill
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail
from ftkit.launch.link_drills import APART_STALL_S, LinkStriker, judge_link
from ftkit.launch.member_drills import (
    MemberStriker,
    Preempter,
    judge_join,
    judge_preempt,
    judge_shrink_grow,
    judge_spare,
    judge_stage_lost,
)
from ftkit.launch.node_drills import NodeStriker
from ftkit.launch.rot_drills import ALL_NODES, CHECKPOINT
from ftkit.launch.store_drills import Witness
from ftkit.recovery.protocol import SHARDS_BACK


def run_drill(
    drill: Drill,
    job: Job,
    reference: list[dict[str, Any]] | None,
    run_dir: Path,
    *,
    on_poll: Callable[[Engine], None] | None = None,
) -> tuple[Outcome, list[dict[str, Any]]]:
    """Do one drill and judge it. Blocks. Returns the outcome and the disturbed run's events."""
    if drill.fault in restart_drill.CATALOGUE:
        return restart_drill.run_restart(drill, job, reference, run_dir)
    witness, settings = Witness(run_dir), dict[str, Any]()
    of_nodes = {*resource_drills.CATALOGUE, *detector_drills.CATALOGUE}
    if drill.store_fault is not None or drill.fault in of_nodes:
        # A node is what is struck, so that what is left of the job is worth a look.
        job = job if job.nodes > 1 else replace(job, nodes=job.nproc, nproc=1)
    if drill.store_fault is not None:
        settings = witness.settings(drill.store_fault, job.steps)
    if drill.corruption is not None:
        settings = {"env": corruption_environ([drill.corruption])}
        if job.script is None:
            job = replace(job, workload=(*job.workload, *number_drills.workload(drill.corruption)))
    job_id = new_job_id()
    striker: Callable[[Engine], None] | None = None
    ends = contextlib.ExitStack()
    if drill.fault == KILL_COORDINATOR:
        striker = CoordinatorKiller(drill.step, run_dir).poll
    elif drill.mixed is not None and drill.mixed.coordinator_step is not None:
        striker = CoordinatorKiller(drill.mixed.coordinator_step, run_dir).poll
    elif drill.fault == PREEMPT:
        job = job if job.nodes > 1 else replace(job, nodes=job.nproc, nproc=1)
        striker = Preempter(drill, job, run_dir).poll
    elif drill.fault in NODE_FAULTS:
        striker = NodeStriker(drill, job, job_id, run_dir).poll
    elif drill.fault in (FLAP, JOIN, CHURN):
        striker = MemberStriker(drill, job, run_dir).poll
    elif drill.fault in LINK_FAULTS:
        if drill.fault == PARTITION_HALF:
            job = job if job.nodes > 1 else replace(job, nodes=job.nproc, nproc=1)
            job = replace(job, max_stall_s=min(job.max_stall_s, APART_STALL_S))
        links = LinkStriker(drill, job, run_dir)
        ends.callback(links.close)
        striker, settings = links.poll, links.settings
    elif drill.fault in resource_drills.CATALOGUE:
        around = resource_drills.ResourceStriker(
            drill.fault,
            seat=drill.seat,
            step=drill.step,
            seed=drill.seed,
            nodes=job.nodes,
            run_dir=run_dir,
            shm=JobConfig(job=job_id, command=("-",)).shm_dir(drill.seat // job.nproc),
        )
        ends.callback(around.close)
        striker, settings = around.poll, around.settings
    elif drill.fault in detector_drills.CATALOGUE:
        shm = JobConfig(job=job_id, command=("-",)).shm_dir(drill.seat // job.nproc)
        blinded = detector_drills.DetectorStriker(
            drill.place, seat=drill.seat, step=drill.step, run_dir=run_dir, shm=shm
        )
        ends.callback(blinded.close)
        striker = blinded.poll
        job = replace(job, max_stall_s=min(job.max_stall_s, detector_drills.MAX_STALL_S))
    elif drill.place in (CHECKPOINT, ALL_NODES):
        rot = rot_drills.RotStriker(
            seed=drill.seed,
            nodes=job.nodes,
            steps=job.steps,
            run_dir=run_dir,
            rots=drill.place == CHECKPOINT,
        )
        striker, settings = rot.poll, rot.settings
    elif drill.fault == TWO_AT_ONCE or drill.fault in pace_drills.CATALOGUE:
        assert drill.pace is not None, "somebody loses time"
        settings = {"env": pace_environ(drill.pace)}
    elif drill.fault == CLEAN:
        job = job if job.nodes > 1 else replace(job, nodes=job.nproc, nproc=1)
        clean = CleanStriker(
            node=drill.seat // job.nproc, nproc=job.nproc, steps=job.steps, run_dir=run_dir
        )
        ends.callback(clean.close)
        striker, settings = clean.poll, clean.settings

    def poll(engine: Engine) -> None:
        if striker is not None:
            striker(engine)
        witness.poll()
        if on_poll is not None:
            on_poll(engine)

    with ends:
        _, events = job.run(
            run_dir, faults=drill.faults(), on_poll=poll, job_id=job_id, settings=settings
        )
    outcome = check(events, reference, _expected(drill, job, reference or events))
    return _judge(outcome, drill, job, events, witness), events


def _judge(
    outcome: Outcome, drill: Drill, job: Job, events: list[dict[str, Any]], witness: Witness
) -> Outcome:
    """What the rules of its own add to what holds for every drill; pure."""
    if drill.store_fault is not None:
        return witness.judge(outcome, events, seat=drill.seat)
    if drill.fault == JOIN:
        return judge_join(outcome, events)
    if drill.fault == SHRINK_GROW:
        return judge_shrink_grow(outcome, events, job.world_size)
    if drill.fault == PREEMPT:
        return judge_preempt(outcome, events)
    if drill.fault == SPARE:
        return judge_spare(outcome, events)
    if drill.fault == STAGE_LOST:
        return judge_stage_lost(outcome, events, job.world_size)
    if drill.fault in LINK_FAULTS:
        return judge_link(outcome, drill, job.world_size, events)
    if drill.corruption is not None:
        return number_drills.judge(outcome, events, drill.corruption)
    if drill.fault in resource_drills.CATALOGUE:
        return resource_drills.judge(outcome, events, drill.seat)
    if drill.fault in detector_drills.CATALOGUE:
        return detector_drills.judge(outcome, events, place=drill.place, seat=drill.seat)
    if drill.place == CHECKPOINT:
        return rot_drills.judge(outcome, events)
    if drill.place == ALL_NODES:
        return rot_drills.judge_all_nodes(outcome, events)
    if drill.fault == TWO_AT_ONCE:
        assert drill.second_seat is not None, "two ranks are hit"
        return pace_drills.judge_two(outcome, events, killed=drill.seat, slowed=drill.second_seat)
    if drill.fault == CLEAN:
        return judge_clean(outcome, events, accusing=pace_drills.ACCUSING)
    if drill.fault in pace_drills.CATALOGUE:
        assert drill.pace is not None, "somebody loses time"
        return pace_drills.judge_pace(outcome, events, drill.pace)
    return outcome


def _expected(drill: Drill, job: Job, events: list[dict[str, Any]]) -> Expectation:
    """What the checker is to hold a run against; `events` are of the job undisturbed, if any."""
    told = expectation_of(events)
    return Expectation(
        fault=drill.fault,
        phase=drill.where,
        seed=drill.seed,
        world_size=job.world_size,
        spares=job.spares * job.nodes,
        # A script of the user's sets its own sizes; its undisturbed run tells them.
        steps=told.steps if job.script else job.steps,
        slots=told.slots if job.script else job.slots,
        slot_size=told.slot_size if job.script else job.slot_size,
        evicts=drill.fault not in NOBODY_LOST,
        loses_all=drill.fault in (LOSE_NODES, CORRUPT_SHARD)
        or drill.place in (CHECKPOINT, ALL_NODES),
        corrupts=drill.fault == CORRUPT_SHARD,
        alters=drill.corruption is not None and number_drills.alters(drill.corruption),
        strikes=drill.mixed.count if drill.mixed else STRIKES.get(drill.fault, 1),
        steps_back=SHARDS_BACK if job.sharded or job.stages or job.zero else 0,
        names=NAMES.get(drill.fault, frozenset()),
    )


class CoordinatorKiller:
    """Kills the coordinator once the job has committed `step`."""

    def __init__(self, step: int, run_dir: Path) -> None:
        self._step = step
        self._run_dir = run_dir
        self._tail = EventTail(run_dir)
        self._done = False

    def poll(self, engine: Engine) -> None:
        """Strike when it is time. Called while the job runs."""
        if self._done:
            return
        reached = any(e["kind"] == "commit" and e["step"] >= self._step for e in self._tail.poll())
        if reached:
            self._done = True
            with Trace(self._run_dir / "events" / f"drill-{os.getpid()}.jsonl") as trace:
                trace.event("drill", fault=KILL_COORDINATOR, phase="any", step=self._step)
            engine.kill_coordinator()
