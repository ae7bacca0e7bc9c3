"""A job on hosts of its own: network namespaces, an agent in each, and a coordinator in the first."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.children import Children, python
from benchmarks.hosts_agent import AGENTS, JOB, SECRET
from benchmarks.jobs import JobFailed, python_path
from ftkit.collectives.config import Transport
from ftkit.launch.config import JobConfig, new_job_id, new_secret
from ftkit.launch.event_tail import EventTail
from ftkit.session.parts import TRANSPORT

START_S = 120.0


class Network(Protocol):
    """`Wires`, or `Links`."""

    @property
    def addresses(self) -> list[str]: ...

    def command(self, host: int, command: Sequence[str], /) -> list[str]: ...


class HostsJob:
    """One job, one rank a host. Their memory is one, so they are told to leave it alone."""

    def __init__(
        self,
        network: Network,
        children: Children,
        folder: Path,
        command: Sequence[str],
        settings: Mapping[str, Any] = {},
    ) -> None:
        """Start it.

        Args:
          network: the hosts.
          children: whose processes they become.
          folder: for events and logs, with a folder `events` in it.
          command: what each rank runs.
          settings: further fields of its JobConfig.

        Raises:
          JobFailed: an agent did not start.
        """
        hosts = len(network.addresses)
        config = JobConfig(
            job=new_job_id(),
            command=tuple(command),
            nodes=hosts,
            nproc=1,
            run_dir=str(folder),
            rank_logs=True,
            preload=False,
            env={"PYTHONPATH": python_path(), TRANSPORT: Transport.TCP.value},
            **settings,
        )
        env = {JOB: config.to_json(), SECRET: new_secret()}
        module = ("-m", "benchmarks.hosts_agent")
        for host, address in enumerate(network.addresses):
            children.start(network.command(host, python(*module, "agent", str(host), address)), env)
        agents = [_address(folder / f"child-{host}.out") for host in range(hosts)]
        self.lead = children.start(
            network.command(0, python(*module, "coordinator")), env | {AGENTS: json.dumps(agents)}
        )
        self.events: list[dict[str, Any]] = []
        self._tail = EventTail(folder)

    def until(self, what: str, seconds: float, done: Callable[[], bool]) -> None:
        """Read events until `done()`. JobFailed when that takes too long."""
        end = time.monotonic() + seconds
        while not done():
            if self.lead.poll() is not None:
                raise JobFailed(f"the coordinator ended with {self.lead.returncode}: {what}")
            if time.monotonic() > end:
                raise JobFailed(f"after {seconds:g} s still not: {what}")
            self._read()

    def listen(self, seconds: float, done: Callable[[], bool]) -> None:
        """Read events for so long, or until `done()`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not done():
            self._read()

    def _read(self) -> None:
        time.sleep(0.02)
        self.events += self._tail.poll()


def _address(out: Path) -> list[object]:
    end = time.monotonic() + START_S
    while not out.read_text().strip():
        if time.monotonic() > end:
            raise JobFailed(f"an agent did not start: {out.with_suffix('.err').read_text()}")
        time.sleep(0.05)
    address: list[object] = json.loads(out.read_text())
    return address
