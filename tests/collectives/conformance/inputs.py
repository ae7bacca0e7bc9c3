"""Tensors that cases reduce and move: every dtype, shape and layout a caller may bring."""

import torch

REAL = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
]
OTHERS = [
    torch.bool,
    torch.int16,
    torch.complex64,
    torch.complex128,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
DTYPES = REAL + OTHERS

#: What gloo does not know at all, and what holds the same values and is known to it.
WIDER = {
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
}

#: The last one is beyond the sizes that travel in one message, in every dtype.
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 0, 3), (129,), (70_001,)]
LAYOUTS = ["plain", "strided", "transposed", "inner", "channels_last", "offset"]


def laid_out(values, layout):
    """The same values, otherwise in memory. Shapes that a layout cannot hold stay plain."""
    shape = values.shape
    match layout:
        case "strided" if shape:
            return torch.stack([values, values], -1)[..., 0]
        case "transposed" if len(shape) == 2:
            return values.t().contiguous().t()
        case "inner" if shape and shape[-1]:
            wide = torch.zeros((*shape[:-1], shape[-1] + 3)).to(values.dtype)
            wide[..., 1:-2] = values
            return wide[..., 1:-2]
        case "channels_last" if len(shape) == 4:
            return values.contiguous(memory_format=torch.channels_last)
        case "offset" if shape:
            whole = torch.zeros(values.numel() + 1).to(values.dtype)
            whole[1:] = values.reshape(-1)
            return whole[1:].view(shape)
        case _:
            return values


def make(dtype, shape, seed, kind="whole"):
    """Small whole numbers; with `kind` "real" normal ones, with "wide" integers of any size."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if kind == "real":
        return torch.randn(shape, generator=generator).to(dtype)
    if kind == "wide" and not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        low, high = max(limits.min, -(2**62)), min(limits.max, 2**62)
        return torch.randint(low, high, shape, generator=generator).to(dtype)
    if dtype.is_complex:
        parts = torch.randint(0, 4, (*shape, 2), generator=generator).double()
        return torch.view_as_complex(parts).to(dtype)
    low = -3 if dtype.is_signed else 0  # sums and products of three fit every dtype
    return torch.randint(low, 4, shape, generator=generator).to(dtype)
