"""What each injected fault did to a run: seen when, repaired when, the seat back when."""

from dataclasses import dataclass

from ftkit.core.fault_plan import KILL_COORDINATOR
from ftkit.core.pace_plan import PaceFault
from ftkit.launch.report_history import History, Injection

#: Faults that take no rank away, also where others of the run do.
_KEEPS_ALL = frozenset({*PaceFault, KILL_COORDINATOR})


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """One injection and what followed. Times are seconds after it; None: it did not happen."""

    fault: str
    phase: str
    at: float
    """Monotonic time of the injection."""
    seat: int | None
    member: int | None
    """The victim; None when the fault was aimed at no rank."""
    detect_s: float | None
    """To the first verdict against the victim, or the first halt."""
    repair_s: float | None
    """To the moment when the last of the survivors had committed its next step."""
    back_at_step: int | None
    """The first step that the victim's seat committed under a new member."""
    unknown: tuple[str, ...]
    """What could not be found."""
    undone: tuple[str, ...]
    """What should have followed and did not."""


def targets_of(history: History) -> frozenset[int]:
    """The members that faults were aimed at."""
    return frozenset(m for i in history.injections if (m := victim_of(history, i)) is not None)


def victim_of(history: History, injection: Injection) -> int | None:
    """The member aimed at. A victim told by its seat is who sat there at the time."""
    if injection.member is not None or injection.seat is None:
        return injection.member
    sitting = [
        a.member for a in history.acts if a.seat == injection.seat and a.mono <= injection.mono
    ]
    return max(sitting, default=None)  # member ids rise with every incarnation


def read_incidents(
    history: History, *, evicts: bool, loses_all: bool = False, spares: bool = False
) -> list[Incident]:
    """Follow every injection of a run, in order of time.

    Args:
      history: of the disturbed run.
      evicts: whether the faults take ranks away. Then only commits of a generation that is
        newer than the fault show that the world was repaired: a vote that was already
        passing may still end in a commit of the old one.
      loses_all: whether they take all ranks at once: then those that come back are waited for.
      spares: whether ranks stand by: then one in another seat may take the place of one lost.
    """
    targets = targets_of(history)
    return [
        _follow(
            history,
            injection,
            targets,
            evicts and injection.fault not in _KEEPS_ALL,
            loses_all,
            spares,
        )
        for injection in history.injections
    ]


def _follow(
    history: History,
    injection: Injection,
    targets: frozenset[int],
    evicts: bool,
    loses_all: bool,
    spares: bool,
) -> Incident:
    unknown: list[str] = []
    undone: list[str] = []
    name = f"{injection.fault} at {injection.phase}"
    victim = victim_of(history, injection)
    if evicts and victim is None:
        unknown.append(f"{name}: the drill event names no member that was training")

    detect_s = _detected(history, injection, victim)
    if evicts and detect_s is None:
        unknown.append(f"{name}: no verdict against its target and no halt after it")

    repair_s = None
    generation, survivors = _before(history, injection, targets)
    back = None if victim is None else _returned(history, injection, victim, spares=spares)
    if loses_all:
        repair_s = None if back is None else round(back[0] - injection.mono, 6)
    elif not survivors:
        unknown.append(f"{name}: no survivor was training before it")
    else:
        again = {
            member: _next_commit(history, member, injection.mono, generation if evicts else -1)
            for member in sorted(survivors)
        }
        moments = [at for at in again.values() if at is not None]
        if len(moments) == len(survivors):
            repair_s = round(max(moments) - injection.mono, 6)
        done = _finished_before(history, injection.mono)
        for member in (m for m, at in again.items() if at is None):
            if member in done:
                unknown.append(f"{name}: member {member} had committed its last step before it")
                continue
            newer = f" in a generation above {generation}" if evicts else ""
            undone.append(f"{name}: member {member} committed nothing after it{newer}")

    if evicts and victim is not None and back is None:
        who = "nobody new" if spares else f"the seat of member {victim}"
        undone.append(f"{name}: {who} committed no step after it was lost")
    return Incident(
        fault=injection.fault,
        phase=injection.phase,
        at=injection.mono,
        seat=injection.seat if victim is None else history.seat_of.get(victim, injection.seat),
        member=victim,
        detect_s=detect_s,
        repair_s=repair_s,
        back_at_step=None if back is None else back[1],
        unknown=tuple(unknown),
        undone=tuple(undone),
    )


def _detected(history: History, injection: Injection, victim: int | None) -> float | None:
    said = [a.mono for a in history.named if a.member == victim]
    seen = [at for at in (*said, *history.halts) if at >= injection.mono]
    return round(min(seen) - injection.mono, 6) if seen else None


def _before(
    history: History, injection: Injection, targets: frozenset[int]
) -> tuple[int, set[int]]:
    """The generation at the fault, and who was training then and was never a target."""
    acts = [a for a in history.acts if a.mono <= injection.mono]
    gone = {e.member for e in history.exits if e.mono <= injection.mono}
    survivors = {a.member for a in acts} - targets - gone
    return max((a.generation for a in acts), default=0), survivors


def _finished_before(history: History, moment: float) -> set[int]:
    """Who had committed the last step of the job by then: nothing more is to be expected."""
    last = max((c.step for c in history.commits), default=0)
    return {c.member for c in history.commits if c.step == last and c.mono <= moment}


def _next_commit(history: History, member: int, after: float, above: int) -> float | None:
    moments = [
        c.mono
        for c in history.commits
        if c.member == member and c.mono > after and c.generation > above
    ]
    return min(moments, default=None)


def _returned(
    history: History, injection: Injection, victim: int, *, spares: bool
) -> tuple[float, int] | None:
    """When the victim's seat, or a spare, was of use again, and from which step on.

    That is its first commit under a new member. One that was given the job's last step had none
    left to commit: it is back when it finishes with it.
    """
    seat = history.seat_of.get(victim, injection.seat)
    later = [c for c in history.commits if c.mono > injection.mono]
    if spares:
        trained = {c.member for c in history.commits if c.mono <= injection.mono}
        return next(((c.mono, c.step) for c in later if c.member not in trained), None)
    for commit in later:
        if commit.seat == seat and commit.member > victim:
            return commit.mono, commit.step
    last = max((c.step for c in history.commits), default=0)
    finals = (f.mono for f in history.finals if f.seat == seat and f.member > victim)
    return next(((at, last) for at in finals), None)
