"""The faults that can be done to a job that runs and knows nothing of drills: from outside."""

from ftkit.core.fault_plan import Kind

#: One node and all that is on it.
LOSE_NODE = "lose-node"
#: A node that is about to be taken away, and says so.
PREEMPT = "preempt"
#: Those that strike a node with all its ranks.
OF_NODES = (LOSE_NODE, PREEMPT)

#: Each, and what it does.
LIVE_FAULTS: dict[str, str] = {
    Kind.KILL.value: "SIGKILL to one rank and to what it started",
    Kind.STOP.value: "SIGSTOP to one rank and to what it started",
    LOSE_NODE: "SIGKILL to one node's agent and ranks; its shared memory is gone",
    PREEMPT: "one node is told that it is about to be taken away: its ranks leave, and others come",
}
