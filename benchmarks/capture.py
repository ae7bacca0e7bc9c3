"""How close does capture come to the memory's own speed?

The state of a GPT is captured over and over, digests included, and in turn the machine copies the
same tensors as fast as it can: the limit is one thread's memcpy, a call for each tensor, into a
shared mapping all of whose pages are there; and the same with an xxh3 of every MiB behind it,
which is the work that capture does. ::

    beside     the capture thread alone: from `begin` until the snapshot is sealed, while the
               training thread sleeps; against one thread
    at once    the gate follows `begin` at once, so that the training thread copies too: the
               worst that a step can pay; against two threads, as far as there are two cores

    python -m benchmarks.capture [--mib 1024] [--rounds 9] [--quick] [--json] [--save]
"""

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks import limits
from benchmarks.figures import Figure, Report, finish, parser, percentile, say
from benchmarks.jobs import scratch
from benchmarks.saving import Captured, Loop, broken_snapshot, captured
from ftkit.checkpoint.arena import SHM
from ftkit.core.ids import Generation, Step

Seconds = dict[str, list[float]]


def measure(loop: Loop, way: Captured, rounds: int) -> Seconds:
    """Each kind in turn, over and over; in seconds."""
    found: Seconds = {
        kind: [] for kind in ("memcpy", "memcpy + digest", "memcpy, 2 threads", "beside", "at once")
    }
    capture = way.capture
    pieces = limits.pieces_of(loop.state.tensors())
    with (
        limits.memory(pieces) as whole,
        limits.memory(pieces[::2]) as left,
        limits.memory(pieces[1::2]) as right,
        ThreadPoolExecutor(2) as pool,
    ):
        for number in range(-1, rounds):  # the first round warms up and is not counted
            once = {
                "memcpy": limits.seconds(whole.copy),
                "memcpy + digest": limits.seconds(whole.copy_and_digest),
                "memcpy, 2 threads": limits.seconds(
                    lambda: list(pool.map(lambda memory: memory.copy(), (left, right)))
                ),
                "beside": _beside(way),
                "at once": _begin(way) + capture.gate(),
            }
            if number >= 0:
                for kind, spent in once.items():
                    found[kind].append(spent)
    for kind, all_spent in found.items():
        say(f"{kind}: {loop.total_bytes / min(all_spent) / 1e9:.2f} GB/s at best")
    return found


def _begin(way: Captured) -> float:
    return way.capture.begin(Step(way.capture.snapshots + 1), Generation(1))


def _beside(way: Captured) -> float:
    """Seconds until a snapshot is sealed, with nobody to help the capture thread."""
    seen = way.capture.snapshots
    _begin(way)
    while seen + 1 not in way.arena.sealed_steps():
        time.sleep(0.002)  # much shorter than what is waited for, and next to no work
    way.capture.gate()
    assert way.capture.last is not None, "the gate has counted it"
    return way.capture.last.sealed_after_s


def report(
    found: Mapping[str, Sequence[float]],
    total_bytes: int,
    problems: Sequence[str],
    computed: str,
    options: Mapping[str, object],
) -> Report:
    """The figures with goals; pure. Of each kind the best time: noise only ever adds."""
    best = {kind: min(seconds) for kind, seconds in found.items()}

    def figure(kind: str, limit: str, at_least: float | None) -> Figure:
        return Figure(
            name=f"capture {kind} / {limit}", value=best[limit] / best[kind], unit="x",
            at_least=at_least,
            against=f"{total_bytes / best[kind] / 1e9:.2f} of "
            f"{total_bytes / best[limit] / 1e9:.2f} GB/s",
        )  # fmt: skip

    middle = percentile(found["beside"], 50)
    return Report(
        name="capture",
        figures=[
            figure("beside", "memcpy", 0.9),
            figure("beside", "memcpy + digest", 0.9),
            figure("at once", "memcpy", 0.9),
            figure("at once", "memcpy, 2 threads", None),
            Figure(name="capture beside, p50", value=middle, unit="s",
                   against=f"{total_bytes / 1e9:.2f} GB"),
        ],
        computed={"state": computed},
        problems=problems,
        notes=[f"{len(os.sched_getaffinity(0))} cores; capture makes an xxh3 of every MiB"],
        options=dict(options),
        samples={kind: list(seconds) for kind, seconds in found.items()},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--mib", type=int, help="size of the state in MiB (1024; quick: 128)")
    made.add_argument("--rounds", type=int, help="times each is done (9; quick: 3)")
    options = made.parse_args(argv)
    torch.set_num_threads(1)
    mib = options.mib or (128 if options.quick else 1024)
    loop = Loop(mib << 20)
    with (
        scratch("capture") as folder,
        captured(loop, SHM / f"{folder.name}-0.arena") as way,
    ):
        found = measure(loop, way, options.rounds or (3 if options.quick else 9))
        problem = broken_snapshot(way, loop)
        sealed = way.arena.newest()
        assert sealed is not None, "broken_snapshot looked at it"
        with way.arena.data(sealed) as data:
            computed = hashlib.sha256(data).hexdigest()
    problems = [problem] if problem else []
    return finish(report(found, loop.total_bytes, problems, computed, vars(options)), options)


if __name__ == "__main__":
    sys.exit(main())
