"""The whole job, simulated from seeds: nothing wrong is ever committed, and every job goes on or ends.

Protocol, detectors, budget and votes are the product's own; clock, network and processes are
simulated, and each seed draws the size of a job and what strikes it. A step committed in two ways, a
sample that counts twice or not at all, a step lost again, a job that stands still though it could go
on: each is a violation, and its seed plays it again::

    python -m ftkit.launch.simulator --seed SEED --verbose

Many seeds with a few ranks each, and some of the largest jobs: a seed with 10,000 ranks takes a
minute.

    python -m benchmarks.simulation [--quick] [--json] [--save]
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence

from benchmarks.figures import Figure, Report, finish, parser, say
from ftkit.launch.simulator_seeds import TELLS_EVERY_S, Played, play_all


def main(argv: Sequence[str] | None = None) -> int:
    """Play and print. Returns the exit code."""
    options = _options(argv)
    logging.disable()
    few = _played(range(options.seed, options.seed + options.seeds), None)
    large = _played(range(options.seed, options.seed + options.large), options.ranks)
    return finish(report(few, large, vars(options)), options)


def report(few: Played, large: Played, options: dict[str, object]) -> Report:
    """The figures; pure."""
    figures = list[Figure]()
    for name, played in (("a few ranks", few), (f"{large.largest} ranks", large)):
        against = (
            f"{played.faults} faults, {played.restarts} processes replaced, "
            f"{played.worlds} worlds, {played.events} events"
        )
        figures += [
            Figure(name=f"seeds, {name}", value=played.seeds, unit=""),
            Figure(
                name=f"violations, {name}",
                value=len(played.violations),
                unit="",
                at_most=0,
                against=against,
            ),
        ]
    return Report(
        name="simulation",
        figures=figures,
        computed={
            f"seed {seed}, {name}": story
            for name, played in (("few", few), ("large", large))
            for seed, story in played.violations.items()
        },
        options=options,
        samples={"few": few.to_json(), "large": large.to_json()},
    )


def _played(seeds: range, ranks: int | None) -> Played:
    processes = min(len(seeds), len(os.sched_getaffinity(0)))
    played, told = Played(), time.monotonic()
    for seed, outcome in play_all(seeds, ranks=ranks, processes=processes):
        played.add(seed, outcome)
        if time.monotonic() - told > TELLS_EVERY_S:
            told = time.monotonic()
            say(f"{played.seeds} of {len(seeds)}: {played}")
    return played


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    wanted = parser(__doc__)
    wanted.add_argument("--seeds", type=int, help="jobs of a few ranks (10,000; quick: 100)")
    wanted.add_argument("--large", type=int, help="jobs of --ranks (10; quick: 1)")
    wanted.add_argument("--ranks", type=int, help="ranks of a large job (10,000; quick: 200)")
    wanted.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    options = wanted.parse_args(argv)
    for name, usual, quick in (("seeds", 10_000, 100), ("large", 10, 1), ("ranks", 10_000, 200)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
        if getattr(options, name) < 1:
            wanted.error(f"--{name} is at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
