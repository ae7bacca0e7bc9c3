"""Drills of pace: one rank loses time. Who is said to be slow?

Nobody is lost in any of them; judged is what was said: of the right rank, by the right name, with
about the right factor, and nothing of anybody else.
"""

import random
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ftkit.core.pace_plan import PaceFault, PacePlan
from ftkit.core.verdict import EVICT, Fault
from ftkit.launch.checker import Outcome, with_more

#: One of the three ways to be slow, as the seed picks.
SLOW_RANK: Final = "slow-rank"

CATALOGUE: Final[Mapping[str, str]] = {
    SLOW_RANK: "one of the next three, as the seed picks",
    PaceFault.STEADY: "one rank's work takes half as long again, or more, from a step on",
    PaceFault.RAMP: "the same, growing over 20 steps",
    PaceFault.BURSTS: "the same, in four of eight steps",
    PaceFault.DATA: "one rank waits for a batch, once: a label, and nobody is accused",
    PaceFault.GC: "one rank collects millions of objects, once: a label, and nobody is accused",
}

#: Faults here need peers to compare with: two others.
RANKS_MIN: Final = 3

_SLOW: Final = (PaceFault.STEADY, PaceFault.RAMP, PaceFault.BURSTS)
#: What the verdict on the rank has to be called.
NAMES: Final[Mapping[str, Fault]] = {
    **dict.fromkeys(_SLOW, Fault.SLOW),
    PaceFault.DATA: Fault.DATA_STALL,
    PaceFault.GC: Fault.GC_STALL,
}

#: Steps of the job before which nothing is done: what is usual has to be known.
_FROM_STEP: Final = 30
_STALL_S: Final = 1.5
#: What a slot takes at least.
DEVICE_S: Final = 0.02
_FACTORS: Final = (1.5, 2.0, 3.0)
#: How far the estimated factor may be off, where it does not change.
_FACTOR_OFF: Final = 0.25

#: Words that accuse. A starved rank, uneven work, a stall: those are reports.
ACCUSING: Final = frozenset({*EVICT, Fault.SLOW, Fault.SDC, Fault.NUMERIC})


def choose_pace(fault: str, *, seed: int, seat: int) -> PacePlan:
    """What the rank on `seat` is to do. Pure."""
    rng = random.Random(f"pace {fault} {seed}")
    kind = rng.choice(_SLOW) if fault == SLOW_RANK else fault
    return PacePlan(
        fault=PaceFault(kind),
        member=seat,  # the first member of a seat has its number
        step=_FROM_STEP + rng.randrange(10),
        factor=rng.choice(_FACTORS),
        seconds=_STALL_S,
    )


def slowed(*, seed: int, seat: int) -> PacePlan:
    """A rank that becomes slow while another is lost. Pure; its step is the caller's to set."""
    factor = random.Random(f"two {seed}").choice(_FACTORS[1:])
    return PacePlan(fault=PaceFault.STEADY, member=seat, step=0, factor=factor)


def judge_pace(outcome: Outcome, events: Iterable[Mapping[str, Any]], plan: PacePlan) -> Outcome:
    """The outcome with what was said of the pace; pure.

    * P1 the rank that lost time was called what it is;
    * P2 where its work took the same factor longer throughout, that was estimated;
    * P3 nobody else was accused, and it of nothing else;
    * P4 nobody was put out: there was no halt.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    verdicts = [e for e in ordered if e["kind"] == "verdict"]
    problems, missing = list[str](), list[str]()
    wanted = NAMES[plan.fault]
    named = next((v for v in verdicts if v["member"] == plan.member and v["fault"] == wanted), None)
    for v in verdicts:
        # That it is slow may be over for a moment, and be said again.
        again = named is not None and (v["fault"], v["member"]) == (wanted, named["member"])
        if v["fault"] in ACCUSING and not again:
            problems.append(f"seat {v['seat']} was accused: {v['reason']}")
    problems += [f"a halt: {e.get('reason', '')}" for e in ordered if e["kind"] == "halt"]
    struck = next((e for e in ordered if e["kind"] == "drill"), None)
    steps = factor = None
    if struck is not None:
        if named is None:
            problems.append(f"member {plan.member} was never called {wanted}")
        else:
            steps = _steps_between(ordered, struck, named)
            factor = named["evidence"].get("factor")
            if plan.fault is PaceFault.STEADY and (
                factor is None or abs(factor / plan.factor - 1) > _FACTOR_OFF
            ):
                problems.append(f"the factor was estimated as {factor}, it was {plan.factor}")
            if named["mono"] < struck["mono"]:
                problems.append("it was named before anything happened")
    return with_more(
        outcome,
        problems=problems,
        missing=missing,
        factor=factor,
        true_factor=plan.factor if plan.fault in _SLOW else None,
        detect_steps=steps,
        said=sorted({(v["fault"], v["seat"]) for v in verdicts}),
    )


def judge_two(
    outcome: Outcome, events: Iterable[Mapping[str, Any]], *, killed: int, slowed: int
) -> Outcome:
    """The outcome with what was said of two at once; pure.

    * T1 who was killed is named for that, and who is slow for that;
    * T2 nobody else is accused, and neither of them of anything else.
    """
    due = {(str(Fault.EXITED), killed), (str(Fault.SLOW), slowed)}
    said = {
        (str(e["fault"]), int(e["seat"]))
        for e in events
        if e["kind"] == "verdict" and e["fault"] in ACCUSING
    }
    problems = [f"seat {seat} was never called {fault}" for fault, seat in sorted(due - said)]
    problems += [f"seat {seat} was called {fault}" for fault, seat in sorted(said - due)]
    return with_more(outcome, problems=problems, missing=[], said=sorted(said))


def _steps_between(
    events: list[Mapping[str, Any]], begin: Mapping[str, Any], end: Mapping[str, Any]
) -> int:
    """Steps that the job committed between two events."""
    steps = {
        e["step"]
        for e in events
        if e["kind"] == "commit" and begin["mono"] <= e["mono"] <= end["mono"]
    }
    return len(steps)
