"""Raw memory: any contiguous buffer as flat bytes, on the same memory, for numpy and for C."""

from typing import TYPE_CHECKING, Any, TypeAlias, Union, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import Buffer

Bytes: TypeAlias = NDArray[np.uint8]

#: numpy's arrays are buffers, which its type hints say from Python 3.12 on only.
Memory: TypeAlias = Union["Buffer", NDArray[Any]]


def flat(memory: Memory) -> Bytes:
    """Any contiguous buffer as flat uint8 on the same memory; read-only if the buffer is.

    Raises:
      ValueError: its memory is not contiguous.
    """
    view = memoryview(cast("Buffer", memory))
    if not view.c_contiguous:
        raise ValueError("the buffer is not contiguous in memory: give a contiguous copy")
    return np.frombuffer(view, dtype=np.uint8)


def address(array: Bytes) -> int:
    """Where the array's memory begins, read-only memory included."""
    found: int = array.__array_interface__["data"][0]
    return found
