"""The checker: from what a drill's events say to pass, fail or unknown, with the evidence.

Pure: events in, `Outcome` out. Any rule that is broken makes it *fail*; otherwise anything the
rules need and the events do not tell makes it *unknown*; only what is left is a *pass*.

The rules, for a job of V slots and S steps:

* R1 every step 1..S was committed, and the job ended by itself;
* R2 in each attempt that was committed, the slots voted are 0..V-1, each exactly once;
* R3 no member applied a step twice, and no commit that outlived its member was undone; a job of
  shards may go back by a few steps, to the newest of which memory has all shards, if it commits
  them again;
* R4 the same slots of the same step held the same samples as in the undisturbed run;
* R5 no member but the drill's targets left with an error, and no other was accused;
* R6 after each fault every survivor committed again (in a newer generation when the fault
  takes a member away), and the target's seat did so too;
* R8 when all ranks were lost at once, the job went on from the newest step that parity had
  published, or a newer one; steps after that may be played again;
* R9 bits that were flipped on purpose were noticed;
* R10 where the drill is about the name of its fault, the first that was said of each target was
  of that class;
* R7 all final parameters are equal, and equal to the undisturbed run's unless the fault is to
  alter them.

The vote an attempt is counted by is written before the voting, so a rank that was killed
between vote and commit has its slots counted. A commit that only a dead rank saw is no loss:
the survivors play the step again, with the same samples (`docs/architecture.md`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from ftkit.core.verdict import EVICT
from ftkit.launch.report_history import (
    COMPLETED,
    Commit,
    Event,
    History,
    commits_by_step,
    read_history,
)
from ftkit.launch.report_incidents import Incident, read_incidents, targets_of


class Answer(StrEnum):
    """What a checker may say."""

    PASS = "pass"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """The drill's plan, and the job it was done to."""

    fault: str
    phase: str
    seed: int
    world_size: int
    """Ranks of a full world; so many must finish."""
    spares: int = 0
    """Ranks beyond, which may stand by to the end."""
    steps: int
    slots: int
    slot_size: int
    """Samples of a slot."""
    evicts: bool = True
    """Whether the fault takes a rank away: then a newer generation must follow and the seat
    come back. False for faults outside the ranks, such as the coordinator's death."""
    loses_all: bool = False
    """Whether the fault takes all ranks at once, so that only memory and parity are left."""
    corrupts: bool = False
    """Whether the fault flips bits of what is left."""
    alters: bool = False
    """Whether the fault changes what is computed: then the ranks only have to agree."""
    names: frozenset[str] = frozenset()
    """Classes of which one must be the first that is said of each target; none: any will do."""
    strikes: int = 1
    """How often it has to strike; where the job ends before, nothing can be said."""
    steps_back: int = 0
    """By how many steps a fault may take the job back: 0 where every rank holds all of the state."""

    def __post_init__(self) -> None:
        for name in ("world_size", "steps", "slots", "slot_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A checked drill. A figure is None when the events do not tell it."""

    outcome: Answer
    fault: str
    phase: str
    seed: int
    detect_s: float | None
    """Fault to the first verdict against its target or the first halt; the slowest fault's."""
    repair_s: float | None
    """Fault to the moment when every survivor had committed its next step (R6)."""
    steps_lost: int
    steps_replayed: int = 0
    """Committed steps that were undone and committed again."""
    samples_lost: int
    samples_doubled: int
    survivor_exits: int
    params_equal: bool | None
    """Whether all ranks ended with the undisturbed run's parameters, bit for bit."""
    verdict: Mapping[str, object] | None
    """The first verdict after the fault: class, culprit (seat), reason."""
    evidence: Mapping[str, object] = field(default_factory=dict)
    """JSON-safe; `problems` are rules broken, `missing` is what could not be found."""

    def to_json(self) -> dict[str, object]:
        """One flat object, as `ftkit drill run --json` prints it."""
        return {
            "outcome": str(self.outcome),
            "fault": self.fault,
            "phase": self.phase,
            "seed": self.seed,
            "detect_s": self.detect_s,
            "repair_s": self.repair_s,
            "steps_lost": self.steps_lost,
            "steps_replayed": self.steps_replayed,
            "samples_lost": self.samples_lost,
            "samples_doubled": self.samples_doubled,
            "survivor_exits": self.survivor_exits,
            "params_equal": self.params_equal,
            "verdict": None if self.verdict is None else dict(self.verdict),
            "evidence": dict(self.evidence),
        }


def with_more(
    outcome: Outcome, *, problems: list[str], missing: list[str], **evidence: object
) -> Outcome:
    """The outcome after further rules: what they found broken, and what could not be found."""
    found = dict(outcome.evidence) | evidence
    for name, more in (("problems", problems), ("missing", missing)):
        before = found.get(name, [])
        assert isinstance(before, list), "the checker's list"
        found[name] = [*before, *more]
    answer = outcome.outcome
    if problems:
        answer = Answer.FAIL
    elif missing and answer is Answer.PASS:
        answer = Answer.UNKNOWN
    return replace(outcome, outcome=answer, evidence=found)


@dataclass
class _Findings:
    problems: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def expectation_of(events: Iterable[Event]) -> Expectation:
    """What can be read from a run's own events about what it was to be: for its report.

    The size of a slot is not among it, so samples are counted in slots.
    """
    history = read_history(events)
    faults = history.injections
    return Expectation(
        fault=faults[0].fault if faults else "run",
        phase=faults[0].phase if faults else "none",
        seed=0,
        world_size=max(1, len({a.seat for a in history.acts})),
        steps=max((c.step for c in history.commits), default=1),
        slots=max((s + 1 for v in history.votes for s in v.slots), default=1),
        slot_size=1,
        evicts=any(f.seat is not None for f in faults),
    )


def check(
    events: Iterable[Event], reference_events: Iterable[Event] | None, expectation: Expectation
) -> Outcome:
    """Judge one disturbed run.

    Args:
      events: all events of the disturbed run, from every process, in any order.
      reference_events: the same job undisturbed, or None when there is no such run (then
        `params_equal` is None and the answer at best unknown).
      expectation: what was to be done to which job.
    """
    history = read_history(events)
    reference = None if reference_events is None else read_history(reference_events)
    found = _Findings(missing=[f"unreadable event: {line}" for line in history.unreadable])

    targets = targets_of(history)
    _check_end(history, expectation, found)
    lost, doubled = _check_samples(history, reference, expectation, found)
    undone, applied_twice = _check_undone(history, expectation, found)
    doubled += len(applied_twice) * expectation.slots * expectation.slot_size
    exits = _check_exits(history, targets, expectation, found)
    _check_noticed(history, expectation, found)
    _check_names(history, targets, expectation, found)
    incidents = read_incidents(
        history,
        evicts=expectation.evicts,
        loses_all=expectation.loses_all,
        spares=bool(expectation.spares),
    )
    _check_incidents(history, incidents, expectation, found)
    params_equal = _check_params(history, reference, expectation, found)

    again = undone & _committed_again(history) if expectation.steps_back else set[int]()

    answer = Answer.FAIL if found.problems else Answer.UNKNOWN if found.missing else Answer.PASS
    return Outcome(
        outcome=answer,
        fault=expectation.fault,
        phase=expectation.phase,
        seed=expectation.seed,
        detect_s=_slowest([i.detect_s for i in incidents]),
        repair_s=_slowest([i.repair_s for i in incidents]),
        steps_lost=len(undone) - len(again),
        steps_replayed=len(again),
        samples_lost=lost,
        samples_doubled=doubled,
        survivor_exits=exits,
        params_equal=params_equal,
        verdict=_first_verdict(history),
        evidence={
            "problems": found.problems,
            "missing": found.missing,
            "final_step": max((c.step for c in history.commits), default=0),
            "generations": sorted({v.generation for v in history.votes}),
            "incidents": [asdict(i) for i in incidents],
            "published": _published_before(history),
            "noticed": list(history.noticed),
            "suspected_wrongly": [
                {"class": a.fault, "seat": a.seat, "reason": a.reason}
                for a in history.suspicions
                if a.member not in targets and a.fault in EVICT
            ],
            "params": sorted({f.params for f in history.finals}),
            "reference_params": sorted({f.params for f in reference.finals}) if reference else [],
            "first_loss_difference": _first_loss_difference(history, reference),
        },
    )


def _check_end(history: History, expected: Expectation, found: _Findings) -> None:
    """R1, the end of it."""
    if history.ended is None:
        found.missing.append("no end event: the history breaks off")
    elif history.end_outcome != COMPLETED:
        found.problems.append(f"the job ended as {history.end_outcome!r}, not {COMPLETED!r}")
    last = max((c.step for c in history.commits), default=0)
    if last != expected.steps:
        text = f"the last committed step is {last}, the job has {expected.steps}"
        (found.missing if history.ended is None else found.problems).append(text)


def _check_samples(
    history: History, reference: History | None, expected: Expectation, found: _Findings
) -> tuple[int, int]:
    """R1, R2 and R4: samples lost and samples doubled, over all steps."""
    steps = commits_by_step(history)
    wanted = Counter(range(expected.slots))
    voted = _votes_by_attempt(history)
    truth = _samples_voted(reference) if reference else {}
    lost = doubled = 0
    for step in range(1, max(steps, default=0) + 1):
        if step not in steps:
            found.problems.append(f"step {step} was never committed, later ones were")
            lost += expected.slots * expected.slot_size
            continue
        if any(c.vote is None for c in steps[step]):
            found.missing.append(f"step {step} was committed by a member with no vote on it")
        for generation in sorted({c.vote.generation for c in steps[step] if c.vote}):
            votes = voted[step, generation]
            counted = Counter(slot for slots, _ in votes for slot in slots)
            short, extra = wanted - counted, counted - wanted
            if short or extra:
                found.problems.append(
                    f"step {step}, generation {generation}: slots missing {sorted(short)}, "
                    f"too many {sorted(extra.elements())}"
                )
            lost += short.total() * expected.slot_size
            doubled += extra.total() * expected.slot_size
            for slots, data in votes:
                due = truth.get((step, slots))
                if data is not None and due is not None and data != due:
                    found.problems.append(
                        f"step {step}, slots {list(slots)}: other samples than undisturbed "
                        f"({data}, not {due})"
                    )
                    lost += len(slots) * expected.slot_size
    return lost, doubled


def _votes_by_attempt(
    history: History,
) -> dict[tuple[int, int], list[tuple[tuple[int, ...], str | None]]]:
    """(step, generation) to (slots, hash of samples) of each member's last vote there."""
    last = {(v.step, v.generation, v.member): v for v in history.votes}
    attempts: dict[tuple[int, int], list[tuple[tuple[int, ...], str | None]]] = {}
    for (step, generation, _), vote in last.items():
        attempts.setdefault((step, generation), []).append((vote.slots, vote.data))
    return attempts


def _samples_voted(history: History) -> dict[tuple[int, tuple[int, ...]], str]:
    return {(v.step, v.slots): v.data for v in history.votes if v.data is not None}


def _check_undone(
    history: History, expected: Expectation, found: _Findings
) -> tuple[set[int], list[int]]:
    """R3: the steps that were undone, and those some member applied twice."""
    undone: set[int] = set()
    twice: list[int] = []
    before: dict[int, Commit] = {}
    for commit in history.commits:
        last = before.get(commit.member)
        if last is not None and commit.step <= last.step:
            taken_back = any(
                last.mono <= r.mono <= commit.mono
                and r.member in (None, commit.member)
                and r.step <= last.step
                for r in history.rewinds
            )
            if taken_back:
                undone.update(range(commit.step, last.step + 1))
                if expected.steps_back and last.step - commit.step >= expected.steps_back:
                    found.problems.append(
                        f"member {commit.member} (seat {commit.seat}) was taken back from step "
                        f"{last.step} to {commit.step}, by more than {expected.steps_back} steps"
                    )
            else:
                twice.append(commit.step)
                found.problems.append(
                    f"member {commit.member} (seat {commit.seat}) applied step {commit.step} again "
                    f"after step {last.step}, without having been taken back"
                )
        before[commit.member] = commit

    voters: dict[tuple[int, int], set[int]] = {}
    for vote in history.votes:
        voters.setdefault((vote.step, vote.generation), set()).add(vote.member)
    for step, commits in commits_by_step(history).items():
        attempts: dict[int, set[int]] = {}
        for c in commits:
            if c.vote:
                attempts.setdefault(c.vote.generation, set()).add(c.member)
        for generation in sorted(attempts)[:-1]:
            # Committed by all who voted and then again by others: a restart from further back.
            if attempts[generation] >= voters[step, generation]:
                undone.add(step)
    if expected.steps_back and not expected.loses_all:
        return undone, twice
    kept = _published_before(history) if expected.loses_all else max(undone, default=0)
    if early := sorted(step for step in undone if step <= kept):
        found.problems.append(f"steps {early} were committed and then undone")
    return undone, twice


def _committed_again(history: History) -> set[int]:
    """The steps that were committed in two generations or more."""
    return {
        step
        for step, commits in commits_by_step(history).items()
        if len({c.generation for c in commits}) > 1
    }


def _published_before(history: History) -> int:
    """R8: the newest step that parity had published when the first fault struck."""
    struck = min((i.mono for i in history.injections), default=float("inf"))
    return max((step for mono, step in history.published if mono < struck), default=0)


def _check_noticed(history: History, expected: Expectation, found: _Findings) -> None:
    """R9."""
    if expected.corrupts and not history.noticed:
        found.problems.append("bits were flipped, and no event says that anybody noticed")


def _check_exits(
    history: History, targets: frozenset[int], expected: Expectation, found: _Findings
) -> int:
    """R5: how many innocent members left with an error before the job ended.

    One that stood by to the end is told to leave, and has nothing to finish.
    """
    trained = {c.member for c in history.commits}
    end = float("inf") if history.ended is None else history.ended
    survivors = [
        e
        for e in history.exits
        if not e.clean
        and e.member not in targets
        and e.mono < end
        and not (expected.spares and e.member not in trained)
    ]
    for e in survivors:
        how = f"signal {e.signal}" if e.signal else f"code {e.code}"
        found.problems.append(f"member {e.member} (seat {e.seat}), not a target, left with {how}")
    wrong = {
        (a.member, a.fault): a
        for a in history.accusations
        if a.fault in EVICT and a.member not in targets and a.mono < end
    }
    for a in wrong.values():
        found.problems.append(
            f"member {a.member} (seat {a.seat}), not a target, was judged {a.fault}: {a.reason}"
        )
    return len(survivors)


def _check_names(
    history: History, targets: frozenset[int], expected: Expectation, found: _Findings
) -> None:
    """R10."""
    if not expected.names:
        return
    for target in sorted(targets):
        first = next((a for a in history.named if a.member == target), None)
        if first is None:
            found.problems.append(f"nothing was ever said of member {target}, the target")
        elif first.fault not in expected.names:
            found.problems.append(
                f"member {target} was first called {first.fault}, not "
                f"{' or '.join(sorted(expected.names))}: {first.reason}"
            )


def _check_incidents(
    history: History, incidents: list[Incident], expected: Expectation, found: _Findings
) -> None:
    """R6."""
    if not incidents:
        found.missing.append("no drill event: the fault was not injected")
    elif len(incidents) < expected.strikes:
        found.missing.append(
            f"the fault struck {len(incidents)} times of {expected.strikes}: give more --steps"
        )
    # While the history breaks off, what has not happened may still have been to come.
    late = found.missing if history.ended is None else found.problems
    for incident in incidents:
        found.missing += incident.unknown
        late += incident.undone


def _check_params(
    history: History, reference: History | None, expected: Expectation, found: _Findings
) -> bool | None:
    """R7. None when a rank's parameters or the undisturbed run's are not known."""
    seats = {f.seat for f in history.finals}
    silent = sorted(set(range(expected.world_size + expected.spares)) - seats)
    if len(silent) > expected.spares:
        found.missing.append(f"seats {silent} told no final parameters")
    ours = {f.params for f in history.finals}
    theirs = {f.params for f in reference.finals} if reference else set()
    if len(ours) > 1:
        found.problems.append(f"the ranks ended with {len(ours)} different sets of parameters")
        return False
    if len(theirs) != 1:
        found.missing.append(
            f"the undisturbed run told {len(theirs)} different sets of parameters, not one"
            if reference
            else "no undisturbed run to compare with"
        )
        return None
    if ours and ours != theirs and not expected.alters:
        found.problems.append("the final parameters are not the undisturbed run's")
        return False
    return None if len(silent) > expected.spares else ours == theirs


def _slowest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _first_verdict(history: History) -> dict[str, object] | None:
    start = history.injections[0].mono if history.injections else 0.0
    for a in history.named:
        if a.mono >= start:
            return {"class": a.fault, "culprit": a.seat, "reason": a.reason}
    return None


def _first_loss_difference(history: History, reference: History | None) -> int | None:
    """The first step whose loss is not the undisturbed run's; None when all are equal."""
    theirs = {c.step: c.loss for c in reference.commits} if reference else {}
    different = [
        c.step
        for c in history.commits
        if c.loss is not None and theirs.get(c.step) is not None and theirs[c.step] != c.loss
    ]
    return min(different, default=None)
