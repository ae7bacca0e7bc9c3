"""Between a Ray Train worker and its ranks: the function they run, and what they report.

The worker got the function from Ray, and a rank is no process of Ray's. It is handed over in a file
in the node's folder of shared memory, which nobody but this user can open: it comes from the
machine's own worker, never from the network. Run as a program, this is what each rank runs.
"""

import os
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path

FUNCTION = "train-function"
REPORTS = "reports.sock"
#: Of a report: what fits into one datagram everywhere.
REPORT_BYTES_MAX = 60_000

#: Workers get their function as soon as all agents listen; one that never does has ended.
HANDED_LATEST_S = 300.0


def hand_over(folder: Path, function: bytes) -> None:
    """(worker) Leave a pickled function without arguments where this node's ranks look for it.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    part = folder / f"{FUNCTION}.part"
    part.write_bytes(function)
    part.replace(folder / FUNCTION)


def take_over(folder: Path, latest_s: float = HANDED_LATEST_S) -> Callable[[], object]:
    """(rank) The function that was handed over. Blocks until it is there.

    Raises:
      TimeoutError: nobody handed one over within `latest_s`.
    """
    path, deadline = folder / FUNCTION, time.monotonic() + latest_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"the Ray Train worker handed no function to its ranks within {latest_s:g} s: wrap "
                "train_loop_per_worker in ftkit.integrations.ray_train.in_ranks"
            )
        time.sleep(0.02)
    function: Callable[[], object] = pickle.loads(path.read_bytes())
    return function


def newest(sock: socket.socket) -> bytes | None:
    """(worker) The newest of the reports that wait; None when none comes within the timeout."""
    data = None
    try:
        data = sock.recv(REPORT_BYTES_MAX)
        while True:
            data = sock.recv(REPORT_BYTES_MAX, socket.MSG_DONTWAIT)
    except (TimeoutError, BlockingIOError):
        return data


if __name__ == "__main__":
    take_over(Path(os.environ["FTKIT_SHM_DIR"]))()
