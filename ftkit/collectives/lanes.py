"""LaneDesk: where a link's further connections wait until all of them are there.

The accepting side sees each connection on a thread of its own, in any order. The dialler
marks those of one link with the same random name; whoever greeted the first of them collects
the others here, so that a link is handed over whole or not at all. Thread-safe.
"""

import socket
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ftkit.core.errors import WireError
from ftkit.core.ids import MemberId

_NAME_BYTES = 16


class LaneKey(NamedTuple):
    """Names the lanes of one link."""

    peer: MemberId
    name: str


class LaneDesk:
    """See the module."""

    def __init__(self, patience_s: float) -> None:
        """Lanes that nobody collects within `patience_s` are closed."""
        self._patience_s = patience_s
        self._news = threading.Condition()
        self._lanes: dict[LaneKey, list[socket.socket]] = {}
        self._since: dict[LaneKey, float] = {}
        self._closed = False

    def bring(self, key: LaneKey, lane: socket.socket) -> None:
        """A lane that passed its greeting. Owned by the desk until it is collected."""
        with self._news:
            now = time.monotonic()
            for old in [k for k, since in self._since.items() if now - since > self._patience_s]:
                self._forget(old)
            if self._closed:
                lane.close()
                return
            self._since.setdefault(key, now)
            self._lanes.setdefault(key, []).append(lane)
            self._news.notify_all()

    def collect(self, key: LaneKey, count: int) -> tuple[socket.socket, ...]:
        """Wait for `count` lanes; they are the caller's.

        Raises:
          WireError: they did not all come in time. None of them stays open.
        """
        with self._news:
            self._news.wait_for(
                lambda: self._closed or len(self._lanes.get(key, ())) >= count, self._patience_s
            )
            found = len(self._lanes.get(key, ()))
            if self._closed or found < count:
                self._forget(key)
                raise WireError(
                    f"member {key.peer} opened {found} of {count} further connections in "
                    f"{self._patience_s} s"
                )
            del self._since[key]
            return tuple(self._lanes.pop(key))

    def close(self) -> None:
        """Close what was not collected, and end every wait."""
        with self._news:
            self._closed = True
            for key in list(self._lanes):
                self._forget(key)
            self._news.notify_all()

    def _forget(self, key: LaneKey) -> None:
        self._since.pop(key, None)
        for lane in self._lanes.pop(key, ()):
            lane.close()


def name_of(hello: Mapping[str, Any]) -> tuple[str, bool]:
    """The name of the link in a peer's hello, and whether it opens a further lane.

    Raises:
      WireError: it is none of ours.
    """
    name, further = hello.get("link"), hello.get("lane")
    if not isinstance(name, str) or len(name) > 2 * _NAME_BYTES or not isinstance(further, bool):
        raise WireError(f"a link's name is expected in a hello, not {name!r} and {further!r}")
    return name, further
