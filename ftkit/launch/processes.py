"""The processes of the embedded engine: what `python -m ftkit.launch.processes` runs.

    agent NODE PORT PIPE_FD      one node's agent; writes its address to PIPE_FD once it listens,
                                 and the job's end if it comes to it, each as a line
    coordinator NUMBER [REASON]  one coordinator; agents' addresses come from the environment;
                                 with a reason, all it does is to end the job in order

Both get the job from the environment, never from the command line, which anybody may read.
"""

import json
import os
import signal
import sys

from ftkit.core import exit_codes
from ftkit.core.ids import NodeId
from ftkit.launch.config import JobConfig
from ftkit.launch.logs import log_to_stderr

JOB = "FTKIT_JOB_CONFIG"
SECRET = "FTKIT_JOB_SECRET"
AGENTS = "FTKIT_JOB_AGENTS"
HOST = "127.0.0.1"


def main(argv: list[str]) -> int:
    """Run one process of the engine. Returns its exit code."""
    config = JobConfig.from_json(os.environ.pop(JOB))
    log_to_stderr(quiet=config.quiet)
    secret = os.environ.pop(SECRET)
    # Ctrl-C is the command's to answer: it tells the coordinator, which ends the job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    match argv:
        case ["agent", node, port, pipe]:
            return _agent(config, NodeId(int(node)), secret, int(port), int(pipe))
        case ["coordinator", number, *reason]:
            return _coordinator(config, secret, int(number), " ".join(reason))
        case _:
            print(f"ftkit.launch.processes: cannot run {argv}", file=sys.stderr)
            return exit_codes.USAGE


def _agent(config: JobConfig, node: NodeId, secret: str, port: int, pipe_fd: int) -> int:
    from ftkit.launch.agent import Agent

    agent = Agent(config, node, secret, host=HOST, port=port)
    # Who takes a machine away says so by SIGTERM; the engine ends its agents by SIGHUP.
    signal.signal(signal.SIGTERM, lambda *_: agent.drain())
    signal.signal(signal.SIGHUP, lambda *_: agent.stop())
    with os.fdopen(pipe_fd, "w", buffering=1) as pipe:
        print(json.dumps(agent.address), file=pipe)
        agent.run()
        if agent.outcome is not None:
            print(json.dumps([agent.outcome.code, agent.outcome.reason]), file=pipe)
    return 0


def _coordinator(config: JobConfig, secret: str, number: int, reason: str) -> int:
    from ftkit.launch.coordinator import Coordinator

    agents = [(str(host), int(port)) for host, port in json.loads(os.environ.pop(AGENTS))]
    coordinator = Coordinator(config, secret, agents, number=number)
    signal.signal(signal.SIGTERM, lambda *_: coordinator.interrupt("interrupted"))
    if reason:
        coordinator.interrupt(reason)
    coordinator.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
