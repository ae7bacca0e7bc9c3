"""Engine: where a job's agents and coordinator live. Two kinds pass one contract suite.

An engine places and restarts processes; it judges nothing. `embedded` runs them on this
machine, `ray_engine` as actors of a Ray cluster.
"""

from typing import Protocol

from ftkit.recovery.plan import Stop


class Engine(Protocol):
    """One running job."""

    def start(self) -> None:
        """Start agents and coordinator. Blocks until the agents answer.

        Raises:
          UsageError: the engine cannot be used as asked; says why and what to do.
          CapacityError: the machine has no room for the job.
        """

    def poll(self) -> Stop | None:
        """Keep the job going (a dead coordinator is replaced); its end, once it has come."""

    def interrupt(self) -> None:
        """Ask for an orderly end: ranks get SIGTERM, and SIGKILL where that is not enough."""

    def kill_coordinator(self) -> None:
        """(drills) Kill the coordinator with SIGKILL."""

    def kill_node(self, node: int) -> None:
        """(drills) Lose a node: SIGKILL its agent, and its ranks and shared memory with it."""

    def drain_node(self, node: int) -> None:
        """Tell a node that it is about to be taken away: SIGTERM to its agent, or the like."""

    def close(self) -> None:
        """End whatever still runs and remove what it held. Safe to call twice."""
