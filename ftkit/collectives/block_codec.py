"""Codecs: float32 values as fewer bytes, block by block, and back; pure.

======= ================================ ============== =================================
codec   a value is                       bytes a value  largest error of a value
======= ================================ ============== =================================
int8    round(value / scale), -127..127  1 + 4 / 256    1/254 of the block's largest
fp8     value / scale as e4m3            1 + 4 / 256    1/16 of itself, 1/458752 of the largest
bf16    the upper half of float32        2              1/256 of itself
======= ================================ ============== =================================

The scale of a block of 256 values is its largest magnitude over the largest code. A value
that is not finite never becomes a number: in int8 and fp8 its whole block decodes to NaN, in
bf16 it stays what it is. A value beyond float32 is an infinity before it is coded.

On a CPU int8 beats fp8 at the same size: four times less error on ordinary gradients, and
decoding that is several times faster. fp8 is for values that differ widely within a block.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

BLOCK = 256

#: Blocks handled at once. Loops below 32768 elements stay on the calling thread whatever the
#: size of torch's pool; without a pool, longer ones cost fewer calls. No bit depends on it.
_ROWS_POOL, _ROWS_ALONE = 127, 1024

_TINY = torch.finfo(torch.float32).tiny


class Codec(ABC):
    """How values are coded. Stateless; any thread. All tensors are flat, dense, on the CPU."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def nbytes(self, count: int) -> int:
        """Bytes that `count` values take."""

    @abstractmethod
    def encode(self, values: torch.Tensor, coded: torch.Tensor) -> None:
        """Code `values` (any floating dtype) into `coded` (uint8, `nbytes` long, 4-aligned)."""

    @abstractmethod
    def decode(self, coded: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        """Set `out` (float32) to what was coded, or, with `add`, add it: one rounding each."""


class _Cast(Codec):
    """A shorter dtype, without scales."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__(name)
        self._dtype = dtype

    def nbytes(self, count: int) -> int:
        return count * self._dtype.itemsize

    def encode(self, values: torch.Tensor, coded: torch.Tensor) -> None:
        convert(values, coded.view(self._dtype))

    def decode(self, coded: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        source = coded.view(self._dtype)
        if not add:
            convert(source, out)
            return
        for part in _parts(out.numel()):
            out[part] += source[part]


class _Blocks(Codec):
    """One scale a block, then codes: all scales first, so that both are aligned."""

    def __init__(self, name: str, dtype: torch.dtype, top: float) -> None:
        """`top` is the largest magnitude of `dtype` that is used."""
        super().__init__(name)
        self._dtype = dtype
        self._top = top
        largest = torch.tensor(torch.finfo(torch.float32).max / top, dtype=torch.float32)
        self._scale_max = float(torch.nextafter(largest, torch.zeros(())))
        self._rounds = not dtype.is_floating_point

    def nbytes(self, count: int) -> int:
        return 4 * -(-count // BLOCK) + count

    def encode(self, values: torch.Tensor, coded: torch.Tensor) -> None:
        scales, codes = self._split(coded, values.numel())
        for rows in _blocks(values, codes, scales):
            value_RB, code_RB, scale_R1 = rows
            value_RB = value_RB.float()
            scratch_RB = torch.abs(value_RB)
            torch.amax(scratch_RB, 1, keepdim=True, out=scale_R1)
            # An infinity would make its block's codes NaN or 0; a NaN scale makes all NaN.
            scale_R1.div_(self._top).masked_fill_(scale_R1.isinf(), torch.nan)
            # Below `tiny` a quotient could overflow, above the other a product could.
            scale_R1.clamp_(_TINY, self._scale_max)
            torch.div(value_RB, scale_R1, out=scratch_RB)
            if self._rounds:
                scratch_RB.round_()
            code_RB.copy_(scratch_RB)

    def decode(self, coded: torch.Tensor, out: torch.Tensor, *, add: bool = False) -> None:
        scales, codes = self._split(coded, out.numel())
        for out_RB, code_RB, scale_R1 in _blocks(out, codes, scales):
            # Scales were meant for float32; in their own dtype the codes would overflow.
            value_RB = code_RB.float().mul_(scale_R1)
            if add:
                out_RB += value_RB
            else:
                out_RB.copy_(value_RB)

    def _split(self, coded: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = 4 * -(-count // BLOCK)
        return coded[:at].view(torch.float32), coded[at:].view(self._dtype)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _Blocks("int8", torch.int8, 127.0),
        _Blocks("fp8", torch.float8_e4m3fn, 448.0),
        _Cast("bf16", torch.bfloat16),
    )
}


def codec_named(name: str) -> Codec:
    """The codec of that name. Raises ValueError when there is none."""
    if name not in CODECS:
        raise ValueError(f"codec {name!r} is not one of {', '.join(CODECS)}")
    return CODECS[name]


def convert(values: torch.Tensor, out: torch.Tensor) -> None:
    """Set `out` to `values` in its own dtype, on the calling thread. Flat, equally long."""
    for part in _parts(out.numel()):
        # float64 goes by way of float32, as it does everywhere here.
        out[part] = values[part].float() if values.dtype == torch.float64 else values[part]


def _rows() -> int:
    return _ROWS_ALONE if torch.get_num_threads() == 1 else _ROWS_POOL


def _parts(count: int) -> Iterator[slice]:
    step = _rows() * BLOCK
    return (slice(at, min(at + step, count)) for at in range(0, count, step))


def _blocks(
    values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Pieces of all three: R blocks of B values each, R scales; the rest as a block of its own."""
    count = values.numel()
    whole, step = count // BLOCK, _rows()
    for at in range(0, whole, step):
        end = min(at + step, whole)
        part = slice(at * BLOCK, end * BLOCK)
        yield values[part].view(-1, BLOCK), codes[part].view(-1, BLOCK), scales[at:end, None]
    if count % BLOCK:
        part = slice(whole * BLOCK, count)
        yield values[part].view(1, -1), codes[part].view(1, -1), scales[whole:, None]
