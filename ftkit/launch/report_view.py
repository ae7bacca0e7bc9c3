"""RunView: what a person wants to know of a running job, kept up to date event by event.

Pure: no files, no clock. The view is for people; what a drill proves is the checker's to say.
People call a seat a rank: it is the rank that the seat has while the world is full.
"""

import math
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ftkit.core.trace import MALFORMED
from ftkit.core.verdict import EVICT
from ftkit.launch.approximate_story import told

_STRUCK = {
    "kill": "killed by SIGKILL",
    "stop": "stopped by SIGSTOP",
    "raise": "raised an error",
    "hang": "hung",
    "kill-coordinator": "killed by SIGKILL",
}


@dataclass(eq=False)
class Story:
    """One incident as it unfolds. Owned and changed by `RunView` alone."""

    at: float
    """Monotonic time of the fault, or of its first sign when nobody told the fault itself."""
    seat: int | None
    """None when the victim is no rank."""
    member: int | None
    generation: int
    """The newest generation when it began; a commit above it shows the repair."""
    step: int
    """The step that was being played."""
    what: str
    phase: str | None = None
    drilled: bool = False
    seen_at: float | None = None
    waiting: set[int] = field(default_factory=set)
    """Survivors that have not committed in a newer generation."""
    repaired_at: float | None = None
    repaired_step: int | None = None
    back_at_step: int | None = None

    def sentence(self) -> str:
        """The incident so far, in one line."""
        who = f"rank {self.seat}" if self.seat is not None else "coordinator"
        where = f"in {self.phase} of step {self.step}" if self.phase else f"at step {self.step}"
        parts = [f"{who} {self.what} {where}"]
        if self.seen_at is not None:
            parts.append(f"seen after {duration(self.seen_at - self.at)}")
        if self.repaired_at is not None:
            whose = "survivors" if self.seat is not None else "ranks"
            took = duration(self.repaired_at - self.at)
            parts.append(f"{whose} committed step {self.repaired_step} after {took}")
        if self.back_at_step is not None:
            parts.append(f"{who} back at step {self.back_at_step}")
        return " → ".join(parts)

    @property
    def closed(self) -> bool:
        """Whether there is nothing left to wait for."""
        whole = self.back_at_step is not None or self.seat is None
        return whole and self.repaired_at is not None


