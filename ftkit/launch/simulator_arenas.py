"""Arenas: the snapshots that a simulated job keeps in memory, by node, seat and step.

A seat's arena keeps the newest few. It goes with its node's agent, and outlives every process.
"""

from collections import Counter, defaultdict

from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.launch.simulator_checks import TrainingState

SNAPSHOTS_KEPT = 2


class Arenas:
    """All arenas of one simulation."""

    def __init__(self) -> None:
        self._kept: dict[NodeId, dict[Seat, list[TrainingState]]] = defaultdict(dict)
        #: How many copies there are of each state: asked for by every rank that restores.
        self._copies: dict[Step, Counter[TrainingState]] = defaultdict(Counter)
        self._steps: dict[NodeId, frozenset[Step]] = {}

    def seal(self, node: NodeId, seat: Seat, state: TrainingState) -> None:
        """A snapshot is complete in a seat's arena."""
        kept = self._kept[node].get(seat, [])
        others = [s for s in kept if s.step != state.step]
        self._keep(node, seat, [*others[-(SNAPSHOTS_KEPT - 1) :], state])

    def forget_newer(self, node: NodeId, seat: Seat, state: TrainingState) -> None:
        """What a predecessor left in this arena beyond `state` is of another history."""
        kept = self._kept[node].get(seat, [])
        self._keep(node, seat, [s for s in kept if s.step <= state.step])

    def lose(self, node: NodeId) -> None:
        """All arenas of a node are gone."""
        for seat in list(self._kept[node]):
            self._keep(node, seat, [])

    def steps(self, node: NodeId) -> frozenset[Step]:
        """The steps of which a node holds a snapshot."""
        if node not in self._steps:
            kept = self._kept[node].values()
            self._steps[node] = frozenset(s.step for arena in kept for s in arena)
        return self._steps[node]

    def find(self, step: Step, attempt: Generation | None) -> TrainingState | None:
        """A snapshot of `step`: of that attempt, or else of the newest one."""
        if step == 0:
            return TrainingState()
        found = [s for s in self._copies.get(step, ()) if attempt in (None, s.attempt)]
        return max(found, key=lambda s: s.attempt, default=None)

    def _keep(self, node: NodeId, seat: Seat, states: list[TrainingState]) -> None:
        for state in self._kept[node].pop(seat, []):
            copies = self._copies[state.step]
            copies[state] -= 1
            if not copies[state]:
                del copies[state]
            if not copies:
                del self._copies[state.step]
        for state in states:
            self._copies[state.step][state] += 1
        if states:
            self._kept[node][seat] = states
        self._steps.pop(node, None)
