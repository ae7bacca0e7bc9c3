"""What it costs to record a collective, in microseconds of the issuing thread.

gloo's all-reduce of 1 KiB in a world of one, so that no peer's wake-up is in it: plain, and as
`ftkit run` has an unchanged script's groups recorded. Each in child processes that take turns;
the least of many repeats of each. Beside it the recorder alone, begin and end.

    python -m benchmarks.recording [--quick] [--json] [--save]
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.figures import Figure, Report, finish, parser
from ftkit.core.clock import MonotonicClock
from ftkit.core.ids import MemberId
from ftkit.detection.recorder import Recorder
from ftkit.detection.status import BOARD, StatusBoard

CALLS = 2000
GOAL_US = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, help="children of each kind (5; quick: 1)")
    made.add_argument("--child", choices=("plain", "recorded", "alone"), help="one measurement")
    options = made.parse_args(argv)
    if options.child is not None:
        print(_child(options.child))
        return 0
    rounds = options.rounds or (1 if options.quick else 5)
    least = dict.fromkeys(("plain", "recorded", "alone"), float("inf"))
    for _ in range(rounds):
        for kind in least:
            command = [sys.executable, "-m", "benchmarks.recording", "--child", kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            least[kind] = min(least[kind], float(done.stdout.split()[-1]))
    added = least["recorded"] - least["plain"]
    figures = [
        Figure(name="gloo all-reduce, plain", value=least["plain"], unit="us"),
        Figure(name="added by recording it", value=added, unit="us", at_most=GOAL_US),
        Figure(name="recorder alone, begin and end", value=least["alone"], unit="us"),
    ]
    report = Report(name="recording", figures=figures, computed={}, options=vars(options))
    return finish(report, options)


def _child(kind: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        board = StatusBoard.create(Path(folder) / BOARD, seats=1)
        recorder = Recorder(board.attach(0, MemberId(0)), MonotonicClock())
        if kind == "alone":

            def alone(number: int) -> None:
                recorder.enter(0, number, "all_reduce sum float32", 1024)
                recorder.leave(0, number, True)

            return _least(alone)

        import torch
        import torch.distributed as dist

        from ftkit.collectives import recorded

        if kind == "recorded":
            recorded.install(lambda: recorder)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        tensor = torch.ones(256)
        found = _least(lambda number: dist.all_reduce(tensor))
        dist.destroy_process_group()
        return found


def _least(call: Callable[[int], object]) -> float:
    """Microseconds of this thread's processor time a call, the least of 15 repeats."""
    least, number = float("inf"), 0
    for _ in range(15):
        began = time.thread_time_ns()
        for _ in range(CALLS):
            call(number)
            number += 1
        least = min(least, (time.thread_time_ns() - began) / CALLS / 1e3)
    return round(least, 2)


if __name__ == "__main__":
    sys.exit(main())
