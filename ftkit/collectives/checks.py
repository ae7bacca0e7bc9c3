"""What a collective refuses before it starts: wrong counts, dtypes, shapes, roots and tags.

torch's users catch what gloo raises, a RuntimeError; gloo finds some of it out only on its
own thread, or by a hang or a wrong sum. Here nothing is sent before all of it is checked, so
the group stays usable after a refusal.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ftkit.collectives import arithmetic
from ftkit.core.errors import Refused

_OPS = [
    (dist.ReduceOp.SUM, "sum"),
    (dist.ReduceOp.AVG, "avg"),
    (dist.ReduceOp.PRODUCT, "product"),
    (dist.ReduceOp.MIN, "min"),
    (dist.ReduceOp.MAX, "max"),
    (dist.ReduceOp.BAND, "band"),
    (dist.ReduceOp.BOR, "bor"),
    (dist.ReduceOp.BXOR, "bxor"),
]


def op_of(opts: Any, dtype: torch.dtype) -> str:
    """The name of the reduction that torch's options (or its ReduceOp) ask for."""
    op = getattr(opts, "reduceOp", opts)
    name = "sum" if op is None else next((n for candidate, n in _OPS if op == candidate), None)
    if name is None:
        raise Refused(f"ftkit does not implement the reduction {op}")
    try:
        arithmetic.check(dtype, name)
    except ValueError as error:
        raise Refused(str(error)) from error
    return name


def root_of(opts: Any, size: int) -> int:
    """The root that torch's options name, as a rank of the group."""
    root = opts if isinstance(opts, int) else int(opts.rootRank)
    return rank(root, size)


def rank(number: int, size: int) -> int:
    """`number`, if it is a rank of a group of `size`."""
    if not 0 <= number < size:
        raise Refused(f"there is no rank {number} in a group of {size}")
    return number


def tag(number: int) -> int:
    """`number`, if it can be the tag of a message."""
    if not 0 <= number < 1 << 32:
        raise Refused(f"a tag must be in 0..2**32-1, got {number}")
    return number


def count(tensors: Sequence[object], what: str, size: int) -> None:
    """One tensor a rank."""
    if len(tensors) != size:
        raise Refused(f"{len(tensors)} {what} for a group of {size} ranks; one a rank is needed")


def one_dtype(*tensors: torch.Tensor) -> None:
    """All of the same dtype."""
    if any(t.dtype != tensors[0].dtype for t in tensors):
        raise Refused(f"one dtype is needed, got {sorted({str(t.dtype) for t in tensors})}")


def same_shape(out: torch.Tensor, source: torch.Tensor) -> None:
    """What comes from `source` fits into `out` as it is."""
    one_dtype(out, source)
    if out.shape != source.shape:
        raise Refused(
            f"the output of shape {tuple(out.shape)} cannot take what has shape "
            f"{tuple(source.shape)}"
        )


def one_a_rank(whole: torch.Tensor, part: torch.Tensor, size: int) -> None:
    """`whole` holds one `part` for each of `size` ranks."""
    one_dtype(whole, part)
    if whole.numel() != size * part.numel():
        raise Refused(
            f"{size} ranks with {part.numel()} elements each need a tensor of "
            f"{size * part.numel()} elements, not one of shape {tuple(whole.shape)}"
        )


def dense(tensor: torch.Tensor) -> None:
    """A tensor with memory behind every element."""
    if tensor.layout != torch.strided:
        raise NotImplementedError(f"{tensor.layout} tensors can be all-reduced, nothing else")


def writable(tensor: torch.Tensor) -> None:
    """A tensor of which no two elements share their memory."""
    dense(tensor)
    if not tensor.is_contiguous() and torch._debug_has_internal_overlap(tensor) == 1:
        raise Refused(
            f"several elements of the tensor of shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()} share their memory; clone() it before it is written to"
        )
