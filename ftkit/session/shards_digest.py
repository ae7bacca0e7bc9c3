"""A digest of sharded parameters that can be added up over ranks: the same however they are cut."""

from collections.abc import Iterable

import torch
import xxhash
from torch import nn

from ftkit.checkpoint.shards import boxes_of
from ftkit.checkpoint.walk import named_parameters

#: Elements worked on at once; each takes about six times 8 bytes meanwhile.
_BLOCK = 1 << 16


def shards_digest(modules: Iterable[nn.Module]) -> int:
    """The sum, modulo 2**64, of a mixed word for each element that this rank holds.

    A word depends on the parameter's name, the element's place in the whole and its bits, so the
    sum over all shards, each once, depends on nothing else. About 20 ns an element, on one core.
    """
    total = 0
    for number, module in enumerate(modules):
        for name, parameter in named_parameters(f"model{number}", module):
            seed = _signed(xxhash.xxh3_64_intdigest(name.encode()))
            shape = tuple(parameter.shape)
            for box, view in boxes_of(name, parameter):
                if view.numel():
                    total += _sum(view.detach().cpu(), box.offsets, shape, seed)
    return total % (1 << 64)


def _sum(view: torch.Tensor, offsets: tuple[int, ...], shape: tuple[int, ...], seed: int) -> int:
    places = torch.zeros((), dtype=torch.int64)
    stride = 1
    for first, count, size in reversed(list(zip(offsets, view.shape, shape, strict=True))):
        axis = torch.arange(first, first + count) * stride
        places = axis.reshape(-1, *[1] * places.dim()) + places
        stride *= size
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[view.element_size()]
    words = view.contiguous().reshape(-1).view(width)
    places, total = places.reshape(-1), 0
    for start in range(0, len(words), _BLOCK):
        block, place = (whole[start : start + _BLOCK] for whole in (words, places))
        total += int(_mix(_mix(place + seed) ^ block.to(torch.int64)).sum())
    return total


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64; int64 wraps as uint64 does, its shifts need the sign masked."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
