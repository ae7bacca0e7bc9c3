"""Work: how torch waits for one of our operations.

Two traps of torch shape it. An exception stored in a Future by `set_exception` is read by
C++ as a tensor list and kills the process; so errors are raised by a `then` callback, which
torch turns into a RuntimeError. And a Future costs more than a small operation; so it is
built only when somebody asks for it (DDP and functional collectives do).
"""

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ftkit.collectives.handle import Handle, finished


class FtkitWork(dist.Work):  # type: ignore[misc,unused-ignore]
    """One operation in flight. `result` is what its Future holds."""

    def __init__(self, handle: Handle[Any], result: object, abort: Callable[[str], None]) -> None:
        super().__init__()
        self._handle = handle
        self._result = result
        self._abort = abort
        self._future: torch.futures.Future[Any] | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the operation ended.

        Raises:
          GenerationAborted: the generation ended first.
          TimeoutError: `timeout` passed; the generation is aborted, because the memory of
            an operation that nobody waits for any more cannot be taken back otherwise.
        """
        limit_s = timeout.total_seconds() if timeout is not None else 0.0
        try:
            self._handle.wait(limit_s if limit_s > 0 else None)
        except TimeoutError:
            self._abort(f"an operation did not end within the {limit_s} s its caller allowed")
            raise
        return True

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._handle.done()

    def is_success(self) -> bool:
        return self._handle.done() and self._handle.error is None

    def exception(self) -> Exception | None:
        return self._handle.error

    def result(self) -> Any:
        return self._result

    def _source_rank(self) -> int:
        source = self._handle.source
        return -1 if source is None else source

    def source_rank(self) -> int:
        return self._source_rank()

    def get_future(self) -> torch.futures.Future[Any]:
        if self._future is None:
            handle, result = self._handle, self._result

            def settle(_: torch.futures.Future[None]) -> Any:
                if handle.error is not None:
                    raise handle.error
                return result

            base: torch.futures.Future[None] = torch.futures.Future()
            self._future = base.then(settle)
            handle.add_done_callback(lambda _: base.set_result(None))
        return self._future


def join(handles: Sequence[Handle[Any]]) -> Handle[None]:
    """A handle that ends when all have ended; with the first error, if any failed."""
    if not handles:
        return finished(None)
    if len(handles) == 1:
        return handles[0]
    joined: Handle[None] = Handle()
    left = len(handles)
    lock = threading.Lock()

    def count(_: Handle[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            error = next((h.error for h in handles if h.error is not None), None)
            if error is None:
                joined.finish(None)
            else:
                joined.fail(error)

    for handle in handles:
        handle.add_done_callback(count)
    return joined
