"""What earlier calls of a benchmark have done: a series of hours goes on where it was interrupted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class DoneBefore:
    """Records in a file, a JSON line each; only those of the same options count.

    A record is written once its piece of work is done. One that was cut short while it was
    written is passed over: its piece is done again.
    """

    def __init__(self, path: Path | None, same: Mapping[str, object]) -> None:
        """Read what is there.

        Args:
          path: the file; None to keep nothing.
          same: JSON-safe: what has to be equal for a record to be of use.
        """
        self._path, self._same = path, dict(same)
        self.records: list[dict[str, Any]] = []
        """Those of the same options, the oldest first."""
        if path is None or not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if told["same"] == self._same:
                self.records.append(told["done"])

    def add(self, done: Mapping[str, object]) -> None:
        """Keep a record, JSON-safe. Blocks. OSError where the file cannot be written."""
        self.records.append(dict(done))
        if self._path is not None:
            line = json.dumps({"same": self._same, "done": done})
            with self._path.open("a") as file:
                # On a line of its own, whatever an earlier call had begun to write.
                file.write(line + "\n" if self._ends_whole() else "\n" + line + "\n")

    def _ends_whole(self) -> bool:
        assert self._path is not None, "there is a file"
        return not self._path.stat().st_size or self._path.read_bytes().endswith(b"\n")
