"""UiView: a run as its page shows it: ranks, tiers, what is said and what happened. Pure.

It is fed every event of a run and remembers a bounded part of them, however long the run: what
was long ago is the report's to show (`launch.report`).
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from ftkit.core.trace import MALFORMED
from ftkit.core.verdict import ACCUSES_NOBODY
from ftkit.detection.row import Row
from ftkit.launch.report_view import RunView
from ftkit.launch.ui.happened import TOLD, sentence
from ftkit.launch.ui.tiers import TierView

#: Losses remembered: of a longer run every second is dropped, again and again.
LOSSES_MAX = 1200
#: Reports of pace remembered, one every five seconds: what is shown is the last two minutes.
_PACE_KEPT = 24
_HAPPENED_KEPT = 60
#: Events that the timeline is drawn from: with 32 ranks and 10 steps a second, some 20 s.
_RECENT_KEPT = 8000
_RECENT = frozenset({"spawn", "commit", "forward", "exit", "drill", "halt", "rollback", "final"})


class RankState(StrEnum):
    """What has become of the rank of a seat."""

    TRAINING = "training"
    STARTING = "starting"
    """A process was started that trains in no world yet; a spare stays so."""
    GONE = "gone"
    """Lost, and nobody was started in its place yet."""
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankNow:
    """One seat now. What only its status row tells is None where that cannot be read."""

    seat: int
    member: int | None
    state: RankState
    said: str
    """The verdicts and suspicions about it that hold; empty: none."""
    accused: bool = False
    """Whether one of them is more than a label."""
    phase: str | None = None
    step: int | None = None
    op: str | None = None
    """The collective it waits in."""
    still_s: float | None = None
    """Since it last moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happened:
    """Something worth a line. `t` is Unix time."""

    t: float
    kind: str
    words: str


@dataclass
class UiView:
    """Feed it events; read its fields, or all of them by `to_json`."""

    run: RunView = field(default_factory=RunView)
    tiers: TierView = field(default_factory=TierView)
    happened: deque[Happened] = field(default_factory=lambda: deque(maxlen=_HAPPENED_KEPT))
    """Oldest first."""
    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_RECENT_KEPT))
    """Events that the timeline is drawn from."""
    pace: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_PACE_KEPT))
    """The newest reports of pace, as events."""
    losses: dict[int, float] = field(default_factory=dict)
    """Loss by step, thinned out."""
    boards: dict[int, str] = field(default_factory=dict)
    """Node -> where its status board lies, on that node."""
    newest_t: float = 0.0
    """Unix time of the newest event."""
    _every: int = 1
    """Only each so-many-th step is among the losses."""
    _said: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """(fault, member) -> the verdict or suspicion that holds."""
    _seats: dict[int, int] = field(default_factory=dict)
    """Seat -> its newest member."""
    _done: set[int] = field(default_factory=set)
    """Members that left in order."""

    def feed(self, event: dict[str, Any]) -> None:
        """Take one event, roughly in order of time; one that lacks a field is passed over."""
        self.run.feed(event)
        try:
            self._feed(event)
        except MALFORMED:
            return  # a view must not end with the job it looks at

    def ranks(self, rows: Mapping[int, Row], now_ns: int) -> list[RankNow]:
        """Every seat that ever had a process, in order.

        Args:
          rows: member -> its status row, of the nodes whose board can be read.
          now_ns: CLOCK_MONOTONIC of that host.
        """
        return [self._rank(seat, rows, now_ns) for seat in sorted(self._seats)]

    def said(self) -> list[dict[str, Any]]:
        """The verdicts and suspicions that hold, oldest first; not of who was replaced since."""
        hold = (
            event
            for (_, member), event in self._said.items()
            if self.run.training.get(event.get("seat", -1), -1) <= member
        )
        return sorted(hold, key=lambda e: float(e.get("since_s", e["mono"])))

    def to_json(self, ranks: list[RankNow]) -> dict[str, object]:
        """All but the pictures. `ranks` as `ranks` returned them."""
        fields = ("kind", "fault", "seat", "member", "reason", "confidence")
        return self.run.to_json() | {
            "outcome": self.run.outcome,
            "reason": self.run.reason,
            "t": self.newest_t,
            "ranks": [asdict(rank) for rank in ranks],
            "tiers": [tier.to_json() for tier in self.tiers.tiers.values()],
            "said": [{name: e.get(name) for name in fields} for e in self.said()],
            "happened": [asdict(line) for line in self.happened],
        }

    def _feed(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        self.newest_t = max(self.newest_t, float(event["t"]))
        if kind in _RECENT:
            self.recent.append(event)
        news = kind in TOLD
        match kind:
            case "board":
                self.boards[int(event["node"])] = str(event["path"])
            case "spawn":
                seat, member = int(event["seat"]), int(event["member"])
                self._seats[seat] = max(member, self._seats.get(seat, -1))
            case "commit" | "forward":
                self._loss(int(event["step"]), event.get("loss"))
            case "steps":
                self.pace.append(event)
            case "verdict" | "suspicion":
                key = str(event["fault"]), int(event["member"])
                before = self._said.get(key)
                news = before is None or before["kind"] != kind  # said again while it holds
                self._said[key] = event
            case "verdict-over":
                self._said.pop((str(event["fault"]), int(event["member"])), None)
            case "exit":
                news = self._exit(int(event["member"]), event)
            case "end":
                self._said.clear()
        self.tiers.feed(event)
        if news:
            line = Happened(t=float(event["t"]), kind=str(kind), words=sentence(event))
            self.happened.append(line)

    def _exit(self, member: int, event: Mapping[str, Any]) -> bool:
        """Note that a process ended; whether that is news."""
        for key in [key for key in self._said if key[1] == member]:
            del self._said[key]
        if event.get("code") or event.get("signal"):
            return True
        self._done.add(member)
        return False

    def _loss(self, step: int, loss: object) -> None:
        if loss is None or step % self._every:
            return
        self.losses[step] = float(loss)  # type: ignore[arg-type]
        while len(self.losses) > LOSSES_MAX:
            self._every *= 2
            self.losses = {s: v for s, v in self.losses.items() if s % self._every == 0}

    def _rank(self, seat: int, rows: Mapping[int, Row], now_ns: int) -> RankNow:
        member = self.run.training.get(seat, self.run.joining.get(seat, self._seats[seat]))
        row = rows.get(member)
        state = RankState.DONE if member in self._done else RankState.GONE
        if seat in self.run.training:
            state = RankState.TRAINING
        elif seat in self.run.joining:
            # A script without a session joins no world: what it does is all that is known.
            state = RankState.TRAINING if row is not None and row.plain else RankState.STARTING
        faults = [fault for fault, who in self._said if who == member]
        now = RankNow(
            seat=seat,
            member=member,
            state=state,
            said=", ".join(faults),
            accused=not ACCUSES_NOBODY.issuperset(faults),
        )
        if row is None or state in (RankState.GONE, RankState.DONE):
            return now
        return replace(
            now,
            phase=row.phase.value,
            step=row.step,
            op=row.op if row.t_enter_ns else None,
            still_s=max(0.0, (now_ns - row.t_progress_ns) / 1e9),
        )
