"""The policy in simulation: a month on 1,000 nodes, against every fixed policy, by scenario.

Scenarios differ in how often nodes fail, how soon they are replaced, whether there are spares and
parity, and what a smaller world keeps. A fixed policy always does the same about a loss, and writes
checkpoints by the clock; there is one for each sensible order of ways and each of three intervals.
The figure is the policy's goodput beside that of the *best* of them in that scenario: nobody who
has to fix a policy beforehand knows which one that will be. As that one is picked afterwards, and has
nothing to learn, the difference is given with its standard error over the histories too.

    python -m benchmarks.policy [--titan FILE] [--quick] [--json] [--save]

Every history is played several times, with other draws of how far each loss reaches (`evenly`). Without `--titan` histories are synthetic; with it they are months of the Titan's GPU failures.
"""

import argparse
import hashlib
import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.fleet import Failure, Fixed, Month, Policy, Scenario, evenly, synthetic, titan
from ftkit.recovery.costs import Costs
from ftkit.recovery.policy import Option

NODES = 1_000
#: Standard errors within which a difference is luck.
NOISE = 2.0
#: Of goodput: two histories may by chance differ by the same to the last digit.
RESOLUTION = 1e-6

#: Seconds and bytes of a job that one could meet; nobody's own.
COSTS = Costs(
    world=NODES,
    step_s={NODES: 10.0},
    slots=8 * NODES,
    detect_s=5,
    regroup_s=2,
    grow_s=5,
    respawn_s=20,
    spare_s=8,
    restart_s=120,
    state_bytes=10e9,
    memory_bps=10e9,
    parity_bps=2e9,
    disk_bps=5e8,
    parity_block_s=0.02,
    parity_round_s=30,
    checkpoint_block_s=5,
    checkpoint_write_s=120,
    beyond_memory=0.05,
    beyond_parity=0.01,
)

