"""EmbeddedEngine: agents and coordinator as plain processes on this machine, no daemon."""

import json
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from ftkit.checkpoint.numa import choose, memory_nodes
from ftkit.core import exit_codes
from ftkit.core.errors import CapacityError, UsageError
from ftkit.launch import processes
from ftkit.launch.arenas import check_root, sweep
from ftkit.launch.config import JobConfig
from ftkit.launch.coordinator import read_result
from ftkit.launch.coordinator_tries import CoordinatorTries
from ftkit.launch.ranks import die_with
from ftkit.recovery.plan import Stop

logger = logging.getLogger(__name__)

#: An agent starts in a fraction of a second; longer than this and something is wrong.
AGENT_START_S = 30.0


@dataclass(slots=True)
class _Agent:
    """The agent of one node: its process, and the pipe on which it tells of itself."""

    process: subprocess.Popen[bytes]
    pipe: IO[str]
    address: tuple[str, int]
    outcome: Stop | None = None
    """It ended in order, as the job did."""


class EmbeddedEngine:
    """Owns the processes of one job. One thread uses it; `interrupt` may come from another."""

    def __init__(self, config: JobConfig, secret: str) -> None:
        self._config = config
        self._secret = secret
        self._agents: list[_Agent] = []
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._number = 0
        self._started_at = 0.0
        self._tries = CoordinatorTries()
        self._interrupted_at: float | None = None
        self._through_at: float | None = None
        self._told: subprocess.Popen[bytes] | None = None
        self._closed = False

    def start(self) -> None:
        # What an agent would refuse, in front of the person who asked for it.
        check_root(Path(self._config.shm_root))
        choose(self._config.numa, memory_nodes())
        for node in range(self._config.agents):
            self._agents.append(self._start_agent(node, 0))
        self._start_coordinator()

    def poll(self) -> Stop | None:
        stop = read_result(Path(self._config.run_dir))
        if stop is not None:
            return stop
        if self._interrupted_at is not None:
            limit = self._interrupted_at + self._config.interrupt_s
            if time.monotonic() > limit:
                return Stop(
                    code=exit_codes.INTERRUPTED, reason="interrupted, and ended the hard way"
                )
            if self._told is not self._coordinator and self._coordinator is not None:
                self._told = self._coordinator
                self._coordinator.terminate()
        for node, agent in enumerate(self._agents):
            if agent.outcome is None and agent.process.poll() is not None and not self._closed:
                self._agent_ended(node, agent)
        assert self._coordinator is not None, "start() came first"
        if (stop := self._outcome()) is not None:
            return stop
        if self._coordinator.poll() is not None:
            stop = read_result(Path(self._config.run_dir))
            if stop is not None:
                return stop
            code = self._coordinator.returncode
            stop = self._tries.ended(
                lived_s=time.monotonic() - self._started_at,
                error=f"exit code {code}, its own words are above" if code > 0 else "",
            )
            if stop is not None:
                return stop
            self._start_coordinator()
        return None

    def interrupt(self) -> None:
        # Only noted here: a signal may come while a coordinator is being started.
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic()

    def kill_coordinator(self) -> None:
        if self._coordinator is not None:
            self._coordinator.kill()

    def kill_node(self, node: int) -> None:
        agent = self._agents[node].process
        agent.kill()
        agent.wait()
        shutil.rmtree(self._config.shm_dir(node), ignore_errors=True)

    def drain_node(self, node: int) -> None:
        self._agents[node].process.terminate()

    def close(self) -> None:
        self._closed = True
        running = [a.process for a in self._agents if a.process.poll() is None]
        if self._coordinator is not None and self._coordinator.poll() is None:
            self._coordinator.kill()
            self._coordinator.wait()
        for agent in running:
            agent.send_signal(signal.SIGHUP)
        for agent in running:
            try:
                agent.wait(timeout=self._config.times.grace_s)
            except subprocess.TimeoutExpired:
                # Its ranks die with it; what it held in shared memory is swept below.
                agent.kill()
                agent.wait()
        for known in self._agents:
            known.pipe.close()
        sweep(Path(self._config.shm_root))

    def _outcome(self) -> Stop | None:
        """The job's end as the agents know it, where no coordinator is left to record it."""
        outcomes = [a.outcome for a in self._agents if a.outcome]
        if len(outcomes) < len(self._agents):
            return None
        if self._through_at is None:
            self._through_at = time.monotonic()
        if time.monotonic() - self._through_at < self._config.times.grace_s:
            return None  # it is being recorded
        return outcomes[0]

    def _agent_ended(self, node: int, agent: _Agent) -> None:
        """Take in the job's end from an agent that came to it; replace any other."""
        last = agent.pipe.readline()
        agent.pipe.close()
        if last:
            code, reason = json.loads(last)
            agent.outcome = Stop(code=code, reason=reason)
            return
        logger.warning("the agent of node %s is gone; starting another", node)
        sweep(Path(self._config.shm_root))
        self._agents[node] = self._start_agent(node, agent.address[1])
        if self._agents[node].address != agent.address and self._coordinator is not None:
            # Coordinators are told the addresses once; the next one will know this one.
            self._coordinator.kill()

    def _start_agent(self, node: int, port: int) -> _Agent:
        read, write = os.pipe()
        try:
            process = self._spawn(["agent", str(node), str(port), str(write)], pass_fds=(write,))
        finally:
            os.close(write)
        pipe = os.fdopen(read)
        text = ""
        try:
            ready, _, _ = select.select([pipe], [], [], AGENT_START_S)
            text = pipe.readline() if ready else ""
        finally:
            if not text:  # or a second Ctrl-C: `close` would not know of it
                pipe.close()
                process.kill()
                process.wait()
        if not text:
            raise CapacityError(
                f"the agent of node {node} did not start (exit code {process.returncode}); its "
                f"own words are above. Is {self._config.shm_root} full?"
            )
        host, bound = json.loads(text)
        return _Agent(process=process, pipe=pipe, address=(host, bound))

    def _start_coordinator(self) -> None:
        self._number += 1
        self._started_at = time.monotonic()
        # It is told at birth: a signal would come before it can answer one.
        told = self._interrupted_at is not None
        reason = ["interrupted"] if told else []
        self._coordinator = self._spawn(
            ["coordinator", str(self._number), *reason],
            {processes.AGENTS: json.dumps([a.address for a in self._agents])},
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
