"""The programme: every phase and every move.

No I/O, no clock, no dice but the seed's. ::

               due              allowed           struck
    WAITING --------> LOOKING ----------> STRIKING --------> WATCHING
     ^   ^               |  ^                |                  |
     |   +---------------+  +----------------+                  |
     |     interval over        refused                         |
     +----------------------------------------------------------+
                            survived                       failed, unknown --> OVER

Any phase but WATCHING also goes to OVER when the job is over, or drills are stopped; from WATCHING
that waits for the outcome: what was begun is seen to its end.

Invariants (tests/launch/programme/test_machine.py walks them at random):

* P1: nothing is struck but in LOOKING's answer to a state that no guard forbids, before the interval ends.
* P2: at most one strike in an interval, and none while another is watched.
* P3: after an outcome that is not `survived` nothing is struck any more.
* P4: nothing is struck once drills are stopped.
"""

from dataclasses import dataclass, replace
from enum import StrEnum, auto

from ftkit.launch.programme.costs import expected_s, spent_s
from ftkit.launch.programme.guards import Guards, refusal
from ftkit.launch.programme.job_state import JobState
from ftkit.launch.programme.record import DrillRecord, Survival
from ftkit.launch.programme.schedule import Interval, fault_of, next_interval
from ftkit.launch.programme.targets import Target, choose

#: Survival -> exit code, as those of `ftkit drill run`.
CODES = {Survival.SURVIVED: 0, Survival.FAILED: 1, Survival.UNKNOWN: 2}


class Phase(StrEnum):
    """Where the programme is."""

    WAITING = auto()
    """For the moment of the interval."""
    LOOKING = auto()
    """Whether the guards allow a strike; until they do, or the interval is over."""
    STRIKING = auto()
    """The agent has been asked."""
    WATCHING = auto()
    """What comes of it."""
    OVER = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The programme that was asked for."""

    job: str
    faults: tuple[str, ...]
    guards: Guards
    seed: int
    every_s: float | None
    """None: once, now."""
    count: int | None = None
    """Drills that are to be survived; None: for as long as there is a job."""
    prior_s: float
    """What a drill is taken to cost that was never seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that the programme remembers."""

    phase: Phase
    interval: Interval
    survived: int = 0
    refused: str = ""
    """Why the last look did not end in a strike."""
    target: Target | None = None
    code: int = 0
    reason: str = ""
    """OVER: why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the driver knows now."""

    now: float
    """Unix time."""
    stopped: str = ""
    """By what drills are stopped; empty while they are not."""
    job_over: str = ""
    job: JobState | None = None
    """LOOKING: how it stands; None until it was asked."""
    paced: bool = False
    """LOOKING: whether enough steps were seen to tell what a strike costs."""
    history: tuple[DrillRecord, ...] = ()
    answer: str | None = None
    """STRIKING: why the agent refused; empty: it has struck; None: it has not been asked."""
    outcome: tuple[Survival, str] | None = None
    """WATCHING: what came of it, once that is known."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is to be done before `until`, but to see whether the job or the programme is over."""

    until: float


@dataclass(frozen=True, slots=True)
class Look:
    """Ask how the job stands."""


@dataclass(frozen=True, slots=True)
class Strike:
    """Have it struck."""

    target: Target


@dataclass(frozen=True, slots=True)
class Watch:
    """See what comes of it."""


@dataclass(frozen=True, slots=True)
class Note:
    """Add this to the history. `target` is None where nothing was struck."""

    fault: str
    outcome: Survival
    reason: str
    interval: Interval
    target: Target | None = None


@dataclass(frozen=True, slots=True)
class End:
    """It is over."""


Command = Wait | Look | Strike | Watch | Note | End


def begin(options: Options, now: float, *, patience_s: float, done: int | None = None) -> State:
    """The first state. `done`: the newest interval that the history has of this job and seed."""
    if options.every_s is None:
        # No interval to count: the second decides the dice.
        interval = Interval(number=int(now), due=now, ends=now + patience_s)
    else:
        interval = next_interval(now, every_s=options.every_s, seed=options.seed, done=done)
    return State(phase=Phase.WAITING, interval=interval)


def advance(state: State, seen: Seen, options: Options) -> tuple[State, Command]:
    """What to do next, and the state that this is done from."""
    if state.phase is Phase.OVER:
        return state, End()
    if state.phase is Phase.WATCHING:
        return _watched(state, seen, options)
    if state.phase is Phase.STRIKING and seen.answer == "":
        return replace(state, phase=Phase.WATCHING, refused=""), Watch()
    if seen.stopped:
        return _over(state, Survival.SURVIVED, f"drills are stopped: {seen.stopped}")
    if seen.job_over:
        missing = options.count is not None and state.survived < options.count
        return _over(state, Survival.UNKNOWN if missing else Survival.SURVIVED, seen.job_over)
    match state.phase:
        case Phase.WAITING if seen.now < state.interval.due:
            return state, Wait(state.interval.due)
        case Phase.WAITING:
            return replace(state, phase=Phase.LOOKING, refused=""), Look()
        case Phase.STRIKING:
            assert seen.answer, "the driver has asked, and nothing was struck"
            return replace(state, phase=Phase.LOOKING, refused=seen.answer, target=None), Look()
        case _:
            return _looked(state, seen, options)


def _looked(state: State, seen: Seen, options: Options) -> tuple[State, Command]:
    fault = fault_of(state.interval.number, options.faults, seed=options.seed)
    if seen.now >= state.interval.ends:
        reason = state.refused or "the job was not asked in time"
        note = Note(fault, Survival.SKIPPED, reason, state.interval)
        if options.every_s is None:
            return _over(state, Survival.UNKNOWN, reason)[0], note
        return _next(state, seen, options), note
    if seen.job is None:
        return state, Look()
    target = choose(fault, seen.job, seed=options.seed, number=state.interval.number)
    window_s = options.guards.budget.window_s
    reason = refusal(
        options.guards,
        seen.job,
        target,
        spent_s=spent_s(
            seen.history, options.job, since=seen.now - window_s, prior_s=options.prior_s
        ),
        expected_s=expected_s(seen.history, fault, prior_s=options.prior_s),
    )
    if not reason and not seen.paced:
        reason = "ranks have not been seen to commit steps yet"
    if reason:
        return replace(state, refused=reason), Look()
    assert target is not None, "a guard forbids to strike nobody"
    return replace(state, phase=Phase.STRIKING, target=target), Strike(target)


def _watched(state: State, seen: Seen, options: Options) -> tuple[State, Command]:
    if seen.outcome is None:
        return state, Watch()
    assert state.target is not None, "it was struck"
    outcome, reason = seen.outcome
    note = Note(state.target.fault, outcome, reason, state.interval, state.target)
    survived = state.survived + (outcome is Survival.SURVIVED)
    after = replace(state, survived=survived, target=None)
    if outcome is not Survival.SURVIVED:
        return _over(after, outcome, f"{state.target.words}: {outcome}: {reason}")[0], note
    if survived == options.count or options.every_s is None:
        return _over(after, outcome, f"{survived} drills were survived")[0], note
    return _next(after, seen, options), note


def _next(state: State, seen: Seen, options: Options) -> State:
    assert options.every_s is not None, "there is another interval"
    interval = next_interval(
        seen.now, every_s=options.every_s, seed=options.seed, done=state.interval.number
    )
    return replace(state, phase=Phase.WAITING, interval=interval, refused="")


def _over(state: State, outcome: Survival, reason: str) -> tuple[State, Command]:
    return replace(state, phase=Phase.OVER, code=CODES[outcome], reason=reason), End()
