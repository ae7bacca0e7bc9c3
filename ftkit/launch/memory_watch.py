"""MemoryWatch: whether the kernel's OOM killer has struck lately, here or on the whole host.

Linux counts its kills for each memory control group, and for the host in /proc/vmstat. A kill is
counted before the process is gone, so what is compared is now against some seconds ago.
"""

from collections import deque
from collections.abc import Mapping
from pathlib import Path

#: A process of many gigabytes takes seconds to be gone after it was killed.
LATELY_S = 10.0


class MemoryWatch:
    """Owned by the agent's main thread; a sample costs some ten microseconds."""

    def __init__(self, now: float, *, root: Path = Path("/")) -> None:
        """Take the first sample. `root` is where /proc and /sys are."""
        self._vmstat = root / "proc/vmstat"
        self._group = _group_file(root)
        self._samples: deque[tuple[float, Mapping[str, int]]] = deque([(now, self._read())])

    def sample(self, now: float) -> None:
        """Note the counts as they are. Call about once a second."""
        self._samples.append((now, self._read()))
        while len(self._samples) > 1 and self._samples[1][0] < now - LATELY_S:
            self._samples.popleft()

    def kills(self, now: float) -> str:
        """What happened in the last `LATELY_S`, in words; "" when nothing did."""
        before, after = self._samples[0][1], self._read()
        for where in ("its control group", "this host"):
            struck = after.get(where, 0) - before.get(where, 0)
            if struck > 0:
                times = "once" if struck == 1 else f"{struck} times"
                span_s = now - self._samples[0][0]
                return f"the kernel's OOM killer struck {times} in {where} within {span_s:.1f} s"
        return ""

    def _read(self) -> dict[str, int]:
        counts = {"this host": _count(self._vmstat)}
        if self._group is not None:
            counts["its control group"] = _count(self._group)
        return {where: count for where, count in counts.items() if count is not None}


def _group_file(root: Path) -> Path | None:
    """The file of this process's memory control group that counts kills: v2, or v1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    mounted = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, where = line.split(":", 2)
        if controllers == "":
            candidates = [mounted / where.lstrip("/") / "memory.events", mounted / "memory.events"]
        elif "memory" in controllers.split(","):
            v1 = mounted / "memory"
            candidates = [v1 / where.lstrip("/") / "memory.oom_control", v1 / "memory.oom_control"]
        else:
            continue
        for path in candidates:
            if _count(path) is not None:
                return path
    return None


def _count(path: Path) -> int | None:
    """The number after "oom_kill"; None when there is no such file, or no such line."""
    try:
        for line in path.read_text().splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    except (OSError, ValueError):
        pass
    return None
