"""History: what became of jobs and nodes, one line each, for the jobs that come after.

A local path is one file to which all jobs append; a line is one write, so that two jobs do not mix
theirs. In an object store, which cannot append, each job has an object of its own. What is no record
is passed over when it is read: a full disk may have cut a line short.
"""

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftkit.core.errors import StoreError, UsageError
from ftkit.detection.offenders import OffenderConfig, Offenders
from ftkit.detection.retries import Attempt

#: More than this of one file is not read, from the end: years of faults.
READ_BYTES_MAX = 64 << 20
#: The longest line that is written or believed.
LINE_BYTES_MAX = 64 << 10

VERSION = 1

#: What was written by a clock further ahead than this is no record: against a year that has not
#: come, all faults that have are long forgotten.
AHEAD_S_MAX = 86400.0

Record = dict[str, Any]


class History:
    """Where records go and come from. Thread-safe; `append` and `read` block."""

    def __init__(self, where: str, job: str) -> None:
        """Use the file or store at `where`; records of `job` are appended."""
        self._where = where
        self._job = job
        self._remote = "://" in where and not where.startswith("file://")
        self._mine: list[bytes] = []

    def append(self, kind: str, *, at: float, **fields: object) -> None:
        """Add a record. `at` is Unix time in seconds.

        Raises:
          StoreError: it cannot be written; says why.
        """
        record = {"v": VERSION, "kind": kind, "at": round(at, 3), "job": self._job, **fields}
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        if len(line) > LINE_BYTES_MAX:
            raise StoreError(f"a record of {len(line)} bytes is no line of a history")
        if self._remote:
            from ftkit.checkpoint.persist.store import open_store

            self._mine.append(line)
            open_store(self._where).put(f"{self._job}.jsonl", b"".join(self._mine))
            return
        try:
            append_line(self._path, line)
        except OSError as error:
            raise StoreError(f"the history {self._where} cannot be written: {error}") from error

    def read(self) -> list[Record]:
        """Every record, in order of time; empty when there is no history yet.

        Records of more than a day ahead are left out.

        Raises:
          StoreError: it cannot be read.
        """
        if self._remote:
            from ftkit.checkpoint.persist.store import open_store

            store = open_store(self._where)
            try:
                blocks = [store.get(name) for name in store.names() if name.endswith(".jsonl")]
            except FileNotFoundError as error:  # removed since it was listed
                raise StoreError(f"the history {self._where} cannot be read: {error}") from error
        else:
            try:
                blocks = [read_tail(self._path)]
            except FileNotFoundError:
                return []
            except OSError as error:
                raise StoreError(f"the history {self._where} cannot be read: {error}") from error
        until = time.time() + AHEAD_S_MAX
        records = [r for block in blocks for r in _records(block) if 0 <= r["at"] <= until]
        return sorted(records, key=lambda r: float(r["at"]))

    @property
    def _path(self) -> Path:
        return Path(self._where.removeprefix("file://"))


def check_history(where: str) -> None:
    """Refuse a place that cannot be appended to, before anything starts.

    Raises:
      UsageError: it is a folder, a link, a device, or not ours to write to.
    """
    if not where or "://" in where:
        return
    path = Path(where)
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise UsageError(f"--history {where}: {path.parent} is no folder to write to") from None
        return
    except OSError as error:
        raise UsageError(f"--history {where}: {error}") from error
    if not stat.S_ISREG(mode) or not os.access(path, os.R_OK | os.W_OK):
        raise UsageError(f"--history {where} is not a file that this user can append to")


def fleet(records: list[Record], config: OffenderConfig) -> Offenders:
    """The nodes and their faults, as the records tell them."""
    known = Offenders(config)
    for record in records:
        at = float(record["at"])
        if record["kind"] == "job":
            for node in record["nodes"]:
                known.seen(node, at)
        elif record["kind"] == "fault":
            known.fault(record["node"], at)
    return known


def attempts(records: list[Record]) -> list[Attempt]:
    """Every start of a job that has ended, or that another start shows to be over."""
    ends = {r["job"]: r for r in records if r["kind"] == "end"}
    # A coordinator that took over from another has written a second one.
    starts = {r["job"]: r for r in reversed(records) if r["kind"] == "job"}
    return [
        Attempt(
            chain=r["chain"],
            started=float(r["at"]),
            trained=bool(end["trained"]) if (end := ends.get(r["job"])) else False,
            # No word of its end: whoever was to write it is gone.
            failed=int(end["code"]) != 0 if end else True,
        )
        for r in starts.values()
    ]


#: What each kind of record must have, and of which type.
_FIELDS: Mapping[str, Mapping[str, type]] = {
    "job": {"job": str, "chain": str, "nodes": list},
    "fault": {"job": str, "node": str, "fault": str},
    "end": {"job": str, "code": int, "trained": bool},
}


def _records(block: bytes) -> Iterator[Record]:
    return (r for r in json_lines(block) if r is not None and _sound(r))


def _sound(record: Record) -> bool:
    fields = _FIELDS.get(str(record.get("kind")))
    at = record.get("at")
    return (
        fields is not None
        and record.get("v") == VERSION
        and isinstance(at, int | float)
        and not isinstance(at, bool)
        and all(isinstance(record.get(name), kind) for name, kind in fields.items())
        and all(isinstance(node, str) for node in record.get("nodes", ()))
    )


def json_lines(block: bytes) -> Iterator[dict[str, Any] | None]:
    """The object of each line that is not empty; None for a line that is too long, or is none."""
    for line in block.split(b"\n"):
        if not line.strip():
            continue
        value = None
        if len(line) <= LINE_BYTES_MAX:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
        yield value if isinstance(value, dict) else None


def append_line(path: Path, line: bytes) -> None:
    """One write to the end of a file that is ours and no link, on the disk when it returns. OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is no regular file")
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line  # a full disk cut the last one short: only that one is lost
        done = os.write(fd, line)
        if done != len(line):
            raise OSError(f"only {done} of {len(line)} bytes of a record were written")
        os.fsync(fd)
    finally:
        os.close(fd)


def read_tail(path: Path) -> bytes:
    """The last `READ_BYTES_MAX` of a file that is no link, from the start of a line on. OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        start = max(0, size - READ_BYTES_MAX)
        with os.fdopen(os.dup(fd), "rb") as file:
            file.seek(start)
            data = file.read(size - start)
    finally:
        os.close(fd)
    return data if not start else data[data.find(b"\n") + 1 :]
