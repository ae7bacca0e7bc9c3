"""Elementwise arithmetic on raw bytes: what a reduction does to two buffers.

Buffers are flat uint8 numpy arrays, so that one code path serves tensors, scratch memory
and the network. numpy does the work where it knows the dtype: its loops release the GIL and
stay on the calling thread, whereas torch would start a second pool of threads beside the
training's. bfloat16 and float16 go through torch in blocks below its parallel grain. Both
round each single operation to the nearest, so neither blocks nor library change a bit.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes: TypeAlias = npt.NDArray[np.uint8]

#: torch runs elementwise loops of fewer elements than 32768 on the calling thread.
_TORCH_BLOCK = 32767

_NUMPY: dict[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int8: np.int8,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
    torch.complex64: np.complex64,
    torch.complex128: np.complex128,
}
_TORCH = (torch.bfloat16, torch.float16)

_UFUNC: dict[str, Callable[..., object]] = {
    "sum": np.add,
    "avg": np.add,
    "product": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
_UFUNC_BOOL: dict[str, Callable[..., object]] = {
    **_UFUNC,
    "sum": np.logical_or,
    "product": np.logical_and,
}
_TORCH_OP: dict[str, Callable[..., object]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
}
OPS = tuple(_UFUNC)


@lru_cache(maxsize=1024)
def signature(name: str, op: str, dtype: torch.dtype) -> str:
    """What the recorder calls a reduction: all that ranks must agree on but the size."""
    return f"{name} {op} {str(dtype).removeprefix('torch.')}"


def check(dtype: torch.dtype, op: str) -> None:
    """Raise ValueError when `op` is not defined for `dtype`."""
    if op not in OPS:
        raise ValueError(f"reduction {op!r} is not one of {', '.join(OPS)}")
    if dtype not in _NUMPY and dtype not in _TORCH:
        raise ValueError(f"ftkit does not reduce {dtype}")
    if (dtype.is_floating_point or dtype.is_complex) and op in ("band", "bor", "bxor"):
        raise ValueError(f"bitwise {op} is not defined for {dtype}")
    if (dtype.is_complex and op in ("min", "max")) or (dtype == torch.bool and op == "avg"):
        raise ValueError(f"{op} is not defined for {dtype}")


def view_of(data: Bytes) -> memoryview:
    """The same memory for sockets."""
    return memoryview(cast("Buffer", data))


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """The memory of a contiguous CPU tensor as flat uint8, shared, not copied.

    Raises:
      ValueError: the tensor is not dense, contiguous and on the CPU.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"ftkit moves dense CPU tensors, not {tensor.layout} on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError("tensor must be contiguous here")
    # Not reshape(-1): a single element may have any stride and still be contiguous.
    flat: Bytes = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
    return flat


def combine(op: str, dtype: torch.dtype, out: Bytes, left: Bytes, right: Bytes) -> None:
    """Set out = left `op` right, elementwise; `out` may be either of them."""
    kind = _NUMPY.get(dtype)
    if kind is not None:
        ufunc = (_UFUNC_BOOL if dtype == torch.bool else _UFUNC)[op]
        ufunc(left.view(kind), right.view(kind), out=out.view(kind))
        return
    function = _TORCH_OP[op]
    a, b, o = (torch.from_numpy(x).view(dtype) for x in (left, right, out))
    for at in range(0, o.numel(), _TORCH_BLOCK):
        end = at + _TORCH_BLOCK
        function(a[at:end], b[at:end], out=o[at:end])


def scale(dtype: torch.dtype, data: Bytes, factor: float) -> None:
    """Multiply by `factor`, rounded once, in place. For floating dtypes."""
    kind = _NUMPY.get(dtype)
    if kind is not None:
        typed = data.view(kind)
        np.multiply(typed, kind(factor), out=typed)
        return
    whole = torch.from_numpy(data).view(dtype)
    for at in range(0, whole.numel(), _TORCH_BLOCK):
        whole[at : at + _TORCH_BLOCK].mul_(factor)


def average(dtype: torch.dtype, data: Bytes, count: int) -> None:
    """Divide by `count` in place; integers are divided toward zero."""
    typed = torch.from_numpy(data).view(dtype)
    if dtype.is_floating_point or dtype.is_complex:
        for at in range(0, typed.numel(), _TORCH_BLOCK):
            typed[at : at + _TORCH_BLOCK].div_(count)
    else:
        typed.div_(count, rounding_mode="trunc")


def copy(out: Bytes, source: Bytes) -> None:
    """Copy with the GIL released (a slice assignment of memoryviews would hold it)."""
    np.copyto(out, source)


def bounds(count: int, parts: int) -> list[int]:
    """Limits of `parts` even pieces of `count` elements: parts + 1 rising numbers."""
    return [count * i // parts for i in range(parts + 1)]