#: What people fix beforehand, each with what it falls back on.
ORDERS = {
    "go on smaller": (Option.RESPAWN, Option.PARITY, Option.DISK),
    "never grow back": (Option.CONTINUE_SMALLER, Option.PARITY, Option.DISK),
    "wait": (Option.WAIT, Option.PARITY, Option.DISK),
    "spare, else smaller": (Option.SPARE, Option.RESPAWN, Option.PARITY, Option.DISK),
    "spare, else wait": (Option.SPARE, Option.WAIT, Option.PARITY, Option.DISK),
    "restart from memory": (Option.RESTART_MEMORY, Option.PARITY, Option.DISK),
    "restart from disk": (Option.DISK,),
}
SAVE_EVERY_S = (600.0, 3_600.0, 6 * 3_600.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One scenario: goodputs as means over its histories."""

    scenario: str
    policy: float
    best: float
    best_name: str
    worst: float
    failures: float
    taken: dict[str, int]
    fixed: dict[str, float]
    error: float
    """Standard error of the mean difference between the policy and the best."""

    @property
    def errors(self) -> float:
        """The policy less the best, in standard errors; 0 where one history tells of none."""
        return (self.policy - self.best) / max(self.error, RESOLUTION) if self.error else 0.0


def scenarios() -> Iterator[tuple[bool, Scenario]]:
    """Whether failures are frequent, and the scenario."""
    for often, quick, spares, parity in itertools.product(
        (False, True), (True, False), (0, 4), (True, False)
    ):
        names = [
            "frequent" if often else "rare",
            "quick" if quick else "slow",
            f"{spares} spares",
            "parity" if parity else "no parity",
        ]
        costs = replace(COSTS, replacement_s=120.0 if quick else 4 * 3_600.0)
        yield often, Scenario(name=", ".join(names), costs=costs, spares=spares, parity=parity)
    slow = replace(COSTS, replacement_s=4 * 3_600.0)
    yield True, Scenario(name="frequent, slow, one slot a node", costs=replace(slow, slots=NODES))
    yield (
        True,
        Scenario(name="frequent, slow, work divides evenly", costs=replace(slow, slots=None)),
    )
    dear = replace(slow, slots=None, grow_s=120, regroup_s=30)
    yield True, Scenario(name="frequent, slow, regrouping is dear", costs=dear)
    yield (
        True,
        Scenario(name="frequent, slow, 4 spares, rigid", costs=slow, spares=4, world_min=NODES),
    )


def judge(scenario: Scenario, histories: Sequence[Sequence[Failure]]) -> Result:
    """Play every history of a scenario by the policy, and by each fixed one."""
    played: dict[str, list[float]] = {}
    for (name, order), every_s in itertools.product(ORDERS.items(), SAVE_EVERY_S):
        policy = Fixed(name, order, every_s)
        played[policy.name] = [Month(scenario, policy).play(h) for h in histories]
    fixed = {name: statistics.fmean(goodputs) for name, goodputs in played.items()}
    months = [Month(scenario, Policy()) for _ in histories]
    ours = [month.play(h) for month, h in zip(months, histories, strict=True)]
    taken: dict[str, int] = {}
    for option, count in (item for month in months for item in month.taken.items()):
        taken[option.value] = taken.get(option.value, 0) + count
    best = max(fixed, key=lambda n: fixed[n])
    return Result(
        scenario=scenario.name,
        policy=statistics.fmean(ours),
        best=fixed[best],
        best_name=best,
        worst=min(fixed.values()),
        failures=statistics.fmean(len(h) for h in histories),
        taken=taken,
        fixed=fixed,
        error=_error([a - b for a, b in zip(ours, played[best], strict=True)]),
    )


def _error(values: Sequence[float]) -> float:
    """The standard error of their mean."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def report(results: Sequence[Result], options: argparse.Namespace, what: str) -> Report:
    """Figures of all scenarios; pure."""
    figures = [
        Figure(
            name=f"{r.scenario}: goodput, policy",
            value=r.policy,
            unit="",
            at_least=r.best,
            against=f"best fixed {r.best:.5f} ({r.best_name}), worst {r.worst:.5f}; "
            f"{(r.policy - r.best) * 1e5:+.1f} ± {r.error * 1e5:.1f} e-5",
        )
        for r in results
    ]
    least = min(r.policy / r.best for r in results)
    figures += [
        Figure(
            name="least of all scenarios: goodput of the policy / of the best fixed one",
            value=least,
            unit="x",
            at_least=1.0,
        ),
        Figure(
            name="least of all scenarios: the difference, in its standard errors over histories",
            value=min(r.errors for r in results),
            unit="",
            at_least=-NOISE,
        ),
        Figure(name="scenarios", value=float(len(results)), unit=""),
    ]
    by_name = {n: statistics.fmean(r.fixed[n] for r in results) for n in results[0].fixed}
    single = max(by_name, key=lambda n: by_name[n])
    notes = [
        f"Histories: {what}.",
        f"Best of the fixed ones over all scenarios: {single}, {by_name[single]:.5f} on average.",
        f"The policy on average: {statistics.fmean(r.policy for r in results):.5f}.",
        *(
            f"{r.scenario}: {r.failures:.0f} failures; taken "
            + ", ".join(f"{k} {v}" for k, v in sorted(r.taken.items()))
            for r in results
        ),
    ]
    digest = hashlib.sha256(repr([(r.scenario, r.policy, r.fixed) for r in results]).encode())
    return Report(
        name="policy",
        figures=figures,
        computed={"goodputs": digest.hexdigest()[:16]},
        notes=notes,
        options=vars(options) | {"titan": options.titan and options.titan.name},
        samples=[{"scenario": r.scenario, "policy": r.policy, "fixed": r.fixed} for r in results],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--titan", type=Path, help="gpu_events_until_2017.csv; default: synthetic")
    made.add_argument("--days", type=float, default=30.0, help="length of each history")
    made.add_argument("--histories", type=int, help="per scenario; default 12, 2 with --quick")
    made.add_argument("--draws", type=int, help="of each history; default 3, 1 with --quick")
    made.add_argument(
        "--seed", type=int, default=0, help="of the draws, and of synthetic histories"
    )
    options = made.parse_args(arguments)
    count = options.histories or (2 if options.quick else 12)
    draws = options.draws or (1 if options.quick else 3)
    histories: dict[bool, list[list[Failure]]] = {}
    for often in (False, True):
        if options.titan:
            histories[often] = [
                titan(options.titan, nodes=NODES, month=m, fold=often) for m in range(count)
            ]
        else:
            mtbf_s = 1.5 * 3_600 if often else 24 * 3_600.0
            histories[often] = [
                synthetic(seed, nodes=NODES, span_s=options.days * 86_400, mtbf_s=mtbf_s)
                for seed in range(options.seed, options.seed + count)
            ]
        histories[often] = evenly(histories[often] * draws, seed=options.seed)
    results = []
    for often, scenario in scenarios():
        scenario = replace(scenario, span_s=options.days * 86_400)
        results.append(judge(scenario, histories[often]))
        last = results[-1]
        say(f"{last.scenario}: {last.policy:.5f}, best fixed {last.best:.5f} ({last.best_name})")
    what = f"{count} months of Titan's GPU failures" if options.titan else f"{count} at random"
    what += f", each with {draws} draws of what its failures reach"
    return finish(report(results, options, what), options)


if __name__ == "__main__":
    sys.exit(main())
