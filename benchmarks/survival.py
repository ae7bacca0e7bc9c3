"""What survives? Nodes lost, processes killed and bits flipped by chance, every byte compared.

The stories are those that the tests tell (`tests.checkpoint.survival`), told by the hundred::

    nodes      random patterns of nodes that vanish together, up to m of each group, of five
               codes and sizes of cluster, with real arenas, parity and byte servers
    trainers   SIGKILL at any moment of a loop that saves every step. What is recovered is the
               newest sealed snapshot, and equals training that was never disturbed. A few kills
               of the same loop with dcp.async_save tell how much newer its newest save was than
               what it had on disk
    bits       one bit flipped in an arena, in parity, in a checkpoint with its manifest and record
    writers    SIGKILL at any system call of a save, half-written files among them

Every figure counts what went wrong: an assertion that failed ends its story.

    python -m benchmarks.survival [--losses 1000] [--kills 100] [--places 200] [--writers 200]
                                  [--seed 0] [--quick] [--json] [--save]
"""

import logging
import mmap
import random
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import scratch
from benchmarks.saving import be_quiet
from ftkit.checkpoint.arena import SHM
from tests.checkpoint.helpers import Training
from tests.checkpoint.survival import (
    PROGRESS,
    Kills,
    flip_in_arena,
    flip_in_parity,
    flip_on_disk,
    kill_trainers,
    kill_writers,
    killed_somewhere,
    lose_nodes,
)

_T = TypeVar("_T")


class Stories:
    """Tells stories one after another, and keeps what went wrong in which."""

    def __init__(self) -> None:
        self.broken = dict[str, str]()

    def tell(self, name: str, story: Callable[[], _T]) -> _T | None:
        """What a story found; None when it broke off."""
        try:
            found = story()
        except AssertionError as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            self.broken[name] = f"{name}: {at.line} ({at.filename}:{at.lineno}): {error}"
            say(self.broken[name])
            return None
        say(f"{name}: {found}")
        return found


def dcp_behind(folder: Path, times: int, seed: int) -> list[int]:
    """Kill a loop that saves every step by dcp.async_save; by how many saves its disk is behind."""
    rng = random.Random(seed)
    behind = list[int]()
    for number in range(times):
        where = folder / str(number)
        where.mkdir()
        _, begun = killed_somewhere(lambda told, where=where: _train(where, told), rng)  # type: ignore[misc]
        whole = [int(p.name) for p in where.iterdir() if (p / ".metadata").exists()]
        behind.append(begun - max(whole, default=0))
    return behind


def _train(folder: Path, told: mmap.mmap) -> None:
    """Train for ever; tell the step of the save begun last. One save at a time, as DCP asks."""
    training, step = Training(seed=1), 0
    state = {"model": training.model.state_dict()}
    PROGRESS.pack_into(told, 0, 0, 0)
    while True:
        step += 1
        training.train(step)
        saved = async_save(state, checkpoint_id=folder / str(step), no_dist=True)
        PROGRESS.pack_into(told, 0, step - 1, step)
        saved.result()  # type: ignore[union-attr]


def report(
    counts: dict[str, int],
    noticed: dict[str, int | None],
    kills: Kills | None,
    behind: Sequence[int],
    stories: Stories,
    options: dict[str, object],
) -> Report:
    """The figures with goals; pure."""

    def failed(name: str, what: str, against: str) -> Figure:
        return Figure(name=what, value=float(name in stories.broken), unit="failures",
                      at_most=0, against=against)  # fmt: skip

    figures = [
        failed("nodes", "patterns of nodes lost, within m", f"{counts['losses']} patterns"),
        failed("trainers", "newest sealed snapshot not recovered", f"{counts['kills']} kills"),
        failed("writers", "unreadable, or silently wrong, after a writer's death",
               f"{counts['writers']} deaths"),
    ]  # fmt: skip
    figures += [
        Figure(name=f"flipped bits not noticed: {tier}",
               value=None if found is None else float(counts["places"] - found),
               unit="bits", at_most=0, against=f"{counts['places']} places")
        for tier, found in noticed.items()
    ]  # fmt: skip
    if kills is not None:
        figures.append(
            Figure(name="kills that cost the newest save begun: ftkit",
                   value=kills.newest_lost / kills.kills, unit="x",
                   against=f"{kills.torn} of {kills.kills} struck while one was being written")
        )  # fmt: skip
    figures.append(
        Figure(name="the same: dcp.async_save", unit="x",
               value=sum(b > 0 for b in behind) / len(behind) if behind else None,
               against=f"{len(behind)} kills")
    )  # fmt: skip
    told = {name: name not in stories.broken for name in ("nodes", "trainers", "writers")}
    return Report(
        name="survival",
        figures=figures,
        computed={"every byte compared": ", ".join(n for n, whole in told.items() if whole)},
        problems=list(stories.broken.values()),
        options=options,
        samples={"counts": counts, "noticed": noticed, "dcp behind": list(behind)},
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--losses", type=int, help="patterns of nodes lost (1000; quick: 50)")
    made.add_argument("--kills", type=int, help="trainers killed (100; quick: 10)")
    made.add_argument("--places", type=int, help="bits flipped in each tier (200; quick: 20)")
    made.add_argument("--writers", type=int, help="writers killed (200; quick: 20)")
    made.add_argument("--dcp", type=int, help="trainers with DCP killed (10; quick: 2)")
    made.add_argument("--seed", type=int, default=0, help="decides all moments and places")
    options = made.parse_args(argv)
    counts = {
        name: getattr(options, name) or (few if options.quick else many)
        for name, many, few in (
            ("losses", 1000, 50), ("kills", 100, 10), ("places", 200, 20), ("writers", 200, 20),
            ("dcp", 10, 2),
        )
    }  # fmt: skip
    be_quiet()
    torch.set_num_threads(1)
    logging.getLogger("ftkit").setLevel(logging.ERROR)  # damage is what this is about
    stories, seed = Stories(), options.seed
    with scratch("survival") as folder, scratch("survival", SHM) as memory:
        # Processes are forked first, while this one has no threads that they would miss.
        kills = stories.tell(
            "trainers", lambda: kill_trainers(memory / "arena", counts["kills"], seed)
        )
        (folder / "dcp").mkdir()
        behind = stories.tell(
            "dcp.async_save", lambda: dcp_behind(folder / "dcp", counts["dcp"], seed)
        )
        stories.tell("writers", lambda: kill_writers(memory, counts["writers"], seed))
        stories.tell("nodes", lambda: lose_nodes(memory, counts["losses"], seed))
        (memory / "parity").mkdir()
        places = counts["places"]
        noticed = {
            "arena": stories.tell(
                "arena", lambda: flip_in_arena(memory / "flipped", places, seed)
            ),
            "parity": stories.tell(
                "parity", lambda: flip_in_parity(memory / "parity", places, seed)
            ),
            "disk": stories.tell("disk", lambda: flip_on_disk(places, seed)),
        }  # fmt: skip
    return finish(report(counts, noticed, kills, behind or (), stories, vars(options)), options)


if __name__ == "__main__":
    sys.exit(main())
