"""The agents of a large job that do not exist: what each of them would report, and when.

Eight ranks a node, a step a second, each host with a clock of its own. When an agent tells is
decided by `launch.pace`, as in a real one.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part
from ftkit.detection.config import DetectionConfig
from ftkit.detection.observations import ProcessFacts
from ftkit.detection.row import Phase, Row
from ftkit.detection.signals import PairSeen, StepSeen, to_json
from ftkit.launch.pace import Pace
from ftkit.recovery.facts import MemberFacts, Stage

PER_NODE = 8
STEP_S = 1.0
#: A healthy rank's last sign of life is so old.
ALIVE_S = 0.03
#: Of one transfer of a pair test.
PAIR_BYTES = 1 << 20
LAYOUT = "0123456789abcdef0123456789abcdef"
#: A host's clock is ahead of ours by up to so much.
UPTIME_S = 1e6


@dataclass(frozen=True, slots=True)
class Stopped:
    """A rank that stands still. The others wait for it from the end of its step on."""

    seat: int
    at: float

    @property
    def step(self) -> int:
        """The step that it does not finish."""
        return int(self.at / STEP_S)

    @property
    def waits_at(self) -> float:
        return (self.step + 1) * STEP_S


class Agents:
    """Those of one job. Times are on the coordinator's clock, until they are written down."""

    def __init__(self, ranks: int, detection: DetectionConfig, *, now: float) -> None:
        self.nodes = ranks // PER_NODE
        self.generation = Generation(0)
        self.dead: dict[int, float] = {}
        """Seat -> when it died."""
        self.stopped: Stopped | None = None
        rng = random.Random(self.nodes)
        self._ahead = [rng.uniform(0, UPTIME_S) for _ in range(self.nodes)]
        self._told = [int(now / STEP_S) - 1] * self.nodes
        """The last step whose end each has told."""
        self._tests: list[list[Mapping[str, Any]]] = [[] for _ in range(self.nodes)]
        looks = [now + detection.report_s * n / self.nodes for n in range(self.nodes)]
        self._paces = [
            Pace(
                look_s=detection.look_s,
                report_s=detection.report_s,
                soonest_s=detection.soonest_s,
                next_look=at,
            )
            for at in looks
        ]

    def ask(self, node: int, tests: Iterable[Mapping[str, Any]]) -> None:
        """The agent of that node is to test paths: all of them carry what they should."""
        self._tests[node] += tests

    def go_on(self, now: float) -> None:
        """Who stands still moves again; the steps that nobody played meanwhile are told by none."""
        self.stopped = None
        self._told = [int(now / STEP_S) - 1] * self.nodes

    def due(self, until: float) -> list[tuple[float, int]]:
        """Which nodes report until then, and when: in order."""
        return sorted((at, n) for n, pace in enumerate(self._paces) for at in self._of(pace, until))

    def _of(self, pace: Pace, until: float) -> Iterator[float]:
        while (now := pace.next_look) <= until:
            pace.woke(now)
            if pace.tells(now, self._still_s(now)):
                pace.reported(now)
                yield now

    def _still_s(self, at: float) -> float:
        return 0.0 if self.stopped is None else max(0.0, at - self.stopped.waits_at)

    def report(self, node: int, at: float) -> str:
        """What the agent of a node says then."""
        ahead = self._ahead[node]
        stopped = self.stopped if self.stopped and self.stopped.waits_at <= at else None
        playing = stopped.step if stopped else int(at / STEP_S)
        rows, members = [], []
        told: list[StepSeen | PairSeen] = []
        for seat in range(node * PER_NODE, (node + 1) * PER_NODE):
            dead = self.dead.get(seat, at + 1) <= at
            members.append(self._member(node, seat, playing - 1, dead=dead).to_json())
            if dead or not self.generation:
                continue
            row = self._row(seat, playing, at, ahead, stopped)
            facts = ProcessFacts(state="R", cpu_ticks=int(at * 100), rss_bytes=8 << 30)
            rows.append({"seat": seat, "row": row.to_json(), "facts": facts.to_json()})
            told += [
                self._ended(seat, step, ahead) for step in range(self._told[node] + 1, playing)
            ]
        tests, self._tests[node] = self._tests[node], []
        told += [_healthy(test, way, at + ahead) for test in tests for way in ("ab", "ba")]
        self._told[node] = max(self._told[node], playing - 1)
        return json.dumps(
            {
                "type": "facts", "node": node, "boot": f"boot-{node}", "name": f"node-{node}",
                "members": members, "copies": self._copies(node, playing), "store": ["10.0.0.1", 29_501],
                "persister": {}, "parity": {"checked": 0, "holds": [], "given_up": []},
                "rows": rows, "signals": [to_json(s) for s in told], "plan": None, "ended": False,
                "late_s": 0.0, "at": at + ahead,
            }
        )  # fmt: skip

    def _copies(self, node: int, playing: int) -> list[dict[str, object]]:
        """The last two steps, of which each rank holds its share."""
        if not self.generation:
            return []
        ranks = self.nodes * PER_NODE
        return [
            Copy(
                seat=Seat(seat),
                node=NodeId(node),
                path=f"/dev/shm/ftkit-0123456789abcdef/arena-{seat}",
                step=Step(step),
                generation=self.generation,
                part=Part(layout=LAYOUT, first=seat, end=seat + 1, total=ranks),
            ).to_json()
            for seat in range(node * PER_NODE, (node + 1) * PER_NODE)
            for step in (playing - 2, playing - 1)
        ]

    def _member(self, node: int, seat: int, committed: int, *, dead: bool) -> MemberFacts:
        stage = Stage.DEAD if dead else Stage.ACTIVE if self.generation else Stage.READY
        return MemberFacts(
            member=MemberId(seat),
            seat=Seat(seat),
            node=NodeId(node),
            stage=stage,
            generation=self.generation,
            step=Step(committed) if self.generation else None,
            host="10.0.0.1",
            port=29_500,
            pid=1000 + seat,
            exit_code=-9 if dead else None,
            stepping=True,
        )

    def _row(
        self, seat: int, playing: int, at: float, ahead: float, stopped: Stopped | None
    ) -> Row:
        moved, waits = at - ALIVE_S, stopped is not None and seat != stopped.seat
        if stopped is not None:
            moved = stopped.waits_at if waits else stopped.at
        return Row(
            member=MemberId(seat), pid=1000 + seat, generation=self.generation, step=Step(playing),
            phase=Phase.REDUCE if waits else Phase.FORWARD, group=0,
            entered=playing if waits else playing - 1, left=playing - 1, op="reduce_slots",
            t_progress_ns=_ns(moved + ahead), t_enter_ns=_ns(moved + ahead) if waits else 0,
            t_heartbeat_ns=_ns(at + ahead - 0.005), allowance_ns=0, warm=True,
        )  # fmt: skip

    def _ended(self, seat: int, step: int, ahead: float) -> StepSeen:
        return StepSeen(
            member=MemberId(seat),
            seat=Seat(seat),
            generation=self.generation,
            step=Step(step),
            at=(step + 1) * STEP_S + ahead,
            seconds={"data": 0.01, "forward": 0.8},
            waited_s=0.1,
            cpu_s=0.8,
            slots=1,
            loss=2.0,
        )


def _healthy(test: Mapping[str, Any], way: str, at: float) -> PairSeen:
    """What came of a pair test one way: ten gigabits a second, each time."""
    return PairSeen(
        order=test["number"],
        sender=Seat(test[way[0]]),
        receiver=Seat(test[way[1]]),
        at=at,
        nbytes=PAIR_BYTES,
        seconds=(PAIR_BYTES / 1.25e9,) * 3,
    )


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
