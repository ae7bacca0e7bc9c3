"""The history of a run: its events, read once into types, with nothing judged yet.

What is missing or malformed is listed rather than guessed: a checker that builds on a history
with `unreadable` events knows that it does not know.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftkit.core.trace import MALFORMED

Event = Mapping[str, Any]

#: The `outcome` of an "end" event when the job did all its steps.
COMPLETED = "completed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """A member was about to vote on an attempt: these slots are in its gradients."""

    mono: float
    member: int
    seat: int
    step: int
    generation: int
    slots: tuple[int, ...]
    data: str | None
    """Hash of the samples of these slots, or None when the writer gave none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A member applied a step: by seeing the vote pass, or by rolling forward."""

    mono: float
    member: int
    seat: int
    step: int
    generation: int
    loss: float | None
    vote: Vote | None
    """The attempt it applied: this member's last vote on the step. None: it never voted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """A fault on purpose. `member` and `seat` are None when the victim is no rank."""

    mono: float
    fault: str
    phase: str
    seat: int | None
    member: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """A rank's process ended."""

    mono: float
    seat: int
    member: int
    code: int
    signal: int

    @property
    def clean(self) -> bool:
        return self.code == 0 and self.signal == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Accusation:
    """A verdict or a suspicion, when it was said."""

    mono: float
    fault: str
    seat: int
    member: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Final:
    """What a rank held when it finished."""

    mono: float
    seat: int
    member: int
    params: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewind:
    """A member, or with None the whole world, was taken back so that `step` is its next."""

    mono: float
    member: int | None
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Everything a judgement may rest on, each list in order of time."""

    votes: tuple[Vote, ...]
    commits: tuple[Commit, ...]
    injections: tuple[Injection, ...]
    exits: tuple[Exit, ...]
    accusations: tuple[Accusation, ...]
    suspicions: tuple[Accusation, ...]
    """Who was named without having to go for it."""
    finals: tuple[Final, ...]
    rewinds: tuple[Rewind, ...]
    halts: tuple[float, ...]
    """When the job was told to stop and regroup."""
    published: tuple[tuple[float, int], ...]
    """When parity of which step began to count."""
    noticed: tuple[str, ...]
    """What was said of bytes that were not what they should be."""
    ended: float | None
    """When the job ended; None when the history breaks off before."""
    end_outcome: str | None
    unreadable: tuple[str, ...]
    """One line for each event that lacks what its kind must have."""

    @property
    def named(self) -> tuple[Accusation, ...]:
        """Everything that was said of anybody, in order of time."""
        return tuple(sorted((*self.accusations, *self.suspicions), key=lambda a: a.mono))

    @property
    def seat_of(self) -> dict[int, int]:
        """The seat of each member that voted, committed or finished."""
        seats = {a.member: a.seat for a in self.acts}
        return seats | {f.member: f.seat for f in self.finals}

    @property
    def acts(self) -> tuple[Vote | Commit, ...]:
        """Votes and commits: the signs that a member was training."""
        return (*self.votes, *self.commits)


def read_history(events: Iterable[Event]) -> History:
    """Read raw events, in any order. Pure; kinds it does not know are passed over."""
    reader = _Reader()
    unreadable = []
    for event in sorted(events, key=_when):
        try:
            reader.take(event)
        except MALFORMED as error:
            unreadable.append(f"{event.get('kind', 'an event')!s} without {error}")
    return reader.history(unreadable)


def _when(event: Event) -> float:
    mono = event.get("mono")
    return float(mono) if isinstance(mono, int | float) else float("inf")


@dataclass
class _Reader:
    """Collects events; `take` raises KeyError, TypeError or ValueError on a malformed one."""

    votes: list[Vote] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)
    injections: list[Injection] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    accusations: list[Accusation] = field(default_factory=list)
    suspicions: list[Accusation] = field(default_factory=list)
    finals: list[Final] = field(default_factory=list)
    rewinds: list[Rewind] = field(default_factory=list)
    halts: list[float] = field(default_factory=list)
    published: list[tuple[float, int]] = field(default_factory=list)
    noticed: list[str] = field(default_factory=list)
    ended: float | None = None
    end_outcome: str | None = None
    _last_vote: dict[tuple[int, int], Vote] = field(default_factory=dict)
    _applied: dict[int, tuple[str, Commit]] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        kind = event["kind"]
        mono = float(event["mono"])
        match kind:
            case "vote":
                vote = Vote(
                    mono=mono,
                    member=int(event["member"]),
                    seat=int(event["seat"]),
                    step=int(event["step"]),
                    generation=int(event["generation"]),
                    slots=tuple(int(s) for s in event["slots"]),
                    data=None if event.get("data") is None else str(event["data"]),
                )
                self.votes.append(vote)
                self._last_vote[vote.member, vote.step] = vote
            case "commit" | "forward":
                self._apply(kind, mono, event)
            case "parity":
                self.published.append((mono, int(event["step"])))
            case "scrub":
                self.noticed.append(str(event.get("reason") or event.get("arenas")))
            case "rebuild":
                self.noticed += [t for t in map(str, event["damaged"]) if "digest" in t]
            case "rollback":
                step = int(event["step"])
                self.rewinds.append(Rewind(mono=mono, member=int(event["member"]), step=step))
            case "resume":
                # The world stands at `step`, so the next one it plays is step + 1.
                step = int(event["step"]) + 1
                self.rewinds.append(Rewind(mono=mono, member=None, step=step))
            case "halt":
                self.halts.append(mono)
            case "drill":
                self.injections.append(
                    Injection(
                        mono=mono,
                        fault=str(event["fault"]),
                        phase=str(event["phase"]),
                        seat=_maybe_int(event.get("seat")),
                        member=_maybe_int(event.get("member")),
                    )
                )
            case "exit":
                code, signal = _maybe_int(event.get("code")), _maybe_int(event.get("signal"))
                if code is None and signal is None:
                    raise KeyError("code or signal")
                self.exits.append(
                    Exit(
                        mono=mono,
                        seat=int(event["seat"]),
                        member=int(event["member"]),
                        code=code or 0,
                        signal=signal or 0,
                    )
                )
            case "verdict" | "suspicion":
                (self.accusations if kind == "verdict" else self.suspicions).append(
                    Accusation(
                        mono=mono,
                        fault=str(event["fault"]),
                        seat=int(event["seat"]),
                        member=int(event["member"]),
                        reason=str(event.get("reason", "")),
                    )
                )
            case "final":
                self.finals.append(
                    Final(
                        mono=mono,
                        seat=int(event["seat"]),
                        member=int(event["member"]),
                        params=str(event["params"]),
                    )
                )
            case "end":
                self.ended, self.end_outcome = mono, str(event["outcome"])

    def _apply(self, kind: str, mono: float, event: Event) -> None:
        member, step = int(event["member"]), int(event["step"])
        vote = self._last_vote.get((member, step))
        loss = event.get("loss")
        commit = Commit(
            mono=mono,
            member=member,
            seat=int(event["seat"]),
            step=step,
            generation=int(event["generation"]),
            loss=None if loss is None else float(loss),
            vote=vote,
        )
        told, before = self._applied.get(member, ("", None))
        # Rolling forward may be told twice, as "forward" and as the "commit" it amounts to:
        # one vote, two kinds, one application. The same kind twice is two applications.
        if before is not None and told != kind and before.step == step and before.vote == vote:
            return
        self._applied[member] = (kind, commit)
        self.commits.append(commit)

    def history(self, unreadable: list[str]) -> History:
        return History(
            votes=tuple(self.votes),
            commits=tuple(self.commits),
            injections=tuple(self.injections),
            exits=tuple(self.exits),
            accusations=tuple(self.accusations),
            suspicions=tuple(self.suspicions),
            finals=tuple(self.finals),
            rewinds=tuple(self.rewinds),
            halts=tuple(self.halts),
            published=tuple(self.published),
            noticed=tuple(self.noticed),
            ended=self.ended,
            end_outcome=self.end_outcome,
            unreadable=tuple(unreadable),
        )


def _maybe_int(value: object) -> int | None:
    return None if value is None else int(value)  # type: ignore[call-overload]


def commits_by_step(history: History) -> dict[int, list[Commit]]:
    """Who applied each step, in order of time."""
    steps: dict[int, list[Commit]] = defaultdict(list)
    for commit in history.commits:
        steps[commit.step].append(commit)
    return dict(steps)
