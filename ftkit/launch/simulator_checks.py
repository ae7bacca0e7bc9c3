"""What must hold at every moment of a simulated job, whatever breaks.

Training state is a hash chain, so a step lost, doubled or taken from another branch shows.
Two chains are kept: `state` hashes the steps alone and must equal the undisturbed run;
`lineage` hashes also the generation of the attempt that was committed, as if gradients were
not reproducible, and must be equal wherever ranks train together.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ftkit.core.ids import Generation, MemberId, Step
from ftkit.core.world import World
from ftkit.recovery.facts import JobFacts, Stage
from ftkit.recovery.plan import Mode, Plan
from ftkit.recovery.protocol import FIRST_SNAPSHOT_BY, SHARDS_BACK, gone

if TYPE_CHECKING:
    from ftkit.launch.simulator_rank import SimRank


#: How the protocol says that a job of shards cannot go on.
SHARDS_GONE = "shards of every step in memory are lost"
#: Steps that are committed, at most, before a coordinator hears of them.
UNTOLD = 4


class SimulationFailure(AssertionError):
    """An invariant broke, or the job did not recover; says how to replay it."""


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The model of a rank, as two hash chains over the committed steps."""

    step: Step = Step(0)
    state: int = 1
    lineage: int = 1
    attempt: Generation = Generation(0)
    """The generation whose attempt committed `step`."""

    def after(self, attempt: Generation) -> "TrainingState":
        """The state once one more step, reduced in generation `attempt`, is committed."""
        return _after(self, attempt)


@lru_cache(maxsize=64)
def _after(before: TrainingState, attempt: Generation) -> TrainingState:
    step = Step(before.step + 1)
    return TrainingState(
        step=step,
        state=chain(before.state, step),
        lineage=chain(before.lineage, step, attempt),
        attempt=attempt,
    )


def chain(*values: int) -> int:
    """A small hash of some numbers."""
    return zlib.crc32(b",".join(b"%d" % v for v in values))


