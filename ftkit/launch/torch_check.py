"""Torch check: two processes of this node reduce a tensor, and every GPU multiplies a matrix.

`python -m ftkit.launch.torch_check` prints its checks as one JSON list. Two GPUs or more reduce by
NCCL as well, all of them at once. Apart from `preflight`, so that a torch that crashes is a result.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ftkit.detection.node_health import Check, Health

_ELEMENTS, _ORDER = 1 << 18, 2048
_PATIENCE = timedelta(seconds=60)


def main() -> int:
    """Check and print. Returns 1 when something failed."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    checks = [_reduced("gloo", 2), *(_gpu(index) for index in range(gpus))]
    if not gpus:
        checks.append(Check(name="gpu", health=Health.ABSENT, note="no CUDA device"))
    elif gpus > 1:
        checks.append(_reduced("nccl", gpus))
    print(json.dumps([asdict(c) for c in checks]), flush=True)
    return int(any(c.health is Health.FAILED for c in checks))


def _reduced(backend: str, size: int) -> Check:
    name = "torch" if backend == "gloo" else backend
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        try:
            mp.spawn(_member, args=(backend, size, folder), nprocs=size)  # type: ignore[attr-defined, no-untyped-call]
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the result
            last = str(error).strip().splitlines()[-1]
            return Check(name=name, health=Health.FAILED, note=f"{backend} of {size}: {last}")
    seconds = time.perf_counter() - began
    return Check(
        name=name,
        health=Health.OK,
        note=f"torch {torch.__version__}: {size} processes reduced by {backend}, {seconds:.1f} s in all",
    )


def _member(rank: int, backend: str, size: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=_PATIENCE
    )
    options: dict[str, Any] = {"device": f"cuda:{rank}"} if backend == "nccl" else {}
    flat = torch.full((_ELEMENTS,), float(rank + 1), **options)
    dist.all_reduce(flat)
    wanted = size * (size + 1) / 2
    if not bool((flat == wanted).all()):
        raise RuntimeError(f"the sum is not {wanted}")
    dist.destroy_process_group()


def _gpu(index: int) -> Check:
    """Whole numbers, so that the sums are exact and every GPU must agree to the last bit."""
    name = f"gpu{index}"
    try:
        generator = torch.Generator().manual_seed(7)
        a = torch.randint(-4, 5, (_ORDER, _ORDER), generator=generator).float()
        b = torch.randint(-4, 5, (_ORDER, _ORDER), generator=generator).float()
        wanted = (a[:64].double() @ b.double()).float()
        on = a.to(f"cuda:{index}"), b.to(f"cuda:{index}")
        torch.matmul(*on)
        torch.cuda.synchronize(index)
        began = time.perf_counter()
        for _ in range(8):
            product = torch.matmul(*on)
        torch.cuda.synchronize(index)
        speed = 8 * 2 * _ORDER**3 / (time.perf_counter() - began) / 1e12
        right = bool((product[:64].cpu() == wanted).all())
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Check(name=name, health=Health.FAILED, note=str(error).splitlines()[0])
    what = torch.cuda.get_device_name(index)
    return Check(
        name=name,
        health=Health.OK if right else Health.FAILED,
        value=round(speed, 2),
        unit="TFLOP/s",
        note=f"{what}: {speed:.1f} TFLOP/s, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        + ("" if right else "; the product is wrong"),
    )


if __name__ == "__main__":
    sys.exit(main())
