"""A text file that is there whole or not at all: whoever reads it sees the old one or the new one."""

import os
import threading
from pathlib import Path


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write `text` as UTF-8 to `path`, in place of what is there. OSError as it comes.

    `mode` is that of the file, less the umask; no one can have opened it before it was so.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    part.unlink(missing_ok=True)
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
