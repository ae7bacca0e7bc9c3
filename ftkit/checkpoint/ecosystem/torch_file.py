"""torch.save files: read without unpickling anything but plain values, written from the disk.

Reading maps the file, so that a tensor costs memory when it is looked at. torch.save wants all
tensors at once; so each is first written to a file of its own beside the target and mapped, and
what torch.save reads are those maps: memory that the system can take back at any time.
"""

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import torch

from ftkit.checkpoint.ecosystem.lazy import LazyState, LazyTensor, memory_of
from ftkit.checkpoint.plain import decode
from ftkit.core.errors import IntegrityError, UsageError


def write(
    file: BinaryIO,
    state: LazyState,
    scratch: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a state dict as torch.save does. Blocks; takes the tensors' size on disk twice.

    Args:
      file: open for writing.
      state: what to write.
      scratch: a folder with room for all tensors; nothing is left in it.
      progress: told the bytes of each tensor.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".part-") as folder:

        def mapped(name: str) -> torch.Tensor:
            lazy = state.tensors[name]
            tensor = _on_disk(lazy, Path(folder) / str(len(made)))
            made.append(tensor)
            progress(lazy.nbytes)
            return tensor

        made = list[torch.Tensor]()
        torch.save(decode(state.skeleton, mapped), file)


def read(path: Path) -> LazyState:
    """Open a file that torch.save wrote.

    Files of before torch 1.6 are read into memory whole; others are mapped.

    Raises:
      IntegrityError: it is damaged or no such file.
      UsageError: it holds more than tensors and plain values, which is never unpickled; or what
        it holds is no state dict.
    """
    zipped = _is_zip(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        raise UsageError(
            f"{path} is damaged, or holds objects that are no tensors or plain values, which are "
            f"never unpickled. Save a state dict instead: {str(error).splitlines()[0]}"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise IntegrityError(f"{path} cannot be read by torch.load: {error}") from error
    if zipped:
        _check_sums(path)
    return LazyState.of(state, str(path))


def _check_sums(path: Path) -> None:
    """Compare every record with its CRC-32, which torch.load does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        raise IntegrityError(f"{path} is damaged: {error}") from error
    if bad is not None:
        raise IntegrityError(f"{path} is damaged: its record {bad} has another checksum")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _on_disk(lazy: LazyTensor, path: Path) -> torch.Tensor:
    if not lazy.nbytes:
        return torch.empty(lazy.shape, dtype=lazy.torch_dtype)
    with path.open("wb") as file:
        file.write(memory_of(lazy.read()))
    data = torch.from_file(str(path), shared=True, size=lazy.nbytes, dtype=torch.uint8)
    return data.view(lazy.torch_dtype).reshape(lazy.shape)
