"""RayEngine: a job's agents and coordinator as actors of a Ray cluster.

Ray places processes and carries calls; it judges nothing, and detection never waits for it:
agents and coordinator talk over their own sockets as they do on the embedded engine. Actors
are not restarted by Ray but here, as a coordinator needs a number above the last one's and
an agent the job's secret, which Ray does not store. All actors end with the driver.

Directories: ranks start in the driver's, which on several machines has to be on a shared
file system or come from `ray job submit --working-dir`. The coordinator runs beside the
driver, so the job's end is always found; agents write their events into the same run
directory where it is shared, and otherwise into one of the same name on their own node.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import exceptions as ray_errors
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from ftkit.core import exit_codes
from ftkit.core.errors import CapacityError, FtkitError, UsageError
from ftkit.launch.arenas import sweep
from ftkit.launch.config import JobConfig
from ftkit.launch.coordinator import read_result
from ftkit.launch.coordinator_tries import CoordinatorTries
from ftkit.launch.ray_actors import AgentHost, CoordinatorHost, Started, marker
from ftkit.launch.ray_placement import bundle, parse_resources, shortage, show, strategy
from ftkit.launch.tail import RankOutput
from ftkit.recovery.plan import Stop

logger = logging.getLogger(__name__)

NAMESPACE = "ftkit"
LOOPBACK = "127.0.0.1"
#: A cluster that is there answers in a fraction of this; one that hangs is not waited for
#: (`ray.init` alone would wait for minutes, deaf to signals).
CONNECT_S = 15.0
#: For an actor's process to start and its agent to listen: importing Ray takes seconds.
START_S = 120.0
#: Between two questions which machines are about to be taken away.
NOTICE_S = 1.0


@dataclass(slots=True, kw_only=True)
class _Agent:
    """The agent of one node, as this engine sees it."""

    actor: Any
    pending: Any
    """The call that is under way: `start`, then `ended`."""
    started: Started | None = None
    known: tuple[str, int] | None = None
    """Where coordinators look for the agent of this node."""
    outcome: Stop | None = None
    """It ended in order, as the job did."""
    drained: bool = False
    """Whether it was told that its machine is about to be taken away."""


class RayEngine:
    """Owns the actors of one job. One thread uses it; `interrupt` may come from another."""

    def __init__(self, config: JobConfig, secret: str) -> None:
        self._config = replace(config, cwd=config.cwd or os.getcwd())
        self._secret = secret
        self._group: Any = None
        self._shape: dict[str, float] = {}
        """What an agent books."""
        self._alone = False
        self._agents: dict[int, _Agent] = {}
        self._coordinator: Any = None
        self._coordinator_pid: Any = None
        self._running: Any = None
        self._number = 0
        self._tries = CoordinatorTries()
        self._started_at = 0.0
        self._interrupted_at: float | None = None
        self._through_at: float | None = None
        self._told: Any = None
        self._next_notice_at = 0.0
        self._output: RankOutput | None = None
        self._connected = False
        self._closed = False

    def start(self) -> None:
        run_dir = Path(self._config.run_dir)
        if not run_dir.is_dir():
            raise UsageError(f"the run directory {run_dir} does not exist")
        self._connected = connect(os.environ)
        self._place(_alive_nodes())
        if self._is_interrupted():
            return
        alive = _alive_nodes()  # more than before, where machines were started for us
        self._alone = len(alive) == 1
        mark = marker(run_dir, self._config.job)
        mark.parent.mkdir(exist_ok=True)
        mark.touch()
        if not self._config.rank_logs:
            self._output = RankOutput(run_dir / "logs", self._config.nodes * self._config.places)
        self._find_master()
        for node in range(self._config.agents):
            self._start_agent(node)
        deadline = time.monotonic() + START_S
        for node, agent in self._agents.items():
            while not _is_ready(agent.pending, timeout_s=0.1):
                if self._is_interrupted():
                    return
                if time.monotonic() > deadline:
                    raise CapacityError(
                        f"the agent of node {node} did not start within {START_S:g} s; "
                        "`ray status` and the logs of Ray's workers may say why"
                    )
            self._look_after(node)
        self._start_coordinator()

    def poll(self) -> Stop | None:
        if self._output is not None:
            self._output.pass_on()
        stop = read_result(Path(self._config.run_dir))
        if stop is not None:
            return stop
        if self._interrupted_at is not None:
            reason = "interrupted"
            if self._coordinator is None:
                return Stop(code=exit_codes.INTERRUPTED, reason=f"{reason} before it began")
            if time.monotonic() > self._interrupted_at + self._config.interrupt_s:
                return Stop(code=exit_codes.INTERRUPTED, reason=f"{reason}, and ended the hard way")
            if self._told is not self._coordinator:
                self._told = self._coordinator
                self._coordinator.interrupt.remote(reason)
        for node in self._agents:
            self._look_after(node)
        self._pass_on_notices()
        if (stop := self._outcome()) is not None:
            return stop
        if _is_ready(self._running):
            return self._coordinator_ended()
        return None

    def interrupt(self) -> None:
        # Only noted here: a signal handler may have cut into a call of Ray's.
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic()

    def _is_interrupted(self) -> bool:
        return self._interrupted_at is not None

    def kill_coordinator(self) -> None:
        if self._coordinator_pid is None:
            return
        try:
            # It runs on this machine, beside the driver.
            os.kill(ray.get(self._coordinator_pid, timeout=START_S), signal.SIGKILL)
        except (ray_errors.RayActorError, ProcessLookupError):
            pass  # it is dead already

    def kill_node(self, node: int) -> None:
        # The kernel ends its ranks; the next agent there removes what is left in memory.
        ray.kill(self._agents[node].actor)

    def drain_node(self, node: int) -> None:
        self._agents[node].actor.drain.remote()
        self._agents[node].drained = True

    def _pass_on_notices(self) -> None:
        """Tell agents whose nodes Ray is about to take away."""
        if time.monotonic() < self._next_notice_at:
            return
        self._next_notice_at = time.monotonic() + NOTICE_S
        draining = draining_nodes()
        for node, agent in self._agents.items() if draining else ():
            if agent.known is not None and not agent.drained and self._node_id(node) in draining:
                logger.warning("Ray is about to take away the machine of node %s", node)
                self.drain_node(node)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        pids = []
        try:
            if self._connected or ray.is_initialized():
                pids = self._end_actors()
        finally:
            if self._connected:
                ray.shutdown()
            if self._output is not None:
                self._output.pass_on(all_of_it=True)
            _wait_gone(pids, limit_s=self._config.times.grace_s)
            marker(Path(self._config.run_dir), self._config.job).unlink(missing_ok=True)
            sweep(Path(self._config.shm_root))

    # Agents.

    def _place(self, alive: list[dict[str, Any]]) -> None:
        """Book a bundle for each agent. While it is pending, Ray's autoscaler sees what is wanted."""
        wanted, asked = self._config.agents, parse_resources(self._config.resources)
        how = strategy(self._config.placement, nodes=wanted, alive=len(alive))
        self._shape = bundle(alive, nodes=wanted, nproc=self._config.places, wanted=asked)
        lacking = shortage(alive, self._shape, nodes=wanted, how=how)
        if lacking:
            logger.warning(
                "%s; waiting %g s for machines that join", lacking, self._config.placement_s
            )
        elif len(alive) < wanted:
            logger.warning(
                "the cluster has %s node(s) and the job asks for %s: agents share a machine, "
                "and are lost together with it",
                len(alive),
                wanted,
            )
        self._group = placement_group([self._shape] * wanted, strategy=how)
        deadline = time.monotonic() + self._config.placement_s
        while not self._group.wait(timeout_seconds=0.5) and not self._is_interrupted():
            if time.monotonic() > deadline:
                why = shortage(_alive_nodes(), self._shape, nodes=wanted, how=how)
                raise CapacityError(
                    f"the cluster found no room for {wanted} nodes of {show(self._shape)} ({how}) "
                    f"within {self._config.placement_s:g} s (--placement-timeout): "
                    + (why or "others use it; `ray status` shows what is free")
                )

    def _find_master(self) -> None:
        """Settle MASTER_ADDR and MASTER_PORT, which on several machines are node 0's."""
        if self._alone or "MASTER_ADDR" in self._config.env:
            return
        here = ray.get_runtime_context().get_node_id()
        port = self._config.master_port
        if self._node_id(0) != here:
            probe = self._actor(AgentHost, self._on_bundle(0))
            port = ray.get(probe.free_port.remote(), timeout=START_S)
            ray.kill(probe)
        env = {**self._config.env, "MASTER_ADDR": self._address_of(0)}
        self._config = replace(self._config, env=env, master_port=port)

    def _start_agent(self, node: int) -> None:
        before = self._agents.get(node)
        known = before.known if before is not None else None
        actor = self._actor(AgentHost, self._on_bundle(node), takes=self._shape)
        pending = actor.start.remote(
            self._config.to_json(),
            node,
            self._secret,
            # Where its bundle is then, the agent sees for itself: a node that is lost may come back
            # on another machine, in a quarter of a minute or when there is one.
            host=LOOPBACK if self._alone else "",
            port=known[1] if known else 0,
            environ=dict(os.environ),
            python=sys.executable,
        )
        self._agents[node] = _Agent(actor=actor, pending=pending, known=known)

    def _look_after(self, node: int) -> None:
        """Take in how the call that is under way ended, if it did."""
        agent = self._agents[node]
        if agent.outcome or not _is_ready(agent.pending):
            return
        try:
            answer = ray.get(agent.pending)
        except ray_errors.RayActorError as error:
            if agent.known is None:
                raise CapacityError(f"the agent of node {node} did not start: {error}") from error
            logger.warning("the agent of node %s is gone; starting another", node)
            ray.kill(agent.actor)  # or out of reach only, and a node has one agent
            self._start_agent(node)
            return
        except ray_errors.RayTaskError as error:
            # What the agent raised, without the traceback of another process.
            if isinstance(error.cause, FtkitError):
                raise error.cause from None
            raise CapacityError(
                f"the agent of node {node} ended by an error: {error.cause!r}. Can "
                f"{self._config.run_dir} and {self._config.shm_root} be written there?"
            ) from error
        if agent.started is not None:
            if answer is None:
                logger.warning("the agent of node %s broke off; starting another", node)
                ray.kill(agent.actor)
                self._start_agent(node)
                return
            agent.outcome = Stop(code=answer[0], reason=answer[1])
            return
        agent.started = answer
        agent.pending = agent.actor.ended.remote()
        if not agent.started.shares_run_dir:
            logger.warning(
                "node %s does not share %s: its events stay there, and its ranks' output comes "
                "by way of Ray",
                node,
                self._config.run_dir,
            )
        address = (agent.started.host, agent.started.port)
        if agent.known not in (None, address) and self._coordinator is not None:
            # Coordinators are told the addresses once; the next one will know this one.
            ray.kill(self._coordinator)
        agent.known = address

    def _outcome(self) -> Stop | None:
        """The job's end as the agents know it, where no coordinator is left to record it."""
        outcomes = [a.outcome for a in self._agents.values() if a.outcome]
        if len(outcomes) < len(self._agents):
            return None
        if self._through_at is None:
            self._through_at = time.monotonic()
        if time.monotonic() - self._through_at < self._config.times.grace_s:
            return None  # it is being recorded
        return outcomes[0]

    # The coordinator.

    def _start_coordinator(self) -> None:
        self._number += 1
        self._started_at = time.monotonic()
        here = ray.get_runtime_context().get_node_id()
        self._coordinator = self._actor(
            CoordinatorHost,
            NodeAffinitySchedulingStrategy(node_id=here, soft=False),
            name=f"ftkit-{self._config.job}-coordinator-{self._number}",
        )
        self._coordinator_pid = self._coordinator.pid.remote()
        # Of one whose machine is gone, the last: the job goes on without it meanwhile.
        addresses = [a.known for a in self._agents.values() if a.known]
        assert len(addresses) == self._config.agents, "a coordinator starts after all agents"
        self._running = self._coordinator.run.remote(
            self._config.to_json(), self._secret, addresses, self._number
        )

    def _coordinator_ended(self) -> Stop | None:
        """It led the job to its end, or it has to be replaced."""
        try:
            code, reason = ray.get(self._running)
            return Stop(code=code, reason=reason)
        except ray_errors.RayTaskError as error:
            # Its process lives, so what it raised will come again: a full disk, a bug.
            logger.warning("coordinator %s ended by an error: %r", self._number, error.cause)
            lived_s = time.monotonic() - self._started_at
            stop = self._tries.ended(lived_s=lived_s, error=repr(error.cause))
            if stop is not None:
                return stop
            ray.kill(self._coordinator)
        except ray_errors.RayActorError:
            logger.warning("coordinator %s is gone; starting another", self._number)
            ray.kill(self._coordinator)  # or out of reach only
        self._start_coordinator()
        return None

    # Ray.

    def _actor(
        self, kind: type, where: Any, name: str | None = None, takes: Mapping[str, float] = {}
    ) -> Any:
        """An actor on its way: at most this many calls at once, no restarts by Ray."""
        # A process sees the accelerators that it takes, and no others.
        special = {n: v for n, v in takes.items() if n not in ("CPU", "GPU", "memory")}
        return (
            ray.remote(kind)
            .options(
                name=name,
                num_cpus=0,
                num_gpus=takes.get("GPU", 0),
                memory=takes.get("memory"),
                resources=special,
                max_concurrency=4,
                runtime_env=_runtime_env(),
                scheduling_strategy=where,
            )
            .remote()
        )

    def _on_bundle(self, node: int) -> Any:
        return PlacementGroupSchedulingStrategy(
            self._group,
            placement_group_bundle_index=node,
            placement_group_capture_child_tasks=False,
        )

    def _node_id(self, node: int) -> str:
        """Ray's name for the machine on which the bundle of `node` is now."""
        return str(placement_group_table(self._group)["bundles_to_node_id"][node])

    def _address_of(self, node: int) -> str:
        if self._alone:
            return LOOPBACK
        machine = self._node_id(node)
        return str(next(n["NodeManagerAddress"] for n in _alive_nodes() if n["NodeID"] == machine))

    def _end_actors(self) -> list[int]:
        """End all actors, in order where they can; the processes on this machine."""
        pids = []
        if self._coordinator is not None:
            ray.kill(self._coordinator)
        stopping = [a.pending for a in self._agents.values() if a.started and not a.outcome]
        for agent in self._agents.values():
            if agent.started is not None:
                agent.actor.stop.remote()
                if agent.started.hostname == socket.gethostname():
                    pids.append(agent.started.pid)
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=self._config.times.grace_s)
        for agent in self._agents.values():
            # Ranks that are still there die with it.
            ray.kill(agent.actor)
        if self._group is not None:
            remove_placement_group(self._group)
        return pids


