"""Commands: how other threads have something done on the communication thread, and wake it.

A thread that looks for commands before it sleeps need not be woken while it is awake, which
saves most calls into the kernel. In this order nothing is missed: `asleep` comes before the
last look, a command is in the queue before its giver looks whether we sleep.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable

Command = Callable[[], None]

#: As `os.eventfd_write`, but keeps the GIL: let go of, it would be taken by the thread that is woken,
#: and the giver, in the middle of backward, would wait for it.
_write = ctypes.PyDLL(None, use_errno=True).eventfd_write
_write.argtypes = (ctypes.c_int, ctypes.c_uint64)


class Commands:
    """See the module. `give` may be called from any thread, the rest from the one that obeys."""

    def __init__(self, guard: Callable[[Command], None]) -> None:
        """Carry each command out under `guard`, which lets no expected error through."""
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Written to when a command was given to a sleeper. Watch its edge; it is never read."""
        self._guard = guard
        self._queue: deque[Command] = deque()
        self._awake = False
        self._over = False
        self._lock = threading.Lock()

    def give(self, command: Command) -> None:
        """Have `command` carried out soon. Does not block."""
        self._queue.append(command)
        if self._awake:
            return
        with self._lock:
            if not self._over:
                if _write(self.wake_fd, 1):
                    raise OSError(ctypes.get_errno(), "cannot wake the communication thread")
                return
        # Nobody obeys any more; what is left only fails handles and closes sockets.
        self.obey()

    def later(self, command: Command) -> None:
        """(own thread) Have `command` carried out in this turn or the next."""
        self._queue.append(command)

    def obey(self) -> None:
        """Carry out all there are."""
        while True:
            try:
                command = self._queue.popleft()
            except IndexError:
                return
            self._guard(command)

    def asleep(self) -> bool:
        """From now on `give` wakes us. Whether commands are waiting already."""
        self._awake = False
        return bool(self._queue)

    def awake(self) -> None:
        """From now on it need not: we look before we sleep."""
        self._awake = True

    @property
    def over(self) -> bool:
        """Whether commands are carried out by whoever gives them."""
        return self._over

    def close(self) -> None:
        """Obey a last time; from here on givers carry out themselves what they ask for."""
        self._awake = False
        with self._lock:
            self._over = True
            os.close(self.wake_fd)
        self.obey()

    def let_go(self) -> None:
        """(in a forked child) Forget what the parent was asked; see `forks`."""
        self._lock = threading.Lock()
        self._awake, self._over = False, True
        self._queue.clear()
        os.close(self.wake_fd)
