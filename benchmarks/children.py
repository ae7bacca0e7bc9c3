"""Children: plain processes that a benchmark starts beside ftkit's, and never leaves behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.jobs import ROOT, JobFailed, python_path

#: A second time, for those that do not heed the first signal.
GRACE_S = 5.0


class Children:
    """Processes that end with the `with` block, by SIGKILL at the latest."""

    def __init__(self, folder: Path) -> None:
        """Their output goes to files in `folder`, which must exist."""
        self._folder = folder
        self._all: list[subprocess.Popen[bytes]] = []
        self._outs: list[Path] = []

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start one, with `env` added to this process's environment and ftkit importable."""
        out = self._folder / f"child-{len(self._all)}.out"
        with out.open("wb") as stdout, out.with_suffix(".err").open("wb") as stderr:
            child = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": python_path(), **env},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=ROOT,
                start_new_session=True,
            )
        self._all.append(child)
        self._outs.append(out)
        return child

    def wait(self, timeout_s: float) -> list[dict[str, Any]]:
        """The last line of each one's output, as JSON, once all have ended well. Blocks.

        Raises:
          JobFailed: one failed, or did not end within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        for number, child in enumerate(self._all):
            try:
                code = child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise JobFailed(f"child {number} still runs after {timeout_s:.0f} s") from None
            if code:
                raise JobFailed(f"child {number} exited with {code}\n{self.errors(number)}")
        return [json.loads(out.read_text().splitlines()[-1]) for out in self._outs]

    def errors(self, number: int) -> str:
        """The end of what child `number` wrote to stderr."""
        return self._outs[number].with_suffix(".err").read_text(errors="replace")[-2000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for child in self._all:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
        for child in self._all:
            child.wait(GRACE_S)


def gloo_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set for one of `world` processes of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",  # as ftkit and torchrun do
    }


def free_port() -> int:
    """A port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def python(*arguments: str) -> tuple[str, ...]:
    """This interpreter, unbuffered."""
    return (sys.executable, "-u", *arguments)
