"""RankOutput: what ranks write to their log files, passed on to our own output as it comes."""

import sys
from pathlib import Path
from typing import BinaryIO

#: Read at once from one file: a rank that floods its log must not hold up the others.
CHUNK_BYTES = 1 << 20


class RankOutput:
    """Follows seat logs that grow. One thread uses it."""

    def __init__(self, logs: Path, seats: int, out: BinaryIO | None = None) -> None:
        """Follow `logs`/seat-N.log from their present ends (a run directory may be reused).

        Args:
          logs: the folder; need not exist yet.
          seats: the seats of the whole job.
          out: where lines go; our standard output by default.
        """
        self._paths = [logs / f"seat-{seat}.log" for seat in range(seats)]
        self._read = [_size(path) for path in self._paths]
        self._out = out

    def pass_on(self, *, all_of_it: bool = False) -> None:
        """Pass on whole lines that are new; with `all_of_it`, a last line without end too."""
        out = self._out or sys.stdout.buffer
        for i, path in enumerate(self._paths):
            while _size(path) > self._read[i]:
                with path.open("rb") as file:
                    file.seek(self._read[i])
                    data = file.read(CHUNK_BYTES)
                end = len(data) if all_of_it or len(data) == CHUNK_BYTES else data.rfind(b"\n") + 1
                out.write(data[:end])
                self._read[i] += end
                if not end or not all_of_it:
                    break
        out.flush()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
