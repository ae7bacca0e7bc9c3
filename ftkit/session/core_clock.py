"""CoreClock: how long a thread could have run and was given no core, as the kernel counts it."""

import os
import threading


class CoreClock:
    """Reads one thread's /proc/.../schedstat: its second number is time on a run queue, in ns.

    Counts preemption by other processes and a cgroup's quota, not what a hypervisor takes.
    """

    def __init__(self) -> None:
        """Watch the calling thread."""
        try:
            self._fd = os.open(
                f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY | os.O_CLOEXEC
            )
        except OSError:
            self._fd = -1  # a kernel without it: nobody is ever called starved

    def starved_s(self) -> float:
        """Seconds so far; 0 where the kernel does not say. Costs 1 to 2 µs."""
        if self._fd < 0:
            return 0.0
        return int(os.pread(self._fd, 64, 0).split()[1]) / 1e9

    def close(self) -> None:
        """Let go. May be called twice; it reads 0 from then on."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
