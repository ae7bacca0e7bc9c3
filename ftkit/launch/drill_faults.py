"""The faults that can be done to a job that runs and knows nothing of drills: from outside."""

from ftkit.core.fault_plan import Kind

#: SIGKILL to one node's agent and ranks; its shared memory is gone.
LOSE_NODE = "lose-node"
#: One node is told that it is about to be taken away: its ranks leave, and others come.
PREEMPT = "preempt"
#: Those that strike a node with all its ranks.
OF_NODES = (LOSE_NODE, PREEMPT)

#: All of them; the first two strike one rank, and what it started.
LIVE_FAULTS: tuple[str, ...] = (Kind.KILL.value, Kind.STOP.value, *OF_NODES)
