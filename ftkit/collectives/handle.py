"""Handle: an operation in flight, which ends in a value or an error, once."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from ftkit.core.errors import UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

#: identity of every communication thread: waiting there would wait for itself.
COMM_THREADS: set[int] = set()


class _Blocked(threading.local):
    seconds = 0.0


_blocked = _Blocked()


def blocked_s() -> float:
    """Seconds that the calling thread has been blocked in `Handle.wait`, all told."""
    return _blocked.seconds


class Handle(Generic[T]):
    """The result of one operation. Completed once, by the communication thread."""

    __slots__ = ("_callbacks", "_done", "_error", "_gate", "_lock", "_value", "source")

    def __init__(self) -> None:
        # A raw lock, held until completion, is the cheapest thing a thread can wait on.
        self._gate = threading.Lock()
        self._gate.acquire()
        self._lock = threading.Lock()
        self._done = False
        self._value: T | None = None
        self._error: Exception | None = None
        self._callbacks: list[Callable[[Handle[T]], None]] = []
        self.source: int | None = None
        """For a receive: the rank it came from."""

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done

    @property
    def error(self) -> Exception | None:
        """Why it failed; None while pending or when it succeeded."""
        return self._error

    def wait(self, timeout_s: float | None = None) -> T:
        """Block until it ends, and return its value.

        Raises:
          GenerationAborted: the generation ended first.
          TimeoutError: still pending after `timeout_s`; its memory is still in use.
          UsageError: called on the communication thread, which would wait for itself.
        """
        if not self._done:
            if threading.get_ident() in COMM_THREADS:
                raise UsageError(
                    "a callback of an operation waited for another operation; callbacks run "
                    "on the communication thread and must not block"
                )
            began = time.monotonic()
            came = self._gate.acquire(timeout=-1 if timeout_s is None else max(timeout_s, 0.0))
            _blocked.seconds += time.monotonic() - began
            if not came:
                raise TimeoutError(f"operation still pending after {timeout_s} s")
            self._gate.release()
        if self._error is not None:
            raise self._error
        return cast("T", self._value)

    def add_done_callback(self, callback: Callable[["Handle[T]"], None]) -> None:
        """Call `callback(self)` at completion, on the communication thread; now, if done."""
        with self._lock:
            if not self._done:
                self._callbacks.append(callback)
                return
        callback(self)

    def then(self, convert: Callable[[T], U]) -> "Handle[U]":
        """A handle for `convert(value)`; errors, also those of `convert`, pass through."""
        result: Handle[U] = Handle()

        def relay(handle: Handle[T]) -> None:
            if handle._error is not None:
                result.fail(handle._error)
                return
            try:
                value = convert(cast("T", handle._value))
            except Exception as error:  # noqa: BLE001 - whatever it is, it reaches who waits
                result.fail(error)
            else:
                result.finish(value)

        self.add_done_callback(relay)
        return result

    def finish(self, value: T) -> None:
        """Complete with a value. A handle that has ended stays as it is."""
        self._end(value, None)

    def fail(self, error: Exception) -> None:
        """Complete with an error. A handle that has ended stays as it is."""
        self._end(None, error)

    def _end(self, value: T | None, error: Exception | None) -> None:
        with self._lock:
            if self._done:
                return
            self._value, self._error, self._done = value, error, True
            callbacks, self._callbacks = self._callbacks, []
        self._gate.release()
        for callback in callbacks:
            try:
                callback(self)
            except Exception:
                # Somebody else's bug must not stop everybody's communication.
                logger.exception("a callback of an operation raised")


def finished(value: T) -> Handle[T]:
    """A handle that is done already."""
    handle: Handle[T] = Handle()
    handle.finish(value)
    return handle


def failed(error: Exception) -> "Handle[T]":
    """A handle that has failed already."""
    handle: Handle[T] = Handle()
    handle.fail(error)
    return handle
