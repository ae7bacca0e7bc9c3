"""A real coordinator with neither agents nor a network, on a clock that its processor time drives.

It is handed what `agents` would report, as text. What it needs for that is added to the clock, so that
one which cannot keep up falls behind here as it would in a job.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from benchmarks.agents import PER_NODE, STEP_S, Agents
from ftkit.core.clock import ManualClock
from ftkit.core.ids import NodeId
from ftkit.core.trace import Trace
from ftkit.core.wire import Line
from ftkit.launch.config import JobConfig, new_job_id, new_secret
from ftkit.launch.coordinator import Coordinator
from ftkit.recovery.plan import Plan

#: Reports are made for so long ahead.
FEED_S = 0.1


class LoneCoordinator:
    """The coordinator, and a clock that runs with the processor time it takes."""

    def __init__(self, ranks: int, folder: Path) -> None:
        config = JobConfig(
            job=new_job_id(),
            command=("true",),
            nodes=ranks // PER_NODE,
            nproc=PER_NODE,
            run_dir=str(folder),
        )
        self.clock = ManualClock(100.0)
        self.agents = Agents(ranks, config.detection, now=self.clock.now())
        addresses = [("127.0.0.1", 1)] * self.agents.nodes
        self.coordinator = Coordinator(config, new_secret(), addresses, number=1)
        self.coordinator._clock = self.clock  # type: ignore[assignment]
        self.coordinator._lines = {
            NodeId(n): cast("Line", FakeLine(self.agents, n)) for n in range(self.agents.nodes)
        }
        self.coordinator.trace.close()
        self.heard = self.coordinator.trace = Heard(folder / "events.jsonl", self.clock)
        self.cpu_s = 0.0
        self.look_cpu_s: list[float] = []
        self.nbytes = 0
        self._pending: list[tuple[float, int]] = []
        self._extra: tuple[float, int] | None = None
        self._fed = self.clock.now()
        """What agents report until then has been handed over."""

    def close(self) -> None:
        """Close what the coordinator holds."""
        self.coordinator._disk.close()
        self.coordinator._incidents.close()
        self.heard.close()

    def form(self) -> None:
        """From agents that have just come up to a job that trains."""
        now = self.clock.now()
        for node in range(self.agents.nodes):
            report = json.loads(self.agents.report(node, now)) | {"plan": Plan().to_json()}
            self.coordinator._handle("facts", NodeId(node), report)
        self._look()
        assert self.coordinator._plan is not None, "all agents have spoken"
        world = self.coordinator._plan.world
        assert world is not None, "every rank is ready"
        self.agents.generation = world.generation

    def add(self, at: float, node: int) -> None:
        """Beyond what comes anyway, this agent reports then."""
        self._extra = (at, node)

    def play(self, until: float, over: Callable[[], bool] = lambda: False) -> None:
        """All reports until then come, a look after each batch as in `run`."""
        while self._fed < until and not over():
            self._fed = min(until, self._fed + FEED_S)
            self._pending += self.agents.due(self._fed)
            if self._extra and self._extra[0] <= self._fed:
                self._pending.append(self._extra)
                self._extra = None
            self._pending.sort()
            self._work(over)

    def settle(self, steps: int = 3) -> None:
        """Let the job go on for so many steps."""
        self.play(max(self._fed, self.clock.now()) + steps * STEP_S)

    def _work(self, over: Callable[[], bool]) -> None:
        """Take what has been fed, each report when it comes."""
        rest = self.coordinator._rest
        while not over():
            came = [one for one in self._pending if one[0] <= self.clock.now()]
            del self._pending[: len(came)]
            for at, node in came:
                self._take(at, node)
            if (came or rest.owed) and rest.due(self.clock.now()):
                self._look()
                continue
            next_at = min(
                [at for at, _ in self._pending[:1]] + ([rest.until] if rest.owed else []),
                default=float("inf"),
            )
            if next_at > self._fed:
                break
            self.clock.advance(max(0.0, next_at - self.clock.now()))

    def _take(self, at: float, node: int) -> None:
        text = self.agents.report(node, at)
        began = time.process_time()
        self.coordinator._handle("facts", NodeId(node), json.loads(text))
        self._spent(time.process_time() - began)
        self.nbytes += len(text)

    def _look(self) -> None:
        began, now = time.process_time(), self.clock.now()
        self.coordinator._lead(now)
        spent = time.process_time() - began
        self._spent(spent)
        self.look_cpu_s.append(spent)
        self.coordinator._rest.looked(now, self.clock.now())

    def _spent(self, seconds: float) -> None:
        self.cpu_s += seconds
        self.clock.advance(seconds)


class Heard(Trace):
    """The coordinator's events, and whom it has named when."""

    def __init__(self, path: Path, clock: ManualClock) -> None:
        super().__init__(path)
        self._clock = clock
        self.named: dict[int, float] = {}

    def event(self, kind: str, /, **fields: object) -> None:
        super().event(kind, **fields)
        if kind in ("suspicion", "verdict"):
            self.named.setdefault(cast("int", fields["seat"]), self._clock.now())


class FakeLine:
    """What the coordinator tells an agent that does not exist: it answers pair tests."""

    def __init__(self, agents: Agents, node: int) -> None:
        self._agents, self._node = agents, node

    def send(self, message: Mapping[str, Any] | bytes) -> None:
        """Take an order. The plan, which comes as bytes, changes nothing."""
        if not isinstance(message, bytes) and message["type"] == "pairs":
            self._agents.ask(self._node, message["tests"])
