"""Wires: hosts as network namespaces with a wire of its own between each two. Needs root."""

import itertools
import os
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from benchmarks.links import sent_bytes

#: What a wire may send at once before its rate counts, and how long it may queue.
_BURST, _QUEUE = "128kb", "400ms"


class Wires:
    """`count` hosts for the length of a `with` block; nothing of them stays."""

    def __init__(
        self, count: int, mbit: int, slow: Mapping[tuple[int, int], int] | None = None
    ) -> None:
        """Name them; they are made on entry.

        Args:
          count: hosts.
          mbit: rate of each wire in each direction.
          slow: another rate for some, by (lower host, higher host).
        """
        tag = f"fw{os.getpid() % 100_000}"
        self._names = [f"{tag}h{i}" for i in range(count)]
        self._rates = dict.fromkeys(itertools.combinations(range(count), 2), mbit)
        self._rates |= slow or {}
        self.addresses = [f"10.98.0.{i + 1}" for i in range(count)]

    @staticmethod
    def available() -> bool:
        """Whether this process may make namespaces, and limit what goes out of them."""
        try:
            with Wires(2, 100):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run on a host."""
        return ["ip", "netns", "exec", self._names[host], *command]

    def limit(self, here: int, there: int, mbit: int) -> None:
        """From now on what leaves one host for another goes at this rate."""
        self._tc("change", here, there, mbit)

    def carried(self, here: int, there: int) -> int:
        """Bytes that left one host for another so far."""
        return sent_bytes(self._names[here], f"{self._names[here]}{there}")

    def __enter__(self) -> Self:
        try:
            for name, address in zip(self._names, self.addresses, strict=True):
                _run("ip", "netns", "add", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
                _run("ip", "-n", name, "addr", "add", f"{address}/32", "dev", "lo")
            for (a, b), mbit in self._rates.items():
                ends = [(a, b, f"{self._names[a]}{b}"), (b, a, f"{self._names[b]}{a}")]
                _run("ip", "link", "add", ends[0][2], "type", "veth", "peer", "name", ends[1][2])
                for here, there, device in ends:
                    self._plug(here, there, device, mbit)
        except BaseException:
            self._remove()
            raise
        return self

    def _plug(self, here: int, there: int, device: str, mbit: int) -> None:
        name = self._names[here]
        _run("ip", "link", "set", device, "netns", name)
        _run("ip", "-n", name, "link", "set", device, "up")
        _run(
            "ip", "-n", name, "route", "add", f"{self.addresses[there]}/32", "dev", device,
            "src", self.addresses[here],
        )  # fmt: skip
        self._tc("add", here, there, mbit)

    def _tc(self, what: str, here: int, there: int, mbit: int) -> None:
        name = self._names[here]
        _run(
            "tc", "-n", name, "qdisc", what, "dev", f"{name}{there}", "root", "tbf",
            "rate", f"{mbit}mbit", "burst", _BURST, "latency", _QUEUE,
        )  # fmt: skip

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*words: str) -> None:
    subprocess.run(words, capture_output=True, check=True, text=True)
