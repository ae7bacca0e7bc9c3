"""SIGKILL to a process that holds memory: when its lifeline, its socket and its pidfd say so.

A lifeline is let go of before the kernel frees the memory, the others after it (docs/decisions,
21). All three are watched at once, in this process, for the same kill.

    python -m benchmarks.exits [--gigabytes 0.1 1 4] [--kills 20] [--quick] [--json] [--save]
"""

import json
import os
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from benchmarks.figures import Figure, Report, finish, parser, say
from ftkit.core.lifeline_watch import LifelineWatch

#: Fills its memory, tells its lifeline over the socket it was given, and waits.
VICTIM = """
import json, socket, sys, time
from ftkit.core import lifeline
memory = bytearray(b"x") * int(float(sys.argv[2]) * 1e9)
told = lifeline.own()
end = socket.socket(fileno=int(sys.argv[1]))
end.sendall(json.dumps(told and told._asdict()).encode() + b"\\n")
time.sleep(1000)
"""
#: Nobody looks longer than this for one end.
LIMIT_S = 30.0
GOAL_S = 0.05


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--gigabytes", type=float, nargs="+", default=[0.1, 1.0, 4.0])
    made.add_argument("--kills", type=int, help="of each size (20; quick: 3)")
    options = made.parse_args(argv)
    kills = options.kills or (3 if options.quick else 20)
    figures, problems, codes = list[Figure](), list[str](), set[str]()
    for size in options.gigabytes:
        found: dict[str, list[float]] = {"lifeline": [], "socket": [], "pidfd": []}
        for _ in range(kills):
            seen, code = _kill_one(size)
            codes.add(str(code))
            problems += [f"{size:g} GB: {how} said nothing" for how in found if how not in seen]
            for how, seconds in seen.items():
                found[how].append(seconds)
        if not all(found.values()):
            continue
        middle = {how: statistics.median(all_of) * 1e3 for how, all_of in found.items()}
        say(f"{size:g} GB: " + ", ".join(f"{how} {ms:.1f} ms" for how, ms in middle.items()))
        figures += _figures(size, found)
    report = Report(
        name="exits",
        figures=figures,
        computed={"exit codes": " ".join(sorted(codes))},
        problems=problems,
        options=vars(options),
    )
    return finish(report, options)


def _figures(size: float, found: dict[str, list[float]]) -> list[Figure]:
    middle = {how: statistics.median(all_of) for how, all_of in found.items()}
    late = max(found["lifeline"])
    return [
        Figure(name=f"{size:g} GB: lifeline, p50", value=middle["lifeline"], unit="s"),
        Figure(name=f"{size:g} GB: lifeline, latest", value=late, unit="s", at_most=GOAL_S),
        Figure(name=f"{size:g} GB: end of the socket, p50", value=middle["socket"], unit="s"),
        Figure(name=f"{size:g} GB: pidfd, p50", value=middle["pidfd"], unit="s"),
        Figure(
            name=f"{size:g} GB: lifeline / end of the socket",
            value=middle["lifeline"] / middle["socket"], unit="x", at_most=1.0,
        ),
    ]  # fmt: skip


def _kill_one(gigabytes: float) -> tuple[dict[str, float], int | None]:
    """Seconds from the kill until each says so, and the code that the lifeline told."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-c", VICTIM, str(theirs.fileno()), str(gigabytes)]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    told = json.loads(ours.makefile().readline())
    pidfd = os.pidfd_open(process.pid)
    seen, codes = dict[str, float](), list[int | None]()

    def note(how: str) -> None:
        seen[how] = time.monotonic()

    def ends(code: int | None) -> None:
        note("lifeline")
        codes.append(code)

    def await_end(how: str, fd: int) -> Callable[[], None]:
        return lambda: note(how) if select.select([fd], [], [], LIMIT_S)[0] else None

    watch = LifelineWatch()
    watch.watch(told, ends)
    threads = [
        threading.Thread(target=await_end("socket", ours.fileno())),
        threading.Thread(target=await_end("pidfd", pidfd)),
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.1)  # all are waiting by now
    killed = time.monotonic()
    process.kill()
    for thread in threads:
        thread.join()
    process.wait()
    watch.close()
    ours.close()
    os.close(pidfd)
    return {how: at - killed for how, at in seen.items()}, codes[0] if codes else None


if __name__ == "__main__":
    sys.exit(main())
