"""Hosts: network namespaces on one bridge, each with an address of its own. Needs root, and `ip`."""

import os
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self


class Hosts:
    """`count` hosts of one network for the length of a `with` block; nothing of them stays."""

    def __init__(self, count: int) -> None:
        """Name them; they are made on entry."""
        tag = f"fb{os.getpid() % 100_000}"
        self._switch = f"{tag}s"
        self._names = [f"{tag}h{i}" for i in range(count)]
        self.addresses = [f"10.99.0.{i + 1}" for i in range(count)]

    @staticmethod
    def available() -> bool:
        """Whether this process may make namespaces."""
        name = f"fb{os.getpid() % 100_000}p"
        try:
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
        except FileNotFoundError:
            return False
        if made.returncode:
            return False
        _ip("netns", "del", name)
        return True

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on a host."""
        return ["ip", "netns", "exec", self._names[host], *command]

    def pids(self, host: int) -> list[int]:
        """What runs on a host."""
        told = subprocess.run(
            ["ip", "netns", "pids", self._names[host]], capture_output=True, check=True, text=True
        )
        return [int(pid) for pid in told.stdout.split()]

    def cut(self, host: int, *, whole: bool = False) -> None:
        """Cut the host's link, or make it whole again: neither end is told."""
        _ip("-n", self._switch, "link", "set", f"{self._names[host]}f", "up" if whole else "down")

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for i, name in enumerate(self._names):
                _ip("netns", "add", name)
                _ip("-n", name, "link", "set", "lo", "up")
                near, far = f"{name}n", f"{name}f"
                _ip("link", "add", near, "type", "veth", "peer", "name", far)
                _ip("link", "set", near, "netns", name)
                _ip("-n", name, "link", "set", near, "name", "eth0")
                _ip("-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
                _ip("link", "set", far, "netns", self._switch)
                _ip("-n", self._switch, "link", "set", far, "master", "br0")
                _ip("-n", self._switch, "link", "set", far, "up")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in (*self._names, self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], capture_output=True, check=True, text=True)
