"""The toy through torchft 0.2.0: one replica group of one process, in torchft's own environment.

python -m benchmarks.toy_torchft INDEX REPLICAS STEPS ROWS LIGHTHOUSE PORT KILL_AT PATCHED
"""

import os
import signal
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torchft  # type: ignore[import-not-found]  # only in its own environment
from torch import nn, optim
from torchft.process_group import ProcessGroupGloo  # type: ignore[import-not-found]

from benchmarks.toy import BLOCKS, Noise, build, digest, loss_of, note, optimizer_of

#: A collective that takes longer has failed; torchft's examples use values like it.
GROUP_TIMEOUT = timedelta(seconds=5)


def patched_hook(
    manager: torchft.Manager,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # public, not listed
) -> torch.futures.Future[torch.Tensor]:
    """Do as torchft's own hook, with a finished future where the reduction failed.

    The stock hook (torchft/ddp.py, `_comm_hook`) then asserts on a future that
    `_ManagedWork.wait` did not make, and every survivor dies. The manager has noted the
    error and does not commit the step, so what is in the bucket does not matter.
    """
    work = manager.allreduce(bucket.buffer())
    if work.wait():
        future = work.get_future()
        # A _ManagedFuture wraps the one that DDP can wait for; a _DummyWork's is one.
        inner: torch.futures.Future[torch.Tensor] | None = getattr(future, "_fut", future)
        if inner is not None:
            return inner
    finished: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    finished.set_result(bucket.buffer())
    return finished


class Replica:
    """A replica group of one process, and what trains in it. All begin with the same parameters."""

    def __init__(
        self,
        plain: nn.Module,
        optimizer: optim.Optimizer,
        *,
        index: int,
        lighthouse: str,
        timeout: timedelta,
    ) -> None:
        """Join those at `lighthouse`, as replica `index`; `timeout` is a collective's."""

        def load(state: dict[str, dict[str, Any]]) -> None:
            plain.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])

        def save() -> dict[str, dict[str, Any]]:
            return {"model": plain.state_dict(), "optimizer": optimizer.state_dict()}

        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # public, not listed
        self.manager = torchft.Manager(
            pg=ProcessGroupGloo(timeout=timeout),
            load_state_dict=load,
            state_dict=save,
            min_replica_size=1,
            timeout=timedelta(seconds=30),
            rank=0,
            world_size=1,
            store_addr="127.0.0.1",
            store_port=self._store.port,
            lighthouse_addr=lighthouse,
            replica_id=f"toy_{index}",
            hostname="127.0.0.1",
            init_sync=False,
        )
        self.model = torchft.DistributedDataParallel(self.manager, plain)
        self.optimizer = torchft.Optimizer(self.manager, optimizer)


def main(argv: list[str]) -> None:
    """Train; `KILL_AT` is the step at which this replica kills itself, 0 for never."""
    index, replicas, steps, rows = map(int, argv[:4])
    lighthouse, port, kill_at, patched = argv[4], int(argv[5]), int(argv[6]), argv[7] == "1"
    if patched:
        torchft.DistributedDataParallel._comm_hook = staticmethod(patched_hook)
    plain = build()
    replica = Replica(
        plain, optimizer_of(plain), index=index, lighthouse=lighthouse, timeout=GROUP_TIMEOUT
    )
    manager, model, optimizer = replica.manager, replica.model, replica.optimizer
    data = Noise(rows)

    def strike(gradient: torch.Tensor) -> None:
        # The first layer's gradient comes last: the bucket is full, its reduction is next.
        if kill_at and manager.current_step() >= kill_at:
            note("kill", step=manager.current_step() + 1)
            os.kill(os.getpid(), signal.SIGKILL)

    next(plain.parameters()).register_hook(strike)
    # All replicas begin together, so that none has to be brought up to the others' step.
    start = dist.TCPStore("127.0.0.1", port, replicas, is_master=index == 0)  # type: ignore[attr-defined]  # public, not listed
    while manager.current_step() < steps:
        before = manager.current_step()
        optimizer.zero_grad()
        loss_of(model, data[(before * replicas + index) % BLOCKS]).backward()
        optimizer.step()
        if manager.current_step() > before:
            note("commit", step=manager.current_step())
        else:
            note("aborted", step=before + 1)
    note("final", params=digest(plain))
    manager.shutdown()
    del start


if __name__ == "__main__":
    main(sys.argv[1:])
    # Its servers' threads would outlive the main thread.
    sys.stdout.flush()
    os._exit(0)
