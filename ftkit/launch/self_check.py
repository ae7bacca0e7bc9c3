"""Self-check: whether this machine computes, remembers and copies as it should. Plain numpy.

Meant for a process of its own at idle priority: `python -m ftkit.launch.self_check` prints its
checks as one JSON object. Speed is by processor time: what else runs does not make a node slow.
The matrices hold small whole numbers, so that every sum is exact and
the result is the same to the last bit on every machine and with any number of threads.
"""

import hashlib
import json
import os
import socket
import sys
import time

import numpy as np

from ftkit.detection.node_health import Check, Health, NodeResult

#: Of the square matrices; of the memory that is tried; how often, the best counting.
ORDER, MEMORY_BYTES, REPEATS = 768, 64 << 20, 5
#: Of the product of the matrices below; computed once, exactly, and the same for ever.
PRODUCT = "3c8c4e5ffb27d364"
_PATTERNS = (0x55, 0xAA, 0x00, 0xFF)


def gemm() -> Check:
    """Multiply two matrices; the product's digest and the speed."""
    rng = np.random.Generator(np.random.PCG64(7))
    a = rng.integers(-8, 9, (ORDER, ORDER)).astype(np.float64)
    b = rng.integers(-8, 9, (ORDER, ORDER)).astype(np.float64)
    seconds, digests = [], set[str]()
    for _ in range(REPEATS):
        began = time.process_time()
        product = a @ b
        seconds.append(time.process_time() - began)
        digests.add(hashlib.blake2b(product.tobytes(), digest_size=8).hexdigest())
    speed = 2 * ORDER**3 / max(min(seconds), 1e-6) / 1e9
    digest = "+".join(sorted(digests))
    right = digests == {PRODUCT}
    return Check(
        name="gemm",
        health=Health.OK if right else Health.FAILED,
        value=round(speed, 2),
        unit="GFLOP/s",
        digest=digest,
        note=f"{speed:.1f} GFLOP/s a core"
        if right
        else f"the product is wrong: {digest}, not {PRODUCT}",
    )


def memory() -> Check:
    """Write patterns, read them back, and copy: speed, and every byte as it was written."""
    here = np.empty(MEMORY_BYTES, dtype=np.uint8)
    there = np.empty_like(here)
    wrong, seconds = 0, []
    for pattern in _PATTERNS:
        here.fill(pattern)
        began = time.process_time()
        np.copyto(there, here)
        seconds.append(time.process_time() - began)
        wrong += int(np.count_nonzero(there != pattern))
    # Every word its own address: two that share a cell would show.
    words = here.view(np.uint64)
    words[:] = np.arange(len(words), dtype=np.uint64)
    np.copyto(there, here)
    expected = np.arange(len(words), dtype=np.uint64).view(np.uint8)
    wrong += int(np.count_nonzero(there != expected))
    speed = MEMORY_BYTES / max(min(seconds), 1e-6) / 1e9
    return Check(
        name="memory",
        health=Health.FAILED if wrong else Health.OK,
        value=round(speed, 2),
        unit="GB/s",
        note=f"{wrong} bytes came back wrong" if wrong else f"copies {speed:.1f} GB/s",
    )


def check_self() -> NodeResult:
    """Both. About half a second of two cores. Blocks."""
    return NodeResult(node=socket.gethostname(), at=time.time(), checks=(gemm(), memory()))


def main() -> int:
    """Check at idle priority and print the result. Returns 1 when something failed."""
    os.nice(19)
    found = check_self()
    print(json.dumps(found.to_json()), flush=True)
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
