"""Real text on every machine: the standard library's sources, or any files, as byte windows."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ftkit.core.errors import UsageError

#: Folders of the standard library that hold tests, foreign packages or generated files.
_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


class Window(NamedTuple):
    """One sample: `y` is `x` moved on by one byte. Both int64, shape (context,)."""

    x: Tensor
    y: Tensor


class ByteWindows(Dataset[Window]):
    """Consecutive windows of a text that share no predicted byte; sample i never changes."""

    def __init__(self, text: bytes, *, context: int, origin: str = "the text") -> None:
        """Keep one copy of `text` as uint8.

        Args:
          text: any bytes; at least `context` + 1 of them.
          context: bytes of a window, at least 1.
          origin: what the text is, for messages.

        Raises:
          UsageError: the text is shorter than one window.
        """
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if len(text) <= context:
            raise UsageError(
                f"{origin} has {len(text)} bytes, one window of context {context} needs "
                f"{context + 1}; give more text or a smaller context"
            )
        self.context = context
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self.context

    def __getitem__(self, index: int) -> Window:
        """Window `index`, newly allocated. IndexError outside 0..len-1."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.context
        window = self._bytes[start : start + self.context + 1].long()
        return Window(window[:-1], window[1:])


def load_text(data: Path | None, *, bytes_max: int) -> bytes:
    """Read the training text: `data`, or the standard library's sources when it is None.

    Blocks on the disk. The files are taken in the order of their paths and cut off after
    `bytes_max` bytes, so every process of a machine reads the same text.

    Args:
      data: a file, or a folder of which every file is taken that is not hidden and not binary.
      bytes_max: the most to read, at least 1.

    Raises:
      UsageError: there is no such path, it cannot be read, or it holds no text.
    """
    if bytes_max < 1:
        raise ValueError(f"bytes_max must be at least 1, got {bytes_max}")
    if data is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        text = _join(_library_files(root), bytes_max)
        if not text:
            raise UsageError(
                f"no .py files under {root}: this Python ships its library without sources; "
                "pass a text with --data PATH"
            )
        return text
    if data.is_dir():
        text = _join(_folder_files(data), bytes_max)
    elif data.exists():
        text = _join(iter([data]), bytes_max, binary=True)
    else:
        raise UsageError(f"--data {data}: no such file or folder")
    if not text:
        raise UsageError(
            f"--data {data}: no text in it (empty, hidden and binary files are left out)"
        )
    return text


def _library_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(path.relative_to(root).parts[:-1]) and path.is_file():
            yield path


def _folder_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.is_file():
            yield path


def _join(paths: Iterator[Path], bytes_max: int, *, binary: bool = False) -> bytes:
    """The files' bytes one after another, at most `bytes_max`; binary files only if asked."""
    text = bytearray()
    for path in paths:
        try:
            with path.open("rb") as file:
                content = file.read(bytes_max - len(text))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
        if binary or b"\0" not in content[:4096]:
            text += content
        if len(text) >= bytes_max:
            break
    return bytes(text)
