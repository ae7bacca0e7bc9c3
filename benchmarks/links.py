"""Links: one network namespace a rank, and a switch between, every port limited both ways."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

_NETWORK = "10.77.0"


class Links:
    """`with Links(3, "200mbit") as links:` Needs root, `ip` and `tc`; see `possible`."""

    def __init__(self, size: int, rate: str) -> None:
        """Make the namespaces when entered.

        Args:
          size: ranks.
          rate: of each port, in and out, as tc writes it.
        """
        self._size, self._rate = size, rate
        self._name = f"fb{os.getpid() % 100_000}"
        self._undo = ExitStack()

    @staticmethod
    def possible() -> bool:
        """Whether this process may make namespaces."""
        return os.geteuid() == 0 and bool(shutil.which("ip")) and bool(shutil.which("tc"))

    @property
    def addresses(self) -> list[str]:
        return [self.host(rank) for rank in range(self._size)]

    def host(self, rank: int) -> str:
        return f"{_NETWORK}.{rank + 1}"

    def device(self, rank: int) -> str:
        """The interface of `rank`."""
        return f"{self._name}a{rank}"

    def inside(self, rank: int) -> tuple[str, ...]:
        """What to put before a command to run it at `rank`."""
        return ("ip", "netns", "exec", f"{self._name}n{rank}")

    def command(self, rank: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run at `rank`."""
        return [*self.inside(rank), *command]

    def carried(self, rank: int) -> int:
        """Bytes that left `rank` so far."""
        return sent_bytes(f"{self._name}n{rank}", self.device(rank))

    def __enter__(self) -> Self:
        try:
            self._namespace(switch := f"{self._name}sw")
            _ip(switch, "link add br0 type bridge")
            _ip(switch, "link set br0 up")
            for rank in range(self._size):
                self._port(switch, rank)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._undo.close()

    def _namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        # A namespace takes its devices along, and a veth its other end.
        self._undo.callback(_run, "ip", "netns", "del", name)

    def _port(self, switch: str, rank: int) -> None:
        self._namespace(node := f"{self._name}n{rank}")
        near, far = self.device(rank), f"{self._name}b{rank}"
        _run("ip", "link", "add", near, "netns", node, "type", "veth", "peer", far, "netns", switch)
        _ip(node, "link set lo up")
        _ip(node, f"addr add {self.host(rank)}/24 dev {near}")
        _ip(node, f"link set {near} up")
        _ip(switch, f"link set {far} master br0")
        _ip(switch, f"link set {far} up")
        for name, device in ((node, near), (switch, far)):
            limit = f"qdisc add dev {device} root tbf rate {self._rate} burst 256kb latency 200ms"
            _run("tc", "-n", name, *limit.split())


def sent_bytes(namespace: str, device: str) -> int:
    """Bytes that a device of a network namespace has sent so far."""
    shown = subprocess.run(
        ["ip", "-n", namespace, "-s", "-j", "link", "show", "dev", device],
        capture_output=True, check=True, text=True,
    )  # fmt: skip
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])


def _ip(namespace: str, command: str) -> None:
    _run("ip", "-n", namespace, *command.split())


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=20)
