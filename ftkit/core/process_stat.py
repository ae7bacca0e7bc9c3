"""What `/proc/.../stat` says of a process of this host, or of one of its threads."""

from pathlib import Path

#: Letters of those who run nothing: stopped, traced, and ended.
_STOPPED = (b"T", b"t", b"Z", b"X")


def stat_fields(process: Path) -> list[bytes]:
    """What follows the name in the `stat` of a folder in /proc: first the state, a letter.

    OSError: the process or thread is gone.
    """
    # The name stands in parentheses and may hold anything, these included.
    return (process / "stat").read_bytes().rpartition(b")")[2].split()


def start_ticks(pid: int) -> int | None:
    """When a process was started, which tells it from another of the same number.

    In clock ticks since the host's boot, which no setting of the clock changes. None for one that
    has ended: a dead orphan stays a zombie for as long as nobody asks for its end.
    """
    try:
        fields = stat_fields(Path(f"/proc/{pid}"))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def all_stopped(pid: int) -> bool:
    """Whether no thread of a process runs: SIGSTOP has reached all of them, or they have ended.

    One thread takes the signal and then stops the others. Until it gets a core to do so, they go on.
    """
    try:
        return all(_is_stopped(thread) for thread in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return True


def _is_stopped(thread: Path) -> bool:
    try:
        return stat_fields(thread)[0] in _STOPPED
    except (FileNotFoundError, ProcessLookupError):
        return True
