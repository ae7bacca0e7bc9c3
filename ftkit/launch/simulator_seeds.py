"""Many seeds of the simulator, over the processors of this machine, and what came of them.

python -m ftkit.launch.simulator --seeds 10000 --json
python -m ftkit.launch.simulator --seeds 20 --ranks 10000
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from ftkit.launch.simulator import SimulatedEnd, Simulation
from ftkit.launch.simulator_checks import SimulationFailure

#: Where it is watched, a line tells so often how far it is.
TELLS_EVERY_S = 10.0
#: Of so many seeds that fail, the whole story is told.
STORIES = 3


@dataclass(slots=True, kw_only=True)
class Played:
    """What came of the seeds that were played."""

    seeds: int = 0
    ranks: int = 0
    """Of all the jobs together."""
    largest: int = 0
    """Ranks of the largest job."""
    events: int = 0
    faults: int = 0
    restarts: int = 0
    worlds: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    """How often a job ended with which exit code."""
    verdicts: Counter[str] = field(default_factory=Counter)
    violations: dict[int, str] = field(default_factory=dict)
    """What each seed that fails says."""

    def add(self, seed: int, outcome: SimulatedEnd | str) -> None:
        """One more seed has been played."""
        self.seeds += 1
        if isinstance(outcome, str):
            self.violations[seed] = outcome
            return
        self.ranks += outcome.ranks
        self.largest = max(self.largest, outcome.ranks)
        self.events += outcome.events
        self.faults += outcome.faults
        self.restarts += outcome.restarts
        self.worlds += outcome.worlds
        self.codes[outcome.stop.code] += 1
        self.verdicts.update({fault.value: count for fault, count in outcome.verdicts.items()})

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"codes": dict(self.codes), "verdicts": dict(self.verdicts)}

    def __str__(self) -> str:
        return (
            f"{self.seeds} seeds, {len(self.violations)} violations; {self.ranks} ranks, at most "
            f"{self.largest} in a job; {self.faults} faults struck, {self.restarts} processes were "
            f"replaced, {self.worlds} worlds issued; jobs ended with {dict(sorted(self.codes.items()))}"
        )


def play(task: tuple[int, int | None]) -> tuple[int, SimulatedEnd | str]:
    """Play one seed, with so many ranks where they are given; what it says where it fails."""
    seed, ranks = task
    try:
        return seed, Simulation(seed, ranks=ranks).run()
    except SimulationFailure as failure:
        return seed, str(failure)


def play_all(
    seeds: range, *, ranks: int | None, processes: int
) -> Iterator[tuple[int, SimulatedEnd | str]]:
    """Play seeds, in any order; each is answered as it ends."""
    tasks = [(seed, ranks) for seed in seeds]
    if processes < 2:
        yield from map(play, tasks)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=logging.disable) as pool:
        yield from pool.imap_unordered(play, tasks, chunksize=1 if ranks else 20)


def main(arguments: list[str] | None = None) -> int:
    """The command line: one seed, or many. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ftkit.launch.simulator", description="Play whole jobs from seeds."
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to play")
    parser.add_argument("--ranks", type=int, help="ranks of every job (default: by seed, a few)")
    parser.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="how many to play at once (default: as many as there are processors)",
    )
    parser.add_argument("--json", action="store_true", help="say what came of it as JSON")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="print every event of one seed"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.processes < 1 or (options.ranks or 1) < 1:
        parser.error("--seeds, --ranks and --processes are at least 1")
    if options.verbose and (options.seeds > 1 or options.json):
        parser.error("-v shows one seed, for people: give it without --seeds and --json")
    seeds = range(options.seed, options.seed + options.seeds)
    processes = min(options.processes, options.seeds)
    if options.verbose:
        return _show(options.seed, options.ranks)
    logging.disable()
    played = Played()
    told = time.monotonic()
    for seed, outcome in play_all(seeds, ranks=options.ranks, processes=processes):
        played.add(seed, outcome)
        if isinstance(outcome, str) and len(played.violations) <= STORIES:
            print(outcome, file=sys.stderr)
        if time.monotonic() - told > TELLS_EVERY_S:
            told = time.monotonic()
            print(f"{played.seeds} of {len(seeds)}: {played}", file=sys.stderr, flush=True)
    print(json.dumps(played.to_json(), indent=1) if options.json else played)
    return 1 if played.violations else 0


def _show(seed: int, ranks: int | None) -> int:
    try:
        print(Simulation(seed, ranks=ranks, verbose=True).run())
    except SimulationFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0