@dataclass
class RunView:
    """The state of a run as its events tell it. Feed it events; read its fields."""

    step: int = 0
    """The newest committed step."""
    loss: float | None = None
    generation: int = 0
    training: dict[int, int] = field(default_factory=dict)
    """Seat to the member that trains there."""
    joining: dict[int, int] = field(default_factory=dict)
    """Seat to the member that is starting there."""
    stories: list[Story] = field(default_factory=list)
    approximate: list[str] = field(default_factory=list)
    """What of the state is not what an undisturbed run would have, in sentences."""
    ended: bool = False
    outcome: str | None = None
    reason: str = ""
    chosen: dict[str, str] = field(default_factory=dict)
    """How often the job makes "checkpoints" and "parity", and why, where it decides that itself."""

    @property
    def world_size(self) -> int:
        return len(self.training)

    def to_json(self) -> dict[str, object]:
        """Where the run stands, for programs and for whoever looks once."""
        loss = self.loss
        return {
            "step": self.step,
            # JSON has no number for it, and a browser takes nothing of what has one.
            "loss": loss if loss is None or math.isfinite(loss) else str(loss),
            "world_size": self.world_size,
            "generation": self.generation,
            "ended": self.ended,
            "incidents": [story.sentence() for story in self.stories],
            "approximate": self.approximate,
            **self.chosen,
        }

    def feed(self, event: Mapping[str, Any]) -> Story | None:
        """Take one event, roughly in order of time; an event that lacks a field is passed over.

        Returns:
          The incident this event brought forward, if any.
        """
        try:
            return self._feed(event)
        except MALFORMED:
            # A view must not end with the job it looks at; the checker reports such lines.
            return None

    def _feed(self, event: Mapping[str, Any]) -> Story | None:
        mono = float(event["mono"])
        match event["kind"]:
            case "spawn":
                self.joining[int(event["seat"])] = int(event["member"])
            case "admit":
                self._train(int(event["seat"]), int(event["member"]))
            case "vote":
                self.generation = max(self.generation, int(event["generation"]))
                self._train(int(event["seat"]), int(event["member"]))
            case "commit" | "forward":
                return self._commit(mono, event)
            case "resume":
                self.generation = max(self.generation, int(event["generation"]))
            case "approximate":
                self.approximate.append(told(event))
            case "drill":
                return self._drill(mono, event)
            case "exit":
                return self._exit(mono, event)
            case "verdict" if str(event["fault"]) in EVICT:
                return self._accused(mono, event)
            case "checkpoint-interval":
                self.chosen["checkpoints"] = f"every {event['every']} steps: {event['reason']}"
            case "parity-interval":
                self.chosen["parity"] = f"every {duration(event['seconds'])}: {event['reason']}"
            case "end":
                self.ended, self.outcome = True, str(event["outcome"])
                self.reason = str(event.get("reason", ""))
        return None

    def _exit(self, mono: float, event: Mapping[str, Any]) -> Story | None:
        seat, member = int(event["seat"]), int(event["member"])
        story = None
        if (event.get("code") or event.get("signal")) and not self._lost(member):
            story = self._open(mono, seat, member, _how_it_left(event))
        self._leave(seat, member)
        return story

    def _accused(self, mono: float, event: Mapping[str, Any]) -> Story | None:
        seat, member = int(event["seat"]), int(event["member"])
        story = self._open(float(event.get("since_s", mono)), seat, member, str(event["fault"]))
        self._leave(seat, member)
        if story.seen_at is not None:
            return None  # a verdict is said again for as long as it holds
        story.seen_at = mono
        return story

    def _train(self, seat: int, member: int) -> None:
        # Files are read one after another, so an old member's last words may come late.
        if self.training.get(seat, -1) < member and not self._lost(member):
            self.training[seat] = member
            if self.joining.get(seat) == member:
                del self.joining[seat]

    def _leave(self, seat: int, member: int) -> None:
        for where in (self.training, self.joining):
            if where.get(seat) == member:
                del where[seat]
        for story in self.stories:
            story.waiting.discard(member)

    def _lost(self, member: int) -> bool:
        return any(s.member == member for s in self.stories)

    def _open(self, at: float, seat: int | None, member: int | None, what: str) -> Story:
        for story in self.stories:
            if story.member == member and (member is not None or not story.closed):
                return story
        survivors = {m for s, m in self.training.items() if s != seat}
        story = Story(
            at=at,
            seat=seat,
            member=member,
            generation=self.generation,
            step=self.step + 1,
            what=what,
            waiting=survivors,
        )
        self.stories.append(story)
        return story

    def _drill(self, mono: float, event: Mapping[str, Any]) -> Story:
        seat, member, fault = event.get("seat"), event.get("member"), str(event["fault"])
        story = self._open(mono, seat, member, fault)
        # The fault itself is the better witness, even when its signs were read first.
        story.at, story.drilled = mono, True
        story.what = _STRUCK.get(fault, fault)
        story.phase = str(event["phase"])
        story.step = int(event.get("step") or story.step)
        if member is None:
            # Nobody left the world, so any commit after the fault shows that training goes on.
            story.generation = -1
        return story

    def _commit(self, mono: float, event: Mapping[str, Any]) -> Story | None:
        seat, member = int(event["seat"]), int(event["member"])
        step, generation = int(event["step"]), int(event["generation"])
        self._train(seat, member)
        self.generation = max(self.generation, generation)
        if step >= self.step:
            self.step = step
            self.loss = self.loss if event.get("loss") is None else float(event["loss"])
        moved = None
        for story in self.stories:
            if generation > story.generation and mono > story.at and member in story.waiting:
                story.waiting.discard(member)
                if not story.waiting:
                    story.repaired_at, story.repaired_step, moved = mono, step, story
            newcomer = story.member is not None and member > story.member
            if seat == story.seat and newcomer and story.back_at_step is None:
                story.back_at_step, moved = step, story
        return moved


def _how_it_left(event: Mapping[str, Any]) -> str:
    number = event.get("signal")
    if not number:
        return f"left with code {event['code']}"
    try:
        return f"killed by {signal.Signals(int(number)).name}"
    except ValueError:
        return f"killed by signal {number}"


def duration(seconds: float) -> str:
    """A time for people: '24 ms', '0.41 s', '12 s'."""
    if seconds < 0.3:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
