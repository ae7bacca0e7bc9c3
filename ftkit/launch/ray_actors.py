"""The two actors of the Ray engine: hosts for an agent and for a coordinator.

Plain classes, to which Ray tells the machine's address and takes metrics; `ray_engine` makes actors
of them. The job's secret comes in a method call, never in a constructor: Ray's control store keeps constructor
arguments, while those of a call go straight from process to process.
"""

import os
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ftkit.core.errors import UsageError
from ftkit.core.ids import NodeId
from ftkit.launch.agent import Agent
from ftkit.launch.config import JobConfig
from ftkit.launch.coordinator import Coordinator
from ftkit.launch.logs import log_to_stderr

#: What belongs to a machine, so that the driver's value says nothing to another one.
OF_THE_NODE = ("HOSTNAME", "TMPDIR", "XDG_RUNTIME_DIR")


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """What an agent says once it listens."""

    host: str
    port: int
    hostname: str
    """Of the machine, as it calls itself."""
    pid: int
    shares_run_dir: bool
    """Whether the driver's run directory is this node's too."""


class AgentHost:
    """Hosts the agent of one node, on a thread of its own that lives as long as the agent.

    The kernel kills ranks when the thread that started them ends, which Ray's own threads
    may do at any time; the agent's thread ends with the agent or with this process.
    Ray calls the methods on several threads at once.
    """

    def __init__(self) -> None:
        self._agent: Agent | None = None
        self._thread: threading.Thread | None = None

    def free_port(self) -> int:
        """A port that nobody uses on this node."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    def start(
        self,
        config: str,
        node: int,
        secret: str,
        *,
        host: str,
        port: int,
        environ: Mapping[str, str],
        python: str,
    ) -> Started:
        """Start the agent; return once it listens.

        Args:
          config: the job, as `JobConfig.to_json`.
          node: this node's number.
          secret: the job's secret in hexadecimal.
          host: the address to listen on; empty for the one by which Ray knows this machine.
          port: the port the agent before this one had, taken if it is free; 0 takes any.
          environ: the driver's environment.
          python: the driver's interpreter; where the job's command begins with it, this
            node's own takes its place.

        Raises:
          UsageError: the job's working directory does not exist here.
          OSError: the run directory cannot be written, or `host` is not this machine's.
          CapacityError: shared memory is full.
        """
        job = JobConfig.from_json(config)
        log_to_stderr(quiet=job.quiet)
        if job.cwd and not Path(job.cwd).is_dir():
            raise UsageError(
                f"node {node} ({socket.gethostname()}) has no directory {job.cwd}; start from a "
                "file system that all nodes share, or by `ray job submit --working-dir`"
            )
        host = host or _ray_address()
        shared = marker(Path(job.run_dir), job.job).exists()
        if job.command[0] == python:
            job = replace(job, command=(sys.executable, *job.command[1:]))
        job = replace(job, rank_logs=job.rank_logs or shared)
        agent = Agent(
            job,
            NodeId(node),
            secret,
            host=host,
            port=port,
            inherited=rank_inheritance(os.environ, environ),
        )
        self._agent = agent
        self._thread = threading.Thread(target=self._run, args=(agent,), name="ftkit-agent")
        self._thread.daemon = True
        self._thread.start()
        bound_host, bound_port = agent.address
        return Started(
            host=bound_host,
            port=bound_port,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            shares_run_dir=shared,
        )

    def ended(self) -> tuple[int, str] | None:
        """Wait for the agent's end.

        Returns:
          The job's exit code and reason; None if the agent ended before the job did: it was
          stopped, or an error ended it, which Ray's log of this process shows.
        """
        assert self._thread is not None, "start() came first"
        assert self._agent is not None, "a thread runs it"
        self._thread.join()
        stop = self._agent.outcome
        return None if stop is None else (stop.code, stop.reason)

    def drain(self) -> None:
        """The machine is about to be taken away: the agent's ranks leave, and then it ends."""
        if self._agent is not None:
            self._agent.drain()

    def stop(self) -> None:
        """End the agent at once, killing its ranks; its shared memory is removed."""
        if self._agent is not None:
            self._agent.stop()

    def _run(self, agent: Agent) -> None:
        # Ray runs its workers at nice 15, and ranks would inherit it from this thread.
        try:
            os.setpriority(os.PRIO_PROCESS, 0, 0)
        except PermissionError:
            pass  # only root may; `RAY_worker_niceness=0` at `ray start` does it for others
        from ftkit.launch.ray_metrics import RayMetrics

        told = RayMetrics(agent.metrics.values)
        try:
            agent.run()
        finally:
            told.close()


class CoordinatorHost:
    """Hosts one coordinator. `run` blocks a thread of Ray's while others are free to call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coordinator: Coordinator | None = None
        self._interrupted = ""

    def pid(self) -> int:
        """The process to kill for a drill."""
        return os.getpid()

    def run(
        self, config: str, secret: str, agents: Sequence[tuple[str, int]], number: int
    ) -> tuple[int, str]:
        """Lead the job to its end. Returns its exit code and the reason."""
        job = JobConfig.from_json(config)
        log_to_stderr(quiet=job.quiet)
        coordinator = Coordinator(job, secret, agents, number=number)
        with self._lock:
            self._coordinator = coordinator
            if self._interrupted:
                coordinator.interrupt(self._interrupted)
        stop = coordinator.run()
        return stop.code, stop.reason

    def interrupt(self, reason: str) -> None:
        """End the job in order, even when `run` has not begun."""
        with self._lock:
            self._interrupted = reason
            if self._coordinator is not None:
                self._coordinator.interrupt(reason)


def marker(run_dir: Path, job: str) -> Path:
    """The file by which a node sees that the driver's run directory is its own."""
    return run_dir / "events" / f".{job}"


def rank_inheritance(node: Mapping[str, str], driver: Mapping[str, str]) -> dict[str, str]:
    """What ranks inherit: the driver's environment, on top of the node's.

    What belongs to the machine stays the node's, the accelerators that Ray gave the agent
    among them. What Ray set for its own processes is left out: ranks are not Ray's.
    """
    own = {
        name: value
        for name, value in node.items()
        if name in OF_THE_NODE or name.endswith("_VISIBLE_DEVICES")
    }
    return {
        name: value
        for name, value in {**node, **driver, **own}.items()
        if not name.startswith("RAY_")
        and not (name == "PYTHONBREAKPOINT" and value.startswith("ray."))
    }


def _ray_address() -> str:
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
