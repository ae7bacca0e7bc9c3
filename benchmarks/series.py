"""A series: fault after fault on jobs of one size, until enough were repaired and counted.

First the size of a slot is chosen so that the job's median step comes near a wanted time on
this machine; then one undisturbed job gives the parameters that every disturbed one must end
with, bit for bit; then jobs with planned faults (`faults`).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.faults import Repair, follow, median_step, plan_faults, steps_for
from benchmarks.figures import say
from benchmarks.jobs import Job, params_of
from ftkit.core.fault_plan import Kind

#: Steps of a job that only looks how long a step takes.
PROBE_STEPS = 40

#: Looks at how long a step takes, at most; each is a job of its own.
PROBES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What a series found."""

    nproc: int
    slot_size: int
    step_s: float
    """Median step of the undisturbed job."""
    repairs: Sequence[Repair]
    """The faults that count."""
    not_counted: Sequence[Repair]
    """Faults that struck before the job had healed from the one before."""
    params: str
    """Digest of the undisturbed job's final parameters."""
    problems: Sequence[str]


def run_series(
    job: Job, folder: Path, *, kinds: Sequence[Kind], runs: int, gap: int, seed: int, step_s: float
) -> Series:
    """Run one series. Blocks for minutes; tells what it does on stderr.

    Args:
      job: its ranks, slots and `max_stall_s`; steps and slot size are chosen here.
      folder: a new folder under which runs are kept.
      kinds: the faults.
      runs: how many of them are to be counted.
      gap: steps between two faults of a job.
      seed: decides faults, seats, phases and moments.
      step_s: the step wanted; 0 takes the job's slot size as it is.

    Raises:
      JobFailed: a job did not end well.
    """
    rng = random.Random(f"{seed} {job.nproc} {[k.value for k in kinds]}")
    folder.mkdir(parents=True)
    if step_s:
        job = replace(job, slot_size=choose_slot_size(job, folder, step_s))
    # All jobs of a series have the same steps, so that they end in the same parameters.
    job = replace(job, steps=steps_for(min(runs, job.nproc), gap))
    reference = job.run(folder / "reference")
    (params,) = params_of(reference)
    median_s = median_step(reference, size=job.nproc)
    say(
        f"{job.nproc} ranks: undisturbed step {median_s * 1e3:.1f} ms, {job.slot_size} samples a slot"
    )

    counted, set_aside, problems = list[Repair](), list[Repair](), list[str]()
    jobs_max = 2 * -(-runs // job.nproc)
    for number in range(jobs_max):
        if len(counted) >= runs:
            break
        wanted = min(job.nproc, runs - len(counted))
        faults = plan_faults(rng, kinds, nproc=job.nproc, count=wanted, gap=gap)
        events = job.run(folder / f"job-{number}", faults=faults)
        found = follow(events, nproc=job.nproc)
        if params_of(events) != {params}:
            problems.append(
                f"{job.nproc} ranks, job {number}: parameters {sorted(params_of(events))} are "
                f"not the undisturbed run's {params}"
            )
        for repair in found:
            (counted if repair.whole else set_aside).append(repair)
            if repair.whole and repair.repair_s is None:
                problems.append(f"{job.nproc} ranks, job {number}: never repaired: {repair}")
        say(f"{job.nproc} ranks: {len(counted)} of {runs} faults repaired")
    if len(counted) < runs:
        problems.append(
            f"{job.nproc} ranks: only {len(counted)} of {runs} faults struck a whole world in "
            f"{jobs_max} jobs; give a larger --gap than {gap} steps"
        )
    return Series(
        nproc=job.nproc,
        slot_size=job.slot_size,
        step_s=median_s,
        repairs=counted,
        not_counted=set_aside,
        params=params,
        problems=problems,
    )


def choose_slot_size(job: Job, folder: Path, step_s: float) -> int:
    """The slot size whose median step is nearest to `step_s` on this machine. Blocks."""
    size, tried = job.slot_size, dict[int, float]()
    for _ in range(PROBES):
        probe = replace(job, steps=PROBE_STEPS, slot_size=size)
        tried[size] = median_step(probe.run(folder / f"probe-{size}"), size=job.nproc)
        say(f"{job.nproc} ranks: {size} samples a slot take {tried[size] * 1e3:.1f} ms a step")
        size = next_size(tried, step_s)
        if size in tried:
            break
    return min(tried, key=lambda s: abs(tried[s] - step_s))


def next_size(tried: dict[int, float], step_s: float) -> int:
    """The slot size to try next, by the straight line through what was tried; pure."""
    if len(tried) == 1:
        ((size, took_s),) = tried.items()
        return max(1, round(size * step_s / took_s))
    near = sorted(tried, key=lambda s: abs(tried[s] - step_s))[:2]
    (a, b) = sorted(near)
    slope = (tried[b] - tried[a]) / (b - a)
    if slope <= 0:
        return near[0]  # noise is larger than the difference: the nearer one is good enough
    return max(1, round(a + (step_s - tried[a]) / slope))
