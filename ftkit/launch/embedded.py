"""EmbeddedEngine: agents and coordinator as plain processes on this machine, no daemon."""

import json
import logging
import os
import select
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from ftkit.core.errors import CapacityError, UsageError
from ftkit.launch import processes
from ftkit.launch.arenas import check_root, sweep
from ftkit.launch.config import JobConfig
from ftkit.launch.coordinator import read_result
from ftkit.launch.ranks import die_with
from ftkit.recovery.plan import Stop

logger = logging.getLogger(__name__)

#: An agent starts in a fraction of a second; longer than this and something is wrong.
AGENT_START_S = 30.0
#: Coordinators that end within a second of their start, one after another, before we give up.
COORDINATOR_TRIES = 10


class EmbeddedEngine:
    """Owns the processes of one job. One thread uses it; `interrupt` may come from another."""

    def __init__(self, config: JobConfig, secret: str) -> None:
        self._config = config
        self._secret = secret
        self._agents: list[subprocess.Popen[bytes]] = []
        self._addresses: list[tuple[str, int]] = []
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._started_at = 0.0
        self._quick_ends = 0
        self._interrupted_at: float | None = None
        self._told: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self) -> None:
        check_root(Path(self._config.shm_root))
        for node in range(self._config.nodes):
            process, address = self._start_agent(node, 0)
            self._agents.append(process)
            self._addresses.append(address)
        self._start_coordinator()

    def poll(self) -> Stop | None:
        stop = read_result(Path(self._config.run_dir))
        if stop is not None:
            return stop
        if self._interrupted_at is not None:
            limit = self._interrupted_at + 2 * self._config.times.grace_s
            if time.monotonic() > limit:
                return Stop(code=130, reason="interrupted, and ended the hard way")
            if self._told is not self._coordinator and self._coordinator is not None:
                self._told = self._coordinator
                self._coordinator.terminate()
        for node, agent in enumerate(self._agents):
            if agent.poll() is not None and not self._closed:
                logger.warning("the agent of node %s is gone; starting another", node)
                sweep(Path(self._config.shm_root))
                self._agents[node], _ = self._start_agent(node, self._addresses[node][1])
        assert self._coordinator is not None, "start() came first"
        if self._coordinator.poll() is not None:
            stop = read_result(Path(self._config.run_dir))
            if stop is not None:
                return stop
            quick = time.monotonic() - self._started_at < 1.0
            self._quick_ends = self._quick_ends + 1 if quick else 0
            if self._quick_ends >= COORDINATOR_TRIES:
                return Stop(
                    code=70, reason=f"{COORDINATOR_TRIES} coordinators in a row ended at once"
                )
            self._start_coordinator()
        return None

    def interrupt(self) -> None:
        # Only noted here: a signal may come while a coordinator is being started.
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic()

    def kill_coordinator(self) -> None:
        if self._coordinator is not None:
            self._coordinator.kill()

    def close(self) -> None:
        self._closed = True
        running = [p for p in self._agents if p.poll() is None]
        if self._coordinator is not None and self._coordinator.poll() is None:
            self._coordinator.kill()
            self._coordinator.wait()
        for agent in running:
            agent.terminate()
        for agent in running:
            try:
                agent.wait(timeout=self._config.times.grace_s)
            except subprocess.TimeoutExpired:
                # Its ranks die with it; what it held in shared memory is swept below.
                agent.kill()
                agent.wait()
        sweep(Path(self._config.shm_root))

    def _start_agent(self, node: int, port: int) -> tuple[subprocess.Popen[bytes], tuple[str, int]]:
        read, write = os.pipe()
        try:
            process = self._spawn(["agent", str(node), str(port), str(write)], pass_fds=(write,))
        finally:
            os.close(write)
        with os.fdopen(read) as pipe:
            ready, _, _ = select.select([pipe], [], [], AGENT_START_S)
            text = pipe.read() if ready else ""
        if not text:
            process.kill()
            process.wait()
            raise CapacityError(
                f"the agent of node {node} did not start (exit code {process.returncode}); its "
                f"own words are above. Is {self._config.shm_root} full, or the port {port} taken?"
            )
        host, bound = json.loads(text)
        return process, (host, bound)

    def _start_coordinator(self) -> None:
        self._number += 1
        self._started_at = time.monotonic()
        # It is told at birth: a signal would come before it can answer one.
        told = self._interrupted_at is not None
        reason = ["interrupted"] if told else []
        self._coordinator = self._spawn(
            ["coordinator", str(self._number), *reason],
            {processes.AGENTS: json.dumps(self._addresses)},
        )
        if told:
            self._told = self._coordinator

    def _spawn(
        self, argv: list[str], env: dict[str, str] | None = None, pass_fds: tuple[int, ...] = ()
    ) -> subprocess.Popen[bytes]:
        """Start one process of the engine, in a session of its own.

        Ctrl-C on the terminal then reaches only the command, which ends the job in order.
        """
        if not Path(self._config.run_dir).is_dir():
            raise UsageError(f"the run directory {self._config.run_dir} does not exist")
        return subprocess.Popen(
            [sys.executable, "-m", processes.__name__, *argv],
            env={
                **os.environ,
                processes.JOB: self._config.to_json(),
                processes.SECRET: self._secret,
                **(env or {}),
            },
            stdin=subprocess.DEVNULL,
            pass_fds=pass_fds,
            preexec_fn=partial(die_with, os.getpid()),  # noqa: PLW1509  # system calls, no lock
            start_new_session=True,
        )
