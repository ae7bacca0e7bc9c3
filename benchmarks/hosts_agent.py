"""One host of a job on hosts (`hosts_job`): a node's agent, or the coordinator, at an address of its own.

agent NODE HOST          prints [host, port] once it listens, and serves to the job's end
coordinator              leads the agents named in the environment, to the job's end
"""

import json
import os
import signal
import sys

from ftkit.core.ids import NodeId
from ftkit.launch.agent import Agent
from ftkit.launch.config import JobConfig
from ftkit.launch.coordinator import Coordinator

JOB, SECRET, AGENTS = "BENCH_JOB", "BENCH_SECRET", "BENCH_AGENTS"


def main(argv: list[str]) -> int:
    """Run one of the two."""
    config, secret = JobConfig.from_json(os.environ[JOB]), os.environ[SECRET]
    if argv[0] == "agent":
        agent = Agent(config, NodeId(int(argv[1])), secret, host=argv[2])
        signal.signal(signal.SIGTERM, lambda *_: agent.stop())
        print(json.dumps(agent.address), flush=True)
        agent.run()
        return 0
    agents = [(str(host), int(port)) for host, port in json.loads(os.environ[AGENTS])]
    coordinator = Coordinator(config, secret, agents, number=1)
    signal.signal(signal.SIGTERM, lambda *_: coordinator.interrupt("the benchmark is over"))
    coordinator.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
