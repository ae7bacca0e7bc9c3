"""The norm of all gradients, the same bits however they are cut over ranks.

A sum of squares in floating point depends on the order of the terms, and so on the shards. Here
each square is rounded once, to a fraction of the largest element's power of two, and integers are
added: in any order the same. Two tiny exchanges, of one number each.
"""

import math
from collections.abc import Callable, Iterable

import torch

#: A square is rounded to this many binary places of the largest.
_PLACES = 52
_HALF = _PLACES // 2
_HALF_MASK = (1 << _HALF) - 1

#: Elements worked on at once, in a few float64 copies; on a GPU each block is waited for, so it is
#: larger there: half a GB meanwhile.
_BLOCK, _BLOCK_ON_GPU = 1 << 18, 1 << 24


def norm_of(
    shards: Iterable[torch.Tensor],
    swap: Callable[[bytes], list[bytes]] | None = None,
    *,
    replicas: int = 1,
) -> float:
    """The 2-norm of a vector that ranks hold in parts. Blocks while it swaps.

    Relative error of the square: at most the number of elements times 2**-53.

    Args:
      shards: this rank's parts, of any floating dtype; read only.
      swap: gives everybody's bytes, in order of ranks; None where this rank has all parts.
      replicas: ranks that hold each part.

    Returns:
      The norm; inf or nan when some element is not finite.
    """
    parts = [s.detach().reshape(-1) for s in shards if s.numel()]
    largest = max((float(p.abs().max()) for p in parts), default=0.0)
    # max() drops a nan that does not come first.
    if any(not torch.isfinite(p).all() for p in parts):
        largest = math.inf
    if swap is not None:
        largest = max(float.fromhex(b.decode()) for b in swap(largest.hex().encode()))
    if not math.isfinite(largest) or largest == 0.0:
        return largest
    exponent = math.frexp(largest)[1]  # every element is below 2**exponent
    total = sum(_squares(p, exponent) for p in parts)
    if swap is not None:
        total = sum(int(b) for b in swap(str(total).encode()))
    # Each part was counted once by every replica, to the same integer.
    return math.sqrt(total // replicas / (1 << _PLACES)) * 2.0**exponent


def clip_factor(norm: float, norm_max: float) -> float:
    """What to multiply gradients by so that their norm is at most `norm_max`, as torch does it."""
    factor = norm_max / (norm + 1e-6)
    return min(1.0, factor) if math.isfinite(factor) else math.nan


def _squares(part: torch.Tensor, exponent: int) -> int:
    total = 0
    length = _BLOCK_ON_GPU if part.is_cuda else _BLOCK
    # By a power of two, in two steps: a float64 does not hold all of them. (`torch.ldexp` takes
    # it in float32.)
    half, rest = math.ldexp(1.0, -exponent // 2), math.ldexp(1.0, -exponent - (-exponent // 2))
    for start in range(0, part.numel(), length):
        block = part[start : start + length]
        scaled = block.double() * half * rest
        whole = (scaled * scaled * float(1 << _PLACES)).round_().to(torch.int64)
        # In two halves, or the sum of a block would not fit 64 bits.
        total += int((whole >> _HALF).sum()) << _HALF
        total += int((whole & _HALF_MASK).sum())
    return total
