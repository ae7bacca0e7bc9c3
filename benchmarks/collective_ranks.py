"""What one rank of `collectives` runs: the same operation by gloo and by ftkit, in turn.

The default process group is ftkit's; gloo's is a group of the same ranks beside it. A *block* is
a number of operations back to back; blocks of both sides alternate (AB, BA, ...), each behind a
barrier. Prints one JSON line: for every case the seconds per operation of each block, by side,
and a digest of what each side computed, from integers that both sum without rounding.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from ftkit.collectives import backend
from ftkit.collectives.config import CollectivesConfig, Transport

#: Bytes of a block: small operations are timed many at once.
BLOCK_BYTES = 1 << 20
BLOCK_OPS_MAX = 50

Run = Callable[[dist.ProcessGroup | None], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Join, run every case, print what came of it."""
    options = parse(argv)
    torch.set_num_threads(1)
    backend.register()
    dist.init_process_group(
        "ftkit",
        pg_options=CollectivesConfig(transport=Transport(options.transport)),
        timeout=timedelta(seconds=120),
    )
    gloo = dist.new_group(backend="gloo", timeout=timedelta(seconds=120))
    done = [measure(op, size, options.blocks, gloo) for op in options.ops for size in options.sizes]
    dist.destroy_process_group()
    print(json.dumps(done))


def measure(op: str, size: int, blocks: int, gloo: Any) -> dict[str, Any]:
    """One case: `blocks` blocks of each side. Blocks until all ranks are through.

    Args:
      op: all_reduce, reduce_scatter or all_gather.
      size: bytes of the whole vector.
      blocks: of each side.
      gloo: the process group to compare with.
    """
    sides: dict[str, Any] = {"gloo": gloo, "ftkit": None}
    digests = {}
    for side, group in sides.items():
        run, result = prepared(op, size)
        run(group)
        digests[side] = xxhash.xxh3_64_hexdigest(result.view(torch.uint8).numpy().data)
    # Zeroes: a sum that is summed again and again stays finite, and takes as long.
    result.zero_()
    ops = max(1, min(BLOCK_OPS_MAX, BLOCK_BYTES // size))
    times: dict[str, list[float]] = {side: [] for side in sides}
    spent: dict[str, list[float]] = {side: [] for side in sides}
    gc.collect()
    for number in range(blocks + 1):
        order = list(sides.items())
        for side, group in order if number % 2 else reversed(order):
            dist.barrier()
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(ops):
                run(group)
            if number:  # the first block of each warms up
                times[side].append((time.perf_counter() - start) / ops)
                spent[side].append((time.process_time() - cpu) / ops)
    return {"op": op, "size": size, "times": times, "spent": spent, "digests": digests}


def prepared(op: str, size: int) -> tuple[Run, torch.Tensor]:
    """The operation as a function of the process group, and the tensor its result lies in."""
    rank, world = dist.get_rank(), dist.get_world_size()
    count = size // 4 // world * world
    data = torch.arange(count, dtype=torch.float32).remainder_(1021).mul_(rank + 1)
    share = torch.empty(count // world)
    if op == "all_reduce":
        return lambda group: void(dist.all_reduce(data, group=group)), data
    if op == "reduce_scatter":
        return lambda group: void(dist.reduce_scatter_single(share, data, group=group)), share
    share.copy_(data[: count // world])
    whole = torch.empty(count)
    return lambda group: void(dist.all_gather_single(whole, share, group=group)), whole


def void(_: object) -> None:
    pass


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--ops", nargs="+", default=["all_reduce"])
    made.add_argument("--sizes", type=int, nargs="+", default=[1 << 20])
    made.add_argument("--blocks", type=int, default=5)
    made.add_argument("--transport", default="auto")
    return made.parse_args(argv)


if __name__ == "__main__":
    main()