def slots_of(rank: int, size: int, slots: int) -> range:
    """The contiguous slots that `rank` of `size` computes."""
    return range(rank * slots // size, (rank + 1) * slots // size)


class Checker:
    """Watches one simulation. Owns nothing but what it has seen."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._reference = [1]
        self._worlds: dict[Generation, frozenset[MemberId]] = {}
        self._commits: dict[tuple[Step, Generation], int] = {}
        self._attempt_lineage: dict[tuple[Step, Generation], int] = {}
        self._newest = Step(0)

    @property
    def worlds(self) -> int:
        """How many worlds were issued."""
        return len(self._worlds)

    def revised(
        self, before: Plan, after: Plan, facts: JobFacts, ranks: dict[MemberId, "SimRank"]
    ) -> None:
        """The coordinator went from one plan to the next (I1, I2, I4, I5, I6)."""
        self._require(
            after.next_generation >= before.next_generation and after.halted >= before.halted,
            f"I1: generations fell between {before} and {after}",
        )
        self._require(
            before.mode is not Mode.ENDED, f"I5: plan {after.order} follows one that ended"
        )
        for world in (after.world, after.joining):
            if world is None or self._worlds.get(world.generation) == world.member_ids:
                continue
            self._require(
                world.generation not in self._worlds,
                f"I1: generation {world.generation} was issued twice",
            )
            self._worlds[world.generation] = world.member_ids
            lost = [m for m in world.member_ids if gone(before, facts, m)]
            self._require(not lost, f"I4: members {lost} are gone and in {world.generation}")
            if after.resumed == world.generation:
                self._stand_still(world, after, facts, ranks)

    def shards_kept(
        self,
        before: Plan,
        after: Plan,
        whole: Mapping[Step, Generation],
        writing: Sequence[MemberId],
        *,
        intact: bool,
    ) -> None:
        """What became of shards as the coordinator went from one plan to the next (I8).

        Args:
          before: the plan it went from.
          after: the plan it went to.
          whole: the steps that the nodes it reaches hold whole, with the generation of each.
          writing: members of the last world that may still change their shards.
          intact: whether neither a node with shards nor all who know the job's step were lost.
        """
        if after.stop is not None and SHARDS_GONE in after.stop.reason:
            self._require(not whole, f"I8: the job ends, though steps {sorted(whole)} are whole")
        formed = before.mode is not Mode.RUNNING and after.resumed > before.resumed
        if not formed:
            return
        self._require(
            not writing, f"I8: a world begins while members {writing} still change their shards"
        )
        self._require(
            after.step in whole or not (after.step or whole),
            f"I8: a world begins with step {after.step}, and steps {sorted(whole)} are whole",
        )
        # Those who are through with training may seal their last step at this moment.
        newest = max(((g, s) for s, g in whole.items()), default=(Generation(0), Step(0)))[1]
        self._require(
            after.step >= newest - 1,
            f"I8: a world begins with step {after.step}, though step {newest} is whole",
        )
        self._require(
            not intact or after.step >= self._newest - SHARDS_BACK,
            f"I8: with no shard lost, the job goes back from step {self._newest} to {after.step}",
        )
        self._require(
            after.step > 0 or self._newest <= FIRST_SNAPSHOT_BY + UNTOLD,
            f"I8: the job begins anew without a word, and {self._newest} steps are lost",
        )

    def begins_anew(self) -> None:
        """Every copy of the plan is lost: nobody can know any more how far the job had come."""
        self._newest = Step(0)

    def stays_ended(self, plan: Plan) -> None:
        """What became of a plan that had ended (I5)."""
        self._require(plan.mode is Mode.ENDED, f"I5: plan {plan.order} follows one that ended")

    def _stand_still(
        self, world: World, plan: Plan, facts: JobFacts, ranks: dict[MemberId, "SimRank"]
    ) -> None:
        for member in world.member_ids:
            rank, said = ranks[member], facts.members[member]
            if not rank.alive:
                continue
            self._require(
                rank.stage is not Stage.ACTIVE,
                f"I2: member {member} is active in generation {rank.generation} while "
                f"{world.generation} is formed",
            )
            self._require(
                (rank.step, rank.voted) == (said.step, said.voted) or rank.stage is Stage.READY,
                f"I6: member {member} stands at {(rank.step, rank.voted)}, the coordinator "
                f"relied on {(said.step, said.voted)}",
            )
            self._require(
                said.generation >= plan.halted,
                f"I6: member {member} had not acknowledged the end of {plan.halted}",
            )

    def entered(self, rank: "SimRank", world: World) -> None:
        """A rank entered a world (I1, I2)."""
        issued = self._worlds.get(world.generation)
        self._require(
            issued is world.member_ids or issued == world.member_ids,
            f"member {rank.member} entered generation {world.generation}, not as issued",
        )
        self._require(
            rank.generation < world.generation,
            f"I1: member {rank.member} goes from generation {rank.generation} "
            f"to {world.generation}",
        )

    def resumes(self, rank: "SimRank", step: Step) -> None:
        """A rank is told to enter at `step` (I3): it is there, or rolls forward to it."""
        if rank.broken_setup:
            self._require(False, f"member {rank.member} was let in with its set-up torn")
        if rank.step is None:
            return
        reachable = {rank.step, Step(rank.step + 1)} if rank.voted else {rank.step}
        self._require(
            step in reachable,
            f"I3: member {rank.member} stands at step {rank.step} "
            f"(voted: {rank.voted}) and shall enter at {step}",
        )

    def reduced(self, rank: "SimRank", shares: Sequence[range]) -> None:
        """A reduction took in `shares`, one from each rank: every slot exactly once."""
        slots = sorted(slot for share in shares for slot in share)
        self._require(
            slots == list(range(self._slots)),
            f"member {rank.member} reduced slots {slots} at step {rank.step}",
        )

    def attempted(self, rank: "SimRank", state: TrainingState) -> None:
        """A rank begins the next step from `state`: as its whole world does."""
        key = (Step(state.step + 1), rank.generation)
        first = self._attempt_lineage.setdefault(key, state.lineage)
        self._require(
            first == state.lineage,
            f"member {rank.member} plays {key} from another state than its world",
        )

    def committed(self, rank: "SimRank", before: TrainingState, after: TrainingState) -> None:
        """A rank committed a step."""
        self._require(
            after.step == before.step + 1 and rank.step == after.step,
            f"member {rank.member} went from step {before.step} to {after.step}",
        )
        self._require(
            after.state == self.reference(after.step),
            f"member {rank.member}: the state at step {after.step} is not the reference's",
        )
        self._newest = max(self._newest, after.step)
        first = self._commits.setdefault((after.step, after.attempt), after.lineage)
        self._require(
            first == after.lineage,
            f"member {rank.member} committed step {after.step} of generation {after.attempt} "
            "with another history than the others",
        )

    def restored(self, rank: "SimRank", state: TrainingState) -> None:
        """A rank loaded a snapshot."""
        self._require(
            state.state == self.reference(state.step),
            f"member {rank.member} restored a state that is not step {state.step}",
        )

    def reference(self, step: Step) -> int:
        """The state of the undisturbed run at `step`."""
        while len(self._reference) <= step:
            self._reference.append(chain(self._reference[-1], len(self._reference)))
        return self._reference[step]

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise SimulationFailure(what)