def connect(environ: Mapping[str, str]) -> bool:
    """Connect this process to the cluster at RAY_ADDRESS, or to the one on this machine.

    Blocks for `CONNECT_S` at most. Signal handlers stay as they are.

    Returns:
      Whether a connection was made, which `ray.shutdown` ends; False if there was one.

    Raises:
      UsageError: there is no such cluster, or it does not answer.
    """
    if ray.is_initialized():
        return False
    address = environ.get("RAY_ADDRESS") or "auto"
    advice = "start one (`ray start --head`), set RAY_ADDRESS to it, or use --engine embedded"
    if "://" in address:
        raise UsageError(
            f"RAY_ADDRESS is {address}, which is not a cluster's own address (host:port). Submit "
            "the command instead: `ray job submit --working-dir . -- ftkit run ...`"
        )
    host, colon, port = address.rpartition(":")
    if colon:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=3.0).close()
        except (OSError, ValueError) as error:
            raise UsageError(f"no Ray cluster answers at {address} ({error}); {advice}") from error
    failures: list[Exception] = []

    def init() -> None:
        try:
            ray.init(address=address, namespace=NAMESPACE, logging_level=logging.ERROR)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is said by the one that waits
            failures.append(error)

    # A thread, as `ray.init` hears no signals while it waits, takes over SIGTERM on the main
    # thread, and waits for over a minute for a peer that accepts connections and says nothing.
    thread = threading.Thread(target=init, name="ftkit-ray-init", daemon=True)
    thread.start()
    thread.join(CONNECT_S)
    if thread.is_alive():
        raise UsageError(f"the Ray cluster at {address} said nothing for {CONNECT_S:g} s; {advice}")
    if failures:
        raise UsageError(f"cannot use the Ray cluster at {address}: {failures[0]}; {advice}")
    return True


