"""A world on a manual clock: rows are written as literals, and the detector looks once a tick."""

from collections.abc import Callable
from dataclasses import replace

from ftkit.core.clock import ManualClock
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.verdict import Verdict
from ftkit.core.world import Member, World
from ftkit.detection.config import DetectionConfig
from ftkit.detection.detector import Detector
from ftkit.detection.observations import ProcessFacts, RowSeen, WorldChanged
from ftkit.detection.row import Awaited, Phase, Row

CONFIG = DetectionConfig(max_stall_s=10.0)


def world(size: int, *, generation: int = 1, per_node: int = 2, first: int = 100) -> World:
    """Members 100, 101, ... on seats 0, 1, ..."""
    return World.of(
        Generation(generation),
        [
            Member(
                member=MemberId(first + i),
                seat=Seat(i),
                node=NodeId(i // per_node),
                host="127.0.0.1",
                port=1,
            )
            for i in range(size)
        ],
    )


def row(
    member: int,
    *,
    phase: Phase = Phase.FORWARD,
    step: int = 10,
    entered: int = 50,
    pending_since: float | None = None,
    moved: float = 0.0,
    group: int = 0,
    op: str = "all_reduce",
    heartbeat: float | None = None,
    allowance: float = 0.0,
    generation: int = 1,
    warm: bool = True,
) -> Row:
    return Row(
        member=MemberId(member),
        pid=1000 + member,
        generation=Generation(generation),
        step=Step(step),
        phase=phase,
        group=group,
        entered=entered,
        left=entered if pending_since is None else entered - 1,
        op=op,
        t_progress_ns=int(moved * 1e9),
        t_enter_ns=0 if pending_since is None else int(pending_since * 1e9),
        t_heartbeat_ns=0 if heartbeat is None else int(heartbeat * 1e9),
        allowance_ns=int(allowance * 1e9),
        warm=warm,
    )


def facts(state: str = "S", cpu_ticks: int = 0) -> ProcessFacts:
    return ProcessFacts(state=state, cpu_ticks=cpu_ticks, rss_bytes=1 << 20)


class Scene:
    """Rows that change only when told; a detector that looks at all of them each tick."""

    def __init__(self, size: int, config: DetectionConfig = CONFIG) -> None:
        self.clock = ManualClock(1000.0)
        self.config = config
        self.detector = Detector(config)
        self.world = world(size)
        self.rows = {i: row(100 + i, moved=1000.0, heartbeat=1000.0) for i in range(size)}
        self.states = dict.fromkeys(range(size), "S")
        self.busy = dict.fromkeys(range(size), 0.0)
        self.cpu = dict.fromkeys(range(size), 0.0)
        self.beating = dict.fromkeys(range(size), True)
        self.hidden: set[int] = set()
        self.awaited: dict[int, Awaited] = {}
        self.detector.ingest(WorldChanged(world=self.world, at=self.clock.now()))

    def set(self, seat: int, **changes: object) -> None:
        now = self.clock.now()
        fields: dict[str, object] = {"moved": now, "heartbeat": now}
        self.rows[seat] = row(100 + seat, **(fields | changes))  # type: ignore[arg-type]

    def wait(self, *seats: int, entered: int = 51, **changes: object) -> None:
        """These seats enter a collective now."""
        for seat in seats:
            self.set(seat, **({"entered": entered, "pending_since": self.clock.now()} | changes))

    def tick(self, gap: float | None = None) -> list[Verdict]:
        gap = self.config.tick_s if gap is None else gap
        self.clock.advance(gap)
        now = self.clock.now()
        for seat, current in self.rows.items():
            self.cpu[seat] += self.busy[seat] * gap * 100
            if self.beating[seat] and current.t_heartbeat_ns and self.states[seat] != "T":
                self.rows[seat] = current = replace(current, t_heartbeat_ns=int(now * 1e9))
            if seat not in self.hidden:
                self.detector.ingest(
                    RowSeen(
                        member=current.member,
                        seat=Seat(seat),
                        row=current,
                        facts=facts(self.states[seat], int(self.cpu[seat])),
                        at=now,
                        awaited=self.awaited.get(seat),
                    )
                )
        return self.detector.tick(now)

    def until(self, seconds: float) -> list[Verdict]:
        """Tick for `seconds`; the verdicts of the last tick."""
        verdicts: list[Verdict] = []
        end = self.clock.now() + seconds
        while self.clock.now() < end:
            verdicts = self.tick()
        return verdicts

    def first(self, within: float, holds: Callable[[list[Verdict]], bool] = bool) -> float:
        """Seconds until a tick whose verdicts satisfy `holds`; fails after `within`."""
        start = self.clock.now()
        while self.clock.now() - start <= within:
            if holds(self.tick()):
                return self.clock.now() - start
        raise AssertionError(f"nothing was said within {within} s")
