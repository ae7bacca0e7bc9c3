"""The task through NVIDIA's resiliency extension, in-process restart, in an environment of its own.

The wrapped function goes back to the newest DCP checkpoint, on the ranks that are left. The times
are those that restart soonest and hold together: gloo's limit below the soft one, below the hard.
"""

import os
from datetime import timedelta

import torch.distributed as dist
from nvidia_resiliency_ext import inprocess  # type: ignore[import-not-found]  # its own environment

from benchmarks.beside.checkpoints import ByDCP
from benchmarks.beside.ddp import train
from benchmarks.beside.task import StepLog, Task, leave

TASK = Task.from_environ()
LOG = StepLog(TASK, int(os.environ["RANK"]))
PORT = int(os.environ["MASTER_PORT"])
OFTEN = timedelta(seconds=0.2)


@inprocess.Wrapper(  # type: ignore[untyped-decorator]
    monitor_thread_interval=OFTEN,
    monitor_process_interval=OFTEN,
    progress_watchdog_interval=OFTEN,
    heartbeat_interval=OFTEN,
    last_call_wait=OFTEN,
    heartbeat_timeout=timedelta(seconds=2 * TASK.stall_s),
    soft_timeout=timedelta(seconds=1.5 * TASK.stall_s),
    hard_timeout=timedelta(seconds=2 * TASK.stall_s),
)
def restarted(call_wrapper: inprocess.CallWrapper | None = None) -> None:
    """Train in a group of its own: each restart has another port, as its guide says."""
    assert call_wrapper is not None, "the wrapper gives itself"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, not listed
        "127.0.0.1", PORT + 1 + call_wrapper.iteration, world, is_master=rank == 0
    )
    limit = timedelta(seconds=TASK.stall_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    LOG.final(train(TASK, LOG, ByDCP()))
    dist.destroy_process_group()


if __name__ == "__main__":
    restarted()
    leave()
