"""Live tensors to durable bytes, and back to tensors of another world.

The names below are looked up on first use: importing this package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftkit.checkpoint.ecosystem.convert import convert as convert
    from ftkit.checkpoint.ecosystem.dcp_reader import FtkitStorageReader as FtkitStorageReader
    from ftkit.checkpoint.ecosystem.dcp_writer import FtkitStorageWriter as FtkitStorageWriter

_WHERE = {
    "FtkitStorageReader": "ftkit.checkpoint.ecosystem.dcp_reader",
    "FtkitStorageWriter": "ftkit.checkpoint.ecosystem.dcp_writer",
    "convert": "ftkit.checkpoint.ecosystem.convert",
}

__all__ = ["FtkitStorageReader", "FtkitStorageWriter", "convert"]


def __getattr__(name: str) -> object:
    try:
        return getattr(import_module(_WHERE[name]), name)
    except KeyError:
        raise AttributeError(f"module 'ftkit.checkpoint' has no attribute {name!r}") from None