def draining_nodes() -> frozenset[str]:
    """Ray's names of machines that it is about to take away: spot notices, downscaling.

    Ray has no public call for it. Where the private one is gone, nobody is told, and such a machine
    is lost as any other.
    """
    try:
        client = ray._private.worker.global_worker.gcs_client  # type: ignore[attr-defined]  # set as it connects
        return frozenset(str(name) for name in client.get_draining_nodes())
    except (AttributeError, RuntimeError, ray_errors.RayError) as error:
        logger.debug("Ray tells nothing of machines that go: %s", error)
        return frozenset()


def _runtime_env() -> dict[str, Any]:
    """What actors need to import ftkit where it is not installed but on the driver's path."""
    root = Path(__file__).resolve().parents[2]
    installed = root in (Path(sysconfig.get_path(p)).resolve() for p in ("purelib", "platlib"))
    paths = [*([] if installed else [str(root)]), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(p for p in paths if p)
    return {"env_vars": {"PYTHONPATH": path}} if path else {}


def _alive_nodes() -> list[dict[str, Any]]:
    """What Ray says of each machine of the cluster that is up."""
    return [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]


def _is_ready(call: Any, timeout_s: float = 0.0) -> bool:
    return bool(ray.wait([call], timeout=timeout_s)[0])


def _wait_gone(pids: list[int], *, limit_s: float) -> None:
    """Wait until these processes of this machine have ended; Ray ends them in its own time."""
    living = list[psutil.Process]()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            living.append(psutil.Process(pid))
    psutil.wait_procs(living, timeout=limit_s)
