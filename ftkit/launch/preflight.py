"""Pre-flight: looks whether this node can carry a job. Every check says what it found, in numbers.

Run by `ftkit doctor`, and by every agent before a job that was started with `--preflight`. A node's
results are kept as JSON lines, and the next ones are compared with them.
"""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from ftkit.core.errors import ProtocolError
from ftkit.detection.node_health import Check, Health, NodeResult, against_history
from ftkit.launch import self_check
from ftkit.launch.whole_file import write_whole

#: What the disk is tried with, and what has to be free afterwards, on disk and in shared memory.
DISK_BYTES, FREE_BYTES_MIN = 32 << 20, 256 << 20
#: Two local processes that import torch and reduce a tensor get this long.
TORCH_S = 90.0
#: Two clocks of one machine may drift apart by so much in a second.
DRIFT = 0.01
#: They are read so often, and so many seconds apart.
READS, APART_S = 9, 0.1
#: Results kept in a history; the file is cut when it has twice as many.
KEPT = 256


def processors() -> Check:
    """Processors this process may use, and how busy they are."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    busy = load > 2 * cores
    return Check(
        name="cpu",
        health=Health.WARNING if busy else Health.OK,
        value=float(cores),
        note=f"{cores} cores, load {load:.1f}" + (": others use this node" if busy else ""),
    )


def shared_memory(root: Path) -> Check:
    """Room for snapshots."""
    try:
        usage = shutil.disk_usage(root)
    except OSError as error:
        return Check(name="shm", health=Health.FAILED, note=f"{root}: {error}")
    share = usage.total / psutil.virtual_memory().total
    enough = usage.free >= FREE_BYTES_MIN
    return Check(
        name="shm",
        health=Health.OK if enough else Health.FAILED,
        value=usage.free / 1e9,
        note=f"{usage.free / 1e9:.2f} GB of {usage.total / 1e9:.2f} free in {root}, "
        f"{100 * share:.0f} % of the machine's memory"
        + ("" if enough else "; in a container, give it more with --shm-size"),
    )


def disk(folder: Path) -> Check:
    """Write, sync, and see what is left."""
    data = np.random.default_rng(0).bytes(DISK_BYTES)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            began = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
            # What is still in memory says nothing of the disk.
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            same = file.read() == data
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check(name="disk", health=Health.FAILED, note=f"{folder}: {error}")
    speed = DISK_BYTES / seconds / 1e6
    good = same and free >= FREE_BYTES_MIN
    return Check(
        name="disk",
        health=Health.OK if good else Health.FAILED,
        value=round(speed, 1),
        unit="MB/s",
        note=f"writes {speed:.0f} MB/s in {folder}, {free / 1e9:.1f} GB free"
        + ("" if same else "; what was read is not what was written"),
    )


def clock() -> Check:
    """Whether time goes on, and evenly: the monotonic clock against the wall clock."""
    stamps = [time.monotonic_ns() for _ in range(1000)]
    back = any(b < a for a, b in itertools.pairwise(stamps))
    before, before_error = _ahead()
    began = time.monotonic()
    time.sleep(APART_S)
    after, after_error = _ahead()
    passed = time.monotonic() - began
    drift = abs(after - before) / passed
    # What may come of how they were read is no drift.
    good = not back and drift - (before_error + after_error) / passed < DRIFT
    return Check(
        name="clock",
        health=Health.OK if good else Health.FAILED,
        note=(
            "the monotonic clock went back"
            if back
            else f"the wall clock and the monotonic clock differ by {1e3 * drift:.3g} ms a second"
        ),
    )


def _ahead() -> tuple[float, float]:
    """(how far the wall clock is ahead of the monotonic one, how wrong that may be), seconds.

    The wall clock is read between two readings of the other: of several the closest pair counts,
    for between two of them the process may have been put off its core.
    """
    reads = [(time.monotonic(), time.time(), time.monotonic()) for _ in range(READS)]
    first, wall, last = min(reads, key=lambda read: read[2] - read[0])
    return wall - (first + last) / 2, (last - first) / 2


def network() -> Check:
    """Whether this machine's own name leads to it, and loopback carries bytes."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), 2.0) as near,
            server.accept()[0] as far,
        ):
            near.sendall(b"ftkit")
            good = far.recv(5) == b"ftkit"
    except OSError as error:
        return Check(name="network", health=Health.FAILED, note=f"loopback: {error}")
    name = socket.gethostname()
    try:
        where = socket.gethostbyname(name)
    except OSError as error:
        # Addresses may be given in numbers: no job needs the name.
        return Check(name="network", health=Health.WARNING, note=f"{name} has no address: {error}")
    return Check(
        name="network",
        health=Health.OK if good else Health.FAILED,
        note=f"{name} is {where}; between nodes: ftkit doctor network",
    )


def torch_and_gpus() -> list[Check]:
    """Two processes reduce a tensor by gloo, and each GPU multiplies; with two, NCCL as well."""
    command = [sys.executable, "-m", "ftkit.launch.torch_check"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TORCH_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        note = f"two processes did not reduce a tensor within {TORCH_S:g} s"
        return [Check(name="torch", health=Health.FAILED, note=note)]
    except OSError as error:
        note = f"the check could not be started: {error}"
        return [Check(name="torch", health=Health.FAILED, note=note)]
    try:
        found = json.loads(done.stdout.splitlines()[-1])
        return list(NodeResult.from_json({"node": "", "at": 0.0, "checks": found}).checks)
    except (ValueError, IndexError, ProtocolError):
        note = "the check ended early: " + (done.stderr.strip().splitlines() or ["no word"])[-1]
    return [Check(name="torch", health=Health.FAILED, note=note)]


def check_node(folder: Path, shm_root: Path, *, torch: bool = True) -> NodeResult:
    """Everything. Blocks for some seconds, most of them torch's import.

    Args:
      folder: on the disk to try.
      shm_root: where snapshots will be.
      torch: whether to try torch, and GPUs.
    """
    checks = [
        processors(),
        self_check.gemm(),
        self_check.memory(),
        shared_memory(shm_root),
        disk(folder),
        network(),
        clock(),
    ]
    if torch:
        checks += torch_and_gpus()
    return NodeResult(node=socket.gethostname(), at=time.time(), checks=tuple(checks))


def compared(found: NodeResult, history: Path | None) -> NodeResult:
    """`found` against what `history` holds of this node; it is added there. OSError."""
    if history is None:
        return found
    before = read_history(history)
    result = against_history(found, before)
    # What is kept is what was found: a warning must not become its own excuse.
    history.parent.mkdir(parents=True, exist_ok=True)
    with history.open("a") as file:
        file.write(json.dumps(found.to_json()) + "\n")
    if len(before) >= 2 * KEPT:
        lines = [json.dumps(r.to_json()) + "\n" for r in [*before, found][-KEPT:]]
        write_whole(history, "".join(lines))
    return result


def read_history(path: Path) -> list[NodeResult]:
    """The results in a file of JSON lines, the oldest first. What is none is left out."""
    found: list[NodeResult] = []
    try:
        lines: Sequence[str] = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            found.append(NodeResult.from_json(json.loads(line)))
        except (ValueError, ProtocolError):
            continue  # cut short by a crash, or another version's
    return found


def main(argv: Sequence[str]) -> int:
    """Check this node and print the result. Arguments: a folder on the disk to try, and shm root."""
    folder, shm_root = argv
    print(json.dumps(check_node(Path(folder), Path(shm_root)).to_json()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
