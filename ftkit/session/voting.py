"""Voting: whether a step counts. The ranks vote, and whoever saw no result asks what became of it.

A vote that a fault cuts in half may have passed elsewhere: then the step counts here too, once the
coordinator has said so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ftkit.core.errors import GenerationAborted, NotDeterministic, StepRolledBack, UsageError
from ftkit.core.fault_plan import Point
from ftkit.core.ids import Generation, Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.core.world import World
from ftkit.detection.row import Phase
from ftkit.recovery.data_cursor import derive
from ftkit.recovery.vote import Ballot, Refusal, Tally, tally
from ftkit.session.loop import Loop
from ftkit.session.membership import Fate

#: Votes that do not pass, one after another, after which the step is given up.
VOTES_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What of an attempt a rank votes for."""

    number: StepNumber
    generation: Generation
    digest: int
    """Of the reduced gradients."""
    state_digest: int
    """Of the state that they are applied to; 0 where replicas are not compared in this step."""
    held: Sequence[Slot]
    """Slots of this rank's sum."""
    losses: Mapping[Slot, float]


class Counted(NamedTuple):
    """A step that counts."""

    result: Tally | None
    """Of the vote; None where it was cut in half: its ballots, which carry the losses, are lost. It
    may be there although this rank learnt only from the coordinator that the step counts."""
    newcomers: World | None
    """The world to switch to before the next step."""


def vote(loop: Loop, attempt: Attempt) -> Counted:
    """Agree that the step counts. Returns when it does; blocks through a repair.

    Raises:
      StepRolledBack: it does not.
      UsageError, NotDeterministic: it never will, and the script has to change.
      IntegrityError: this rank's replica differs from the others', and it is to leave.
      JobStopped: the job is over for this rank.
    """
    parts, number, generation = loop.parts, attempt.number, attempt.generation
    parts.recorder.phase(Phase.VOTE)
    prepared = parts.membership.prepared
    loop.shard_watch.look(number)
    ballot = _ballot(loop, attempt, prepared)
    data = derive(*(loop.read[number, slot] for slot in attempt.held))
    parts.trace.event(
        "vote", step=number, generation=generation, slots=attempt.held, data=f"{data:x}"
    )
    parts.membership.vote_cast()
    result: Tally | None = None
    ballots: list[Ballot] = []
    try:
        cast = parts.group.exchange(ballot.pack())
        parts.injector.at(Point.VOTE, number)
        ballots = [Ballot.unpack(b) for b in cast.wait()]
        result = tally(ballots)
        loop.snapshots.agree(b.layout for b in ballots)
        if loop.layers is not None:
            loop.layers.hear(b.costs for b in ballots)
        else:
            loop.shares.hear([b.costs for b in ballots], number)
    except GenerationAborted:
        pass  # cut in half: what became of it is decided below, with the others
    if result is not None:
        if not result.passed:
            _refused(loop, attempt, result)
        loop.numbers.counted(result)
    newcomers: World | None = None
    if result is not None and parts.membership.vote_passed(generation):
        if prepared and result.switch == prepared.generation:
            newcomers = prepared
        if loop.recutter is not None:
            growing = result.switch is not None
            loop.recutter.counted(number, ballots, until=loop.until, growing=growing)
    elif parts.membership.fate() is Fate.BACK:
        raise StepRolledBack(f"step {number} was cut short and is played again")
    else:
        parts.trace.event("forward", step=number, generation=generation)
    loop.refusals = 0
    return Counted(result, newcomers)


def _ballot(loop: Loop, attempt: Attempt, prepared: World | None) -> Ballot:
    return Ballot(
        generation=attempt.generation,
        step=attempt.number,
        digest=attempt.digest,
        data_digest=loop.feed.digest(attempt.number),
        shape=loop.snapshots.shape,
        layout=loop.snapshots.layout,
        prepared=prepared.generation if prepared else Generation(0),
        state=attempt.state_digest,
        norm=loop.numbers.norm,
        bad_bucket=loop.numbers.bad_bucket,
        again=loop.numbers.final,
        move=loop.recutter.move if loop.recutter else 0,
        stand=loop.recutter.stand(attempt.number) if loop.recutter else 0,
        losses=attempt.losses,
        costs=loop.layers.seconds if loop.layers else loop.shares.costs,
    )


def _refused(loop: Loop, attempt: Attempt, result: Tally) -> None:
    """A vote that did not pass is the job's fault; too many in a row are the script's."""
    loop.parts.membership.vote_failed()
    loop.parts.trace.event("refused", step=attempt.number, reason=result.reason)
    if result.refusal is Refusal.STATE:
        raise UsageError(
            f"{result.reason}. Protect the same model and optimizers on all ranks; a sharded "
            "model is protected by what builds it: session.protect(build=build)"
        )
    if result.refusal is Refusal.DATA:
        raise NotDeterministic(
            f"{result.reason}. Every rank must read the same batches in the same order: "
            "give the loader no rank-dependent sampler and no unseeded shuffling, or pass "
            "the data set itself"
        )
    loop.refusals += 1
    if loop.refusals >= VOTES_MAX:
        raise UsageError(f"{result.reason}, {loop.refusals} times in a row")
    if result.refusal is Refusal.REPLICAS:
        loop.replicas.settle(result, attempt.number)
    elif result.refusal is Refusal.NUMBERS:
        loop.numbers.doubted(result, attempt.number, attempt.generation)
    elif result.refusal is Refusal.GRADIENTS:
        loop.numbers.differ(result)
    raise StepRolledBack(result.reason)
