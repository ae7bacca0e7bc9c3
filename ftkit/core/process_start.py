"""When a process of this host was started: what tells it from another of the same number."""

from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """In clock ticks since the host's boot, which no setting of the clock changes.

    None for one that has ended: a dead orphan stays a zombie for as long as nobody asks for its end.
    """
    try:
        stat = (Path("/proc") / str(pid) / "stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name stands in parentheses and may hold anything, these included.
    fields = stat.rpartition(b")")[2].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])
