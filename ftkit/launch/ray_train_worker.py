"""In a Ray Train worker: the agent of its ranks, the function for them, their reports.

Everything here runs in the worker's process, of which there is one for each node: the controller
has `place`, `start_agent`, `drain_agent`, `job_over` and `stop_agent` called there, and `train_in_ranks` is what
Ray Train takes for the training function, on a thread of its own.
"""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train

from ftkit.core.errors import FtkitError, UsageError
from ftkit.core.ids import NodeId
from ftkit.launch.config import JobConfig
from ftkit.launch.ray_actors import AgentHost
from ftkit.launch.ray_train_rank import REPORTS, hand_over, newest

logger = logging.getLogger(__name__)

#: Between two looks whether training has ended.
LOOK_S = 0.2
#: How long the last report may take: Ray Train takes one every two seconds.
LAST_REPORT_S = 10.0
#: After a report that Ray Train did not take.
AGAIN_S = 0.5


class JobFailed(FtkitError):
    """The job of a Ray Train run failed, as each of its workers says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a worker is."""

    node: int
    """Its world rank, as Ray Train counts workers; its number as a node."""
    host: str
    """Address of its machine."""
    port: int
    """A port that nobody used there."""
    storage: str
    """Ray Train's folder for this run; empty where its storage is no folder of this machine."""


@dataclass(slots=True, kw_only=True)
class _Here:
    """What this worker hosts."""

    agent: AgentHost | None = None
    folder: Path = Path()
    """The shared memory of the agent's node."""
    over: tuple[int, str] | None = None
    """The job's exit code and reason, where the controller had to tell."""
    drained: bool = False
    """The machine is about to be taken away."""
    stopped: threading.Event = field(default_factory=threading.Event)
    """The controller wants the agent to end."""


_here = _Here()


def place() -> Place:
    """Where this worker is."""
    return Place(
        node=ray.train.get_context().get_world_rank(),
        host=str(ray.util.get_node_ip_address()),  # type: ignore[no-untyped-call]
        port=AgentHost().free_port(),
        storage=_storage(),
    )


def sees(path: str) -> bool:
    """Whether there is such a file on this worker's machine."""
    return Path(path).is_file()


def start_agent(
    config: str, secret: str, host: str, port: int, python: str
) -> tuple[int, tuple[str, int]]:
    """Start this worker's agent; return once it listens.

    Args:
      config: the job, as `JobConfig.to_json`.
      secret: the job's secret in hexadecimal.
      host: the address to listen on.
      port: taken if it is free; 0 takes any.
      python: the controller's interpreter, for which this one stands in.

    Returns:
      The node's number, and where its agent listens.
    """
    node = ray.train.get_context().get_world_rank()
    agent = AgentHost()
    # Ray puts what a worker can import on its path, not into its environment.
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    started = agent.start(
        config, node, secret, host=host, port=port, environ=environ, python=python
    )
    _here.agent = agent
    _here.folder = JobConfig.from_json(config).shm_dir(NodeId(node))
    return node, (started.host, started.port)


def drain_agent() -> None:
    """This worker's machine is about to be taken away: its ranks leave. Said as long as it is so."""
    if _here.agent is not None and not _here.drained:
        logger.warning("Ray is about to take away this worker's machine; its ranks leave")
        _here.drained = True
        _here.agent.drain()


def job_over(code: int, reason: str) -> None:
    """The job has ended: this worker's function ends so, too, where its agent does not know."""
    _here.over = code, reason
    stop_agent()


def stop_agent() -> None:
    """End this worker's agent at once, if there is one; its ranks are killed."""
    _here.stopped.set()
    if _here.agent is not None:
        _here.agent.stop()


def train_in_ranks(train: Callable[[], object]) -> None:
    """Have this worker's ranks run `train`; wait until the job has ended. The worker's function.

    Raises:
      UsageError: no agent runs here.
      JobFailed: the job failed, or this worker's part of it ended early.
    """
    agent = _here.agent
    if agent is None and _here.over is None:
        raise UsageError(
            "no agent runs in this worker: in_ranks needs the trainer's torch_config=FtkitConfig(); "
            "where it has one, the controller's log says why the agent did not start"
        )
    outcome = None if agent is None else _train(agent, train)
    if outcome is None and _here.drained:
        # A worker that ends by itself is one of `max_failures`. One that is lost with its machine
        # is not, and where the job ends before, nobody has to be waited for in its place.
        _here.stopped.wait()
    outcome = outcome or _here.over
    if outcome is None:
        raise JobFailed("the agent of this worker ended before the job did")
    code, reason = outcome
    if code:
        raise JobFailed(f"{reason} (exit code {code})")


def _train(agent: AgentHost, train: Callable[[], object]) -> tuple[int, str] | None:
    """The job's end, as the agent tells it."""
    import cloudpickle

    leads = ray.train.get_context().get_world_rank() == 0
    try:
        reports = Reports(_here.folder / REPORTS, leads=leads)
        hand_over(_here.folder, cloudpickle.dumps(train))
    except FileNotFoundError:
        return agent.ended()  # the job was over when the agent came, and with it its folder
    reports.start()
    try:
        return agent.ended()
    finally:
        reports.finish()


class Reports:
    """Passes on to Ray Train what ranks report, on a thread of its own: training never waits.

    `ray.train.report` waits for all workers. Worker 0 calls it when its ranks have something to
    say, and the others are always there already: so numbers of calls need not agree, whoever dies.
    """

    def __init__(self, path: Path, *, leads: bool) -> None:
        """Listen at `path`. With `leads`, what comes there is reported.

        Raises:
          FileNotFoundError: there is no such folder.
        """
        self._leads = leads
        self._over = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(LOOK_S)
        work = self._lead if leads else self._follow
        self._thread = threading.Thread(target=work, name="ftkit-reports", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """Training has ended: have the last report passed on, if that is soon done."""
        self._over.set()
        if self._leads:
            self._thread.join(LAST_REPORT_S)

    def _lead(self) -> None:
        while True:
            over = self._over.is_set()  # before the look: what came until then is passed on
            data = newest(self._socket)
            if data is not None:
                _report(json.loads(data))
            elif over:
                return

    def _follow(self) -> None:
        # Without end: worker 0 may have a last report when this worker's ranks have ended.
        while True:
            _report({})


def _storage() -> str:
    storage = ray.train.get_context().get_storage()
    path = str(storage.experiment_fs_path)
    return path if storage.storage_filesystem.type_name == "local" and Path(path).is_dir() else ""


def _report(metrics: Mapping[str, Any]) -> None:
    try:
        ray.train.report(dict(metrics))
    except Exception as error:  # noqa: BLE001  # whatever Ray says, training goes on
        logger.warning("Ray Train took no report: %r", error)
        time.sleep(AGAIN_S)
