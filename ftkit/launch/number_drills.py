"""Drills of numbers: bits that flip, NaN in a gradient, a loss that leaps.

The ranks falsify their own numbers (`session.corrupt`). A flip or a NaN that comes once must
leave no trace in the result; whose it was, and in which tensor, must be said, and of nobody else.
"""

import random
from collections.abc import Iterable, Mapping
from typing import Any

from ftkit.core.corruption_plan import PlannedCorruption, Target
from ftkit.core.errors import UsageError
from ftkit.core.verdict import Fault
from ftkit.launch.checker import Outcome, with_more

BIT_FLIP, NAN, LOSS_SPIKE = "bit-flip", "nan", "loss-spike"

CATALOGUE: dict[str, str] = {
    BIT_FLIP: "a bit flips in one rank's weight, optimizer or gradient, or in a checkpoint (--at)",
    NAN: "a NaN in one rank's gradient: once, or whenever the same data is played (--at)",
    LOSS_SPIKE: "one rank's loss is twentyfold for three steps",
}

#: Where each may strike.
PLACES: dict[str, tuple[str, ...]] = {
    BIT_FLIP: ("weight", "optimizer", "gradient"),
    NAN: ("once", "data"),
    LOSS_SPIKE: ("loss",),
}

#: A majority needs three.
RANKS_MIN = {BIT_FLIP: 3, NAN: 2, LOSS_SPIKE: 2}

#: The highest bit of a float's exponent: a gradient below 2 becomes 2**128 times as large.
EXPONENT_BIT = 30

#: Steps until a loss is usual enough to leap.
STEPS_USUAL = 40


def choose(fault: str, at: str | None, *, seed: int, nproc: int, steps: int) -> "PlannedCorruption":
    """The corruption that `seed` makes of what was asked; pure.

    Args:
      fault: one of the catalogue.
      at: where, one of `PLACES`; None lets the seed pick.
      seed: decides the rest.
      nproc: ranks of the job.
      steps: of the job.

    Raises:
      UsageError: there is no such place, or the job is too small.
    """
    rng = random.Random(f"{fault} {at} {seed}")
    if at is not None and at not in PLACES[fault]:
        raise UsageError(f"{fault} strikes at {' or '.join(PLACES[fault])}, not at {at!r}")
    if nproc < RANKS_MIN[fault]:
        raise UsageError(f"{fault} needs --nproc {RANKS_MIN[fault]} or more, got {nproc}")
    where = at or rng.choice(PLACES[fault])
    seat = rng.randrange(nproc)
    target = {NAN: Target.GRADIENT, LOSS_SPIKE: Target.LOSS}.get(fault) or Target(where)
    first, last = (STEPS_USUAL, steps - 10) if fault == LOSS_SPIKE else (3, max(3, steps // 5))
    if last < first:
        raise UsageError(f"{fault} needs --steps {STEPS_USUAL + 10} or more, got {steps}")
    bit = None if fault == NAN else rng.randrange(32)
    return PlannedCorruption(
        target=target,
        seat=seat,
        member=seat,
        step=rng.randint(first, last),
        place=rng.random(),
        bucket=rng.randrange(3),
        bit=EXPONENT_BIT if target is Target.GRADIENT and fault == BIT_FLIP else bit,
        factor=20.0,
        attempts=2 if where == "data" else 1,
        steps=3 if fault == LOSS_SPIKE else 1,
    )


def place_of(corruption: PlannedCorruption) -> str:
    """What `--at` was, or might have been."""
    if corruption.name == NAN:
        return "data" if corruption.attempts > 1 else "once"
    return corruption.target.value


def alters(corruption: PlannedCorruption) -> bool:
    """Whether the result is another one than undisturbed: wrong data stays wrong."""
    return corruption.name == LOSS_SPIKE or corruption.attempts > 1


def workload(corruption: PlannedCorruption) -> tuple[str, ...]:
    """Further arguments of the bundled job: it looks at its replicas in every step."""
    skip = ("--on-nan", "skip") if corruption.name == NAN else ()
    return ("--verify-every", "1", *skip)


def judge(
    outcome: Outcome, events: Iterable[Mapping[str, Any]], corruption: PlannedCorruption
) -> Outcome:
    """The outcome with what must be said of wrong numbers; pure.

    * N1 the member they are of is named, with the class that the fault is of;
    * N2 nobody else is accused of wrong numbers, and it of nothing else;
    * N3 the tensor, the bucket or the slot is the right one.
    """
    ordered = sorted(events, key=lambda e: float(e["mono"]))
    struck = [e for e in ordered if e["kind"] == "drill"]
    said = [
        e for e in ordered if e["kind"] == "verdict" and e["fault"] in (Fault.SDC, Fault.NUMERIC)
    ]
    due = Fault.NUMERIC if alters(corruption) else Fault.SDC
    problems, missing = list[str](), list[str]()
    right = [e for e in said if (e["fault"], e["seat"]) == (due, corruption.seat)]
    if struck and not right:
        problems.append(f"no verdict says {due} of seat {corruption.seat}")
    problems += [
        f"seat {e['seat']} is said to be {e['fault']}: {e['reason']}"
        for e in said
        if (e["fault"], e["seat"]) != (due, corruption.seat)
    ]
    within = None
    if struck and right:
        evidence = right[0]["evidence"]
        # What is compared in the vote on a step is the state after the step before.
        before = evidence.get("kind") == "replica"
        within = int(evidence["step"]) + before - int(struck[0]["step"])
        wrong = _wrong_place(struck[0], evidence, corruption)
        problems += [wrong] if wrong else []
    return with_more(outcome, problems=problems, missing=missing, within_steps=within)


def _wrong_place(
    struck: Mapping[str, Any], evidence: Mapping[str, Any], corruption: PlannedCorruption
) -> str:
    match corruption.target:
        case Target.WEIGHT | Target.OPTIMIZER:
            due, told = struck["tensor"], evidence.get("tensors")
            return "" if told == [due] else f"{due} was falsified, and {told} are named"
        case Target.GRADIENT if corruption.attempts > 1:
            due, told = struck["slot"], evidence.get("slots")
            if told != [due]:
                return f"slot {due} was falsified, and {told} are named"
            due, told = struck["bucket"], evidence.get("bucket")
            return "" if told == due else f"bucket {due} was falsified, and {told} is named"
        case Target.GRADIENT:
            return "" if evidence.get("kind") == "gradient" else "it is not said of a gradient"
        case Target.LOSS:
            return "" if evidence.get("kind") == "loss-spike" else "it is not said of the loss"
