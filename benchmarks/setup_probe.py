"""What a fresh rank cannot do without: import torch, build the model, wrap it in DDP; timed.

Prints one JSON line of monotonic seconds: `began` (Python runs this file), `imported`, `built`,
`wrapped`. The process group is gloo's, of this process alone: nobody is waited for.
"""

import json
import sys
import time


def main(argv: list[str]) -> None:
    """Do it, and print the times. `argv`: a preset's name, or nothing for the default model."""
    began = time.monotonic()
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    imported = time.monotonic()
    from ftkit.launch.workload.gpt import GPT, PRESETS, GPTConfig

    torch.set_num_threads(1)
    model = GPT(PRESETS[argv[0]] if argv else GPTConfig(), seed=0)
    built = time.monotonic()
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, not listed
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    wrapped = DistributedDataParallel(model)
    done = time.monotonic()
    count = sum(p.numel() for p in wrapped.parameters())
    dist.destroy_process_group()
    times = {"began": began, "imported": imported, "built": built, "wrapped": done}
    print(json.dumps(times | {"parameters": count}))


if __name__ == "__main__":
    main(sys.argv[1:])
