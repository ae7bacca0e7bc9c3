"""The job of `training` in plain DDP on gloo: what ftkit's step is compared with.

The same model, the same samples in the same order, one slot a rank; launched with torchrun's
variables. Prints one JSON line: `times`, the monotonic seconds at the end of every step, the
last global loss, and a digest of the parameters (gloo sums in another order, so it is near
ftkit's result, not equal to it).
"""

import json
import os
import sys
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ftkit.core.ids import Slot, Step
from ftkit.launch.workload.gpt import GPT, next_byte_loss, parameters_digest
from ftkit.launch.workload.text import ByteWindows, load_text
from ftkit.launch.workload.train import parse
from ftkit.session.feed import feed_of


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and print what came of it."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    text = load_text(options.data, bytes_max=options.data_bytes_max)
    dataset = ByteWindows(text, context=options.model.context)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(GPT(options.model, seed=options.seed))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.learning_rate, foreach=False, fused=False
    )
    feed = feed_of(
        dataset,
        slots=world,
        slot_size=options.slot_size,
        seed=options.seed,
        shuffle=True,
        collate=None,
        tell=lambda kind, **fields: None,
    )
    times, local = list[float](), 0.0
    for number in range(1, options.steps + 1):
        x, y = feed.batch(Step(number), Slot(rank))
        loss = next_byte_loss(model(x), y)
        loss.backward()
        local = loss.detach().item()  # ftkit's loop reads it too
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.monotonic())
    total = torch.tensor([local / world], dtype=torch.float64)
    dist.all_reduce(total)
    params = parameters_digest(model.module)
    dist.destroy_process_group()
    print(json.dumps({"rank": rank, "times": times, "loss": total.item(), "params": params}))


if __name__ == "__main__":
    main()
    # A thread of gloo's that still runs when the interpreter ends, ends the process by abort().
    sys.stdout.flush()
    os._exit(0)
