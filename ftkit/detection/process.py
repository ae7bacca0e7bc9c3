"""What Linux says of how a process fares, from /proc."""

import os
from pathlib import Path
from typing import Final

from ftkit.core.process_stat import stat_fields
from ftkit.detection.observations import ProcessFacts

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def process_facts(pid: int) -> ProcessFacts | None:
    """What the kernel says of `pid` now; None when there is no such process. About 30 µs."""
    directory = Path("/proc") / str(pid)
    try:
        fields = stat_fields(directory)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return ProcessFacts(
        state=fields[0].decode(),
        cpu_ticks=int(fields[11]) + int(fields[12]),
        rss_bytes=int(fields[21]) * _PAGE_BYTES,
        wchan=_first_word(directory / "wchan"),
        syscall=_first_word(directory / "syscall"),
        start_ticks=int(fields[19]),
        ticks_per_s=_TICKS_PER_S,
    )


def _first_word(path: Path) -> str:
    try:
        words = path.read_text().split()
    except OSError:
        return ""  # gone, or not ours to see; either way it is a detail
    return words[0] if words and words[0] not in ("0", "running") else ""
