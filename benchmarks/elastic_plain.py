"""The same FSDP2 job without ftkit: torchrun restarts it, and it loads its DCP checkpoint.

Rank 1 of the first attempt kills itself in the forward pass of a step. A checkpoint of each step
is written before, so that nothing has to be played again: the peer at its best. Rank 0 prints
one JSON line a commit, of every rank's clock: `step`, `attempt`, `at` (monotonic seconds).

    torchrun --nproc-per-node 4 --max-restarts 1 -m benchmarks.elastic_plain FOLDER KILL_AT MODEL...
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from ftkit.launch.workload.gpt import GPT, next_byte_loss
from ftkit.launch.workload.text import ByteWindows, load_text
from ftkit.launch.workload.train import parse, shard


def main(argv: list[str]) -> None:
    """Train a few steps past the kill. `argv`: a folder, the step to kill in, the job's options."""
    folder, kill_at, options = Path(argv[0]), int(argv[1]), parse(argv[2:])
    torch.set_num_threads(options.threads)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    # The agent's store outlives the attempt, and gloo would find the addresses of the dead in it.
    agents = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, False)
    store = PrefixStore(f"attempt-{attempt}", agents)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    dataset = ByteWindows(load_text(None, bytes_max=1 << 20), context=options.model.context)
    model = GPT(options.model, seed=options.seed)
    shard(model, init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, foreach=False)

    done = 0
    if attempt:
        done = kill_at - 1
        states, moments = get_state_dict(model, optimizer)
        dcp.load({"model": states, "optimizer": moments}, checkpoint_id=str(folder / f"{done}"))
        set_state_dict(model, optimizer, model_state_dict=states, optim_state_dict=moments)
    while done < kill_at + 1:
        done += 1
        for slot in range(rank, options.slots, size):
            samples = [dataset[done * options.slots + slot + i] for i in range(options.slot_size)]
            x, y = (torch.stack(part) for part in zip(*samples, strict=True))
            if done == kill_at and not attempt and rank == 1:
                (folder / "killed").write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGKILL)
            next_byte_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        (folder / f"commit-{attempt}-{rank}-{done}").write_text(str(time.monotonic()))
        if not attempt and done == kill_at - 1:
            states, moments = get_state_dict(model, optimizer)
            dcp.save({"model": states, "optimizer": moments}, checkpoint_id=str(folder / f"{done}"))
    if rank == 0:
        print(json.dumps({"step": done, "attempt": attempt}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
