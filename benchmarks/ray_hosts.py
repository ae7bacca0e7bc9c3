"""RayHosts: a Ray cluster of network namespaces, a raylet in each; hosts die whole, and come back."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from benchmarks.children import Children
from benchmarks.hosts import Hosts
from benchmarks.jobs import JobFailed, python_path
from ftkit.collectives.config import Transport
from ftkit.session.parts import TRANSPORT

PORT, DASHBOARD_PORT = 6379, 8265
START_S = 120.0


class RayHosts:
    """`with RayHosts(3, folder) as cluster:` The first host is Ray's head. Needs root, and `ip`."""

    def __init__(self, count: int, folder: Path, *, jobs: bool = False) -> None:
        """Describe it.

        Args:
          count: of hosts.
          folder: exists; for Ray's session, whose sockets' paths have to be short, and all output.
          jobs: whether its head takes them (`ray job submit`), for which Ray's dashboard runs there.
        """
        self.hosts = Hosts(count)
        self._folder = folder
        self._jobs = jobs
        self._children = Children(folder)
        # Hosts of one machine have one memory: ranks are told to leave it alone.
        self.env: dict[str, str] = {
            "RAY_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": python_path(),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            TRANSPORT: Transport.TCP.value,
        }

    @property
    def address(self) -> str:
        """Of the cluster, as its hosts see it."""
        return f"{self.hosts.addresses[0]}:{PORT}"

    @property
    def jobs_url(self) -> str:
        """Where `ray job submit` finds the head."""
        return f"http://{self.hosts.addresses[0]}:{DASHBOARD_PORT}"

    def join(self, host: int, *options: str) -> None:
        """Start the raylet of a host that has none; `options` are `ray start`'s. Blocks until it runs.

        Raises:
          JobFailed: it did not start.
        """
        where = f"--address={self.address}"
        if host == 0:
            where = f"--head --port={PORT} --temp-dir={self._folder}"
            where += f" --include-dashboard={self._jobs} --dashboard-host={self.hosts.addresses[0]}"
        command = ["ray", "start", *where.split(), "--disable-usage-stats", "--num-cpus=1"]
        command += [f"--node-ip-address={self.hosts.addresses[host]}"]
        command += ["--object-store-memory=80000000", *options]
        # Not --block: what it starts is not ours to wait for, and ends with the host.
        done = subprocess.run(
            self.hosts.command(host, command),
            env=self.environ(),
            capture_output=True,
            text=True,
            timeout=START_S,
            check=False,
        )
        if done.returncode:
            raise JobFailed(f"no raylet on host {host}: {done.stdout[-1000:]}{done.stderr[-1000:]}")

    def start(
        self, host: int, command: Sequence[str], env: Mapping[str, str] = {}
    ) -> subprocess.Popen[bytes]:
        """Start a process on a host, with the cluster in its environment."""
        return self._children.start(self.hosts.command(host, command), {**self.env, **env})

    def environ(self) -> dict[str, str]:
        """The environment of whatever runs on a host."""
        own = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")}
        return own | {n: v for n, v in self.env.items() if n != "RAY_ADDRESS"}

    def kill(self, host: int) -> float:
        """SIGKILL to everything that runs on a host. Returns when, on the monotonic clock."""
        at = time.monotonic()
        while pids := self.hosts.pids(host):
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it went with another
            time.sleep(0.01)
        return at

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.hosts)
            stack.enter_context(self._children)
            for host in range(len(self.hosts.addresses)):
                stack.callback(self.kill, host)
                self.join(host)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
