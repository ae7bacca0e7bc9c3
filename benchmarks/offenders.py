"""Leaving out nodes that fail again and again, over the history of Titan's 18,688 GPUs.

The rule that `ftkit doctor offenders` advises by is replayed event by event, as `ftkit detect replay
--format titan` does it; at no moment is anything known of the future, and a slot that is left out
never comes back. Beside it, over the same events: leave a slot out after 1, 2 or 3 faults within
30 days.

    python -m benchmarks.offenders --titan ../shared/data/titan_gpu/gpu_events_until_2017.csv
"""

import argparse
import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import Figure, Report, finish, parser
from ftkit.detection.offender_replay import Replayed, replay
from ftkit.detection.offenders import DAY_S, OffenderConfig
from ftkit.launch.titan import read_titan

#: The goals: of all events avoided, of all slots left out.
AVOIDED, LEFT_OUT = 0.07, 0.005


def main(argv: Sequence[str] | None = None) -> int:
    """Replay and print. Returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--titan", type=Path, required=True, help="the history, as CSV")
    options = made.parse_args(argv)
    faults, slots = read_titan(options.titan)
    done = replay(faults, slots, OffenderConfig())
    plain = {n: within(faults, n) for n in (1, 2, 3)}
    return finish(report(done, plain, options), options)


def within(faults: Sequence[tuple[float, str]], count: int) -> tuple[int, int]:
    """(events avoided, slots left out) by the rule of so many faults in 30 days."""
    recent: dict[str, deque[float]] = defaultdict(deque)
    out, avoided = set[str](), 0
    for at, slot in faults:
        if slot in out:
            avoided += 1
            continue
        seen = recent[slot]
        seen.append(at)
        while at - seen[0] > 30 * DAY_S:
            seen.popleft()
        if len(seen) >= count:
            out.add(slot)
    return avoided, len(out)


def report(
    done: Replayed, plain: dict[int, tuple[int, int]], options: argparse.Namespace
) -> Report:
    """The figures; pure."""
    figures = [
        Figure(name="events", value=done.faults, unit=""),
        Figure(
            name="events avoided", value=100 * done.avoided_share, unit="%", at_least=100 * AVOIDED
        ),
        Figure(
            name="slots left out",
            value=100 * done.left_out_share,
            unit="%",
            at_most=100 * LEFT_OUT,
            against="ever, of 18,688",
        ),
        Figure(name="time of all slots left out", value=100 * done.node_time_share, unit="%"),
    ]
    for count, (avoided, out) in plain.items():
        figures += [
            Figure(
                name=f"{count} in 30 days: avoided", value=100 * avoided / done.faults, unit="%"
            ),
            Figure(name=f"{count} in 30 days: left out", value=100 * out / done.nodes, unit="%"),
        ]
    return Report(
        name="offenders",
        figures=figures,
        computed={"slots left out": str(len(done.left_out))},
        options={**vars(options), "titan": options.titan.name},
        samples={"left_out": list(done.left_out)},
    )


if __name__ == "__main__":
    sys.exit(main())
