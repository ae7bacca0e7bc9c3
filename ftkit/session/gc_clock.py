"""GcClock: how long Python's garbage collector has kept this process."""

import gc
import time


class GcClock:
    """Counts from now on until `close`. Costs nothing between two collections."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._began = 0.0
        gc.callbacks.append(self._note)

    def seconds(self) -> float:
        """Time spent in collections, whichever thread they struck: all threads wait for one."""
        return self._seconds

    def close(self) -> None:
        """Count no more. May be called twice."""
        if self._note in gc.callbacks:
            gc.callbacks.remove(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        """(gc callback) Collections never nest and hold the interpreter from start to stop."""
        if phase == "start":
            self._began = time.monotonic()
        else:
            self._seconds += time.monotonic() - self._began
