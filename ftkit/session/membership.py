"""Membership: where this rank stands in the job, shared by its threads under one lock.

The control thread brings plans, the communication thread brings faults, the training thread
asks what to do next. Whatever must be decided once is decided here, under the lock: above
all whether a vote passed *before* or *after* this rank said where it stands.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto

from ftkit.core.errors import JobStopped, ProtocolError
from ftkit.core.ids import Generation, MemberId, Step
from ftkit.core.trace import Trace
from ftkit.core.world import World
from ftkit.recovery.approximation import Approximation
from ftkit.recovery.facts import Allowed, Stage
from ftkit.recovery.member import Duty, Standing, react
from ftkit.recovery.plan import Mode, Plan

#: So often a newcomer that is connected to a world looks whether it was let go of.
LINKS_EVERY_S = 0.2


class Fate(StrEnum):
    """What became of a step whose vote was cut in half."""

    FORWARD = auto()
    """Some rank saw it pass: commit it with the gradients held."""
    BACK = auto()
    """No survivor saw it pass: play it again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A world to enter now, and the step to enter it at."""

    world: World
    step: Step
    admitted: bool
    """By a vote of its members (a newcomer), rather than from standing still."""
    approximation: Approximation | None = None
    """Where parts of the state of `step` come from that nobody has."""


@dataclass(frozen=True, slots=True)
class Link:
    """A world whose members to connect to, as a newcomer."""

    world: World


class GiveUp(Enum):
    """The only value: let go of the state, its shards are to be cut anew."""

    NOW = auto()


class Membership:
    """One rank's standing.

    Every method may be called from any thread. None does I/O except through the callbacks: `abort`
    must not block, and `report` for no longer than a send may (`wire.SEND_S`).
    """

    def __init__(
        self,
        member: MemberId,
        *,
        report: Callable[[dict[str, object]], None],
        abort: Callable[[Generation, str], None],
        unlinked: Callable[[], frozenset[MemberId]],
        parted: Callable[[World], frozenset[MemberId]],
        trace: Trace,
    ) -> None:
        """Start as STARTING, in no world.

        Args:
          member: this process.
          report: sends this rank's standing to its agent.
          abort: ends every collective up to a generation.
          unlinked: the members of the present world that this rank has no link to.
          parted: the members of a world that have said goodbye to this rank.
          trace: where halts are recorded.
        """
        self._changed = threading.Condition()
        self._me = Standing(member=member)
        self._plan = Plan()
        self._step: Step | None = None
        self._voted = False
        self._cut: frozenset[MemberId] = frozenset()
        self._stepping = False
        self._sharded = False
        self._allowed = Allowed.NOTHING
        self._admission: Entry | None = None
        self._prepared: World | None = None
        self._linked: World | None = None
        """The world that this newcomer has connected to last."""
        self._stopped = ""
        self._report_to = report
        self._abort = abort
        self._unlinked = unlinked
        self._parted = parted
        self._trace = trace

    # What other threads bring.

    def take_plan(self, plan: Plan) -> None:
        """Act on a plan from the coordinator, unless a newer one is known."""
        with self._changed:
            if plan.order <= self._plan.order:
                return
            self._plan = plan
            self._heed()
            self._changed.notify_all()

    def take_fault(self, generation: Generation, lost: frozenset[MemberId], reason: str) -> None:
        """A collective of `generation` broke, as this rank's data plane saw it."""
        with self._changed:
            if self._me.stage is Stage.ACTIVE and generation == self._me.generation:
                self._halt(generation, reason, lost)
                self._changed.notify_all()

    def take_admission(self, payload: bytes) -> None:
        """A member of the world tells this newcomer that it is in.

        Raises:
          ProtocolError: the payload is not what `admission` makes.
        """
        try:
            message = json.loads(payload)
            entry = Entry(World.from_json(message["world"]), Step(int(message["step"])), True)
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"not an admission: {payload[:80]!r}") from error
        with self._changed:
            known = self._admission.world.generation if self._admission else 0
            if entry.world.generation > max(known, self._me.generation):
                self._admission = entry
                self._changed.notify_all()

    # What the training thread asks and says.

    @property
    def step(self) -> Step | None:
        """Steps committed; None while this rank holds no state."""
        return self._step

    @property
    def generation(self) -> Generation:
        """The newest generation entered, or known to be over."""
        return self._me.generation

    @property
    def active(self) -> bool:
        """Whether this rank works in a generation that goes on."""
        return self._me.stage is Stage.ACTIVE

    @property
    def prepared(self) -> World | None:
        """The newcomers' world this rank can switch to, if any is on offer."""
        with self._changed:
            offered = self._prepared
            return offered if offered and offered.generation > self._me.generation else None

    def introduce(self) -> Plan:
        """Say hello, and wait for the first plan. Blocks."""
        with self._changed:
            self._say()
            while not self._plan.version and not self._plan.term and not self._stopped:
                self._changed.wait()
            self._raise_if_stopped()
            return self._plan

    def ready(
        self, *, stepping: bool, sharded: bool = False, allowed: Allowed = Allowed.NOTHING
    ) -> None:
        """Be counted when a world is formed; `stepping` once the step loop has begun.

        `sharded`: no rank's state is of use without the others'. Then this rank gives its own up
        when its world ends, and the next one begins from snapshots. `allowed`: of approximations,
        where these have lost some.
        """
        with self._changed:
            self._stepping, self._sharded, self._allowed = stepping, sharded, allowed
            if self._me.stage is Stage.STARTING:
                self._me = replace(self._me, stage=Stage.READY)
                self._heed()
            self._say()

    def next_task(self, waits: Callable[[], None] = lambda: None) -> Entry | Link | GiveUp | None:
        """What to do before the next step; None when the world goes on. Blocks.

        `waits` is called once, with this rank's standing locked, when there is nothing to do yet; it
        must not block.

        Raises:
          JobStopped: the job is over for this rank.
        """
        said = False
        with self._changed:
            while True:
                self._raise_if_stopped()
                if self._sharded and self._me.stage is Stage.HALTED:
                    return GiveUp.NOW
                admission, self._admission = self._admission, None
                if admission and admission.world.generation > self._me.generation:
                    return admission
                duty, world = react(self._me, self._plan)
                if duty is Duty.RESUME and world is not None:
                    return Entry(world, self._plan.step, False, self._plan.approximation)
                if duty is Duty.LINK and world is not None:
                    # Before its step loop a newcomer would keep the others waiting: it sets
                    # up alone.
                    return Link(world) if self._stepping else None
                if self._me.stage is Stage.ACTIVE:
                    return None
                if not said:
                    waits()
                    said = True
                if self._me.stage is not Stage.LINKED:
                    self._changed.wait()
                elif not self._put_out():
                    self._changed.wait(LINKS_EVERY_S)

    def gave_up(self) -> None:
        """Nothing changes this rank's snapshots any more: the next world may be formed from them."""
        with self._changed:
            if self._me.stage is Stage.HALTED:
                self._step, self._voted = None, False
                self._me = replace(self._me, stage=Stage.READY)
                self._heed()
                self._say()

    def forsake(self, generation: Generation, reason: str) -> None:
        """This rank's state is of no use any more: a part of it went with others. It ends `generation`.

        Once all are so, the next world begins from snapshots.
        """
        with self._changed:
            self._step, self._voted = None, False
            if self._me.stage is Stage.ACTIVE and self._me.generation == generation:
                self._halt(generation, reason, frozenset())
            elif self._me.stage is Stage.HALTED:
                self._me = replace(self._me, stage=Stage.READY)
                self._heed()
                self._say()
            self._changed.notify_all()

    def linked(self, world: World) -> None:
        """This newcomer is connected to every member of `world`."""
        with self._changed:
            if self._me.stage is not Stage.ACTIVE:
                # Whatever state we held belongs to a world that went on without us.
                self._step, self._voted = None, False
                self._linked = world
                self._me = replace(self._me, stage=Stage.LINKED, linked=world.generation)
                self._say()

    def entered(self, world: World, step: Step | None) -> None:
        """This rank is in `world` now, holding the state of `step` (None: not yet)."""
        with self._changed:
            self._me = replace(
                self._me,
                stage=Stage.ACTIVE,
                generation=world.generation,
                linked=Generation(0),
                prepared=Generation(0),
            )
            self._step, self._voted, self._cut = step, False, frozenset()
            self._heed()
            self._say()

    def refused(self, world: World, reason: str, *, cut: frozenset[MemberId]) -> None:
        """This rank could not enter `world`: its links to `cut` could not be made."""
        with self._changed:
            self._cut = cut
            self._halt(world.generation, reason, cut)

    def restored(self, generation: Generation, step: Step) -> bool:
        """The state of `step` is loaded; False when `generation` ended meanwhile."""
        with self._changed:
            if self._me.stage is not Stage.ACTIVE or self._me.generation != generation:
                return False
            self._step = step
            self._say()
            return True

    def vote_cast(self) -> None:
        """This rank has reduced the next step and is about to vote for it."""
        with self._changed:
            self._voted = True

    def vote_failed(self) -> None:
        """The vote was counted and did not pass."""
        with self._changed:
            self._voted = False

    def vote_passed(self, generation: Generation) -> bool:
        """Commit the step voted on; False when this rank has already said it stands still.

        This is the moment of commitment: what is reported before does not know of it, what
        is reported after does.
        """
        with self._changed:
            if self._me.stage is not Stage.ACTIVE or self._me.generation != generation:
                return False
            assert self._step is not None, "a rank without state does not vote"
            self._step, self._voted = Step(self._step + 1), False
            return True

    def fate(self) -> Fate:
        """What became of the step this rank voted for and saw no result of. Blocks.

        Raises:
          JobStopped: the job is over for this rank.
        """
        with self._changed:
            while True:
                self._raise_if_stopped()
                if self._sharded and self._me.stage is not Stage.ACTIVE:
                    return Fate.BACK
                duty, _ = react(self._me, self._plan)
                if duty is Duty.RESUME and self._step is not None:
                    if self._voted and self._plan.step == self._step + 1:
                        self._step, self._voted = self._plan.step, False
                        self._say()
                        return Fate.FORWARD
                    return Fate.BACK
                if duty is Duty.LINK:
                    return Fate.BACK
                self._changed.wait()

    def gone_on(self, generation: Generation) -> bool:
        """Wait until the others are in `generation`, which is a world without this rank. Blocks.

        Returns False when they are not: the world they leave has ended otherwise.

        Raises:
          JobStopped: the job is over for this rank.
        """
        with self._changed:
            mine = self._me.generation
            while True:
                self._raise_if_stopped()
                world = self._plan.world
                if (
                    self._plan.mode is Mode.RUNNING
                    and world is not None
                    and world.generation >= generation
                    and world.rank_of(self._me.member) is None
                ):
                    return True
                if self._me.stage is not Stage.ACTIVE and self._plan.halted >= mine:
                    return False
                self._changed.wait()

    def done(self) -> None:
        """The step loop has ended."""
        with self._changed:
            self._me = replace(self._me, stage=Stage.DONE)
            self._say()

    def wait_changed(self, timeout_s: float) -> None:
        """Wait until anything changes here, or `timeout_s` have passed."""
        with self._changed:
            self._changed.wait(timeout_s)

    # Under the lock.

    def _put_out(self) -> bool:
        """Whether members of the world it is linked to let go of this newcomer: it connects anew.

        Those of a world it was in do so as they enter the next, which may be after it has counted
        its links to them.
        """
        if self._linked is None or not self._parted(self._linked):
            return False
        self._me = replace(self._me, stage=Stage.READY, linked=Generation(0))
        self._say()
        return True

    def _heed(self) -> None:
        """Do at once what the plan asks and needs no training thread."""
        while True:
            duty, world = react(self._me, self._plan)
            if duty is Duty.HALT:
                self._halt(self._plan.halted, "the coordinator ended it", frozenset())
            elif duty is Duty.PREPARE and world is not None:
                self._prepared = world
                self._me = replace(self._me, prepared=world.generation)
            elif duty is Duty.LEAVE:
                stop = self._plan.stop
                evicted = self._plan.evicted.get(self._me.member)
                self._stopped = (
                    stop.reason if stop else evicted or "another process has this seat now"
                )
                self._abort(self._plan.halted, self._stopped)
                return
            else:
                return

    def _halt(self, generation: Generation, reason: str, lost: frozenset[MemberId]) -> None:
        self._abort(generation, reason)
        if self._me.stage is Stage.ACTIVE:
            has_state = self._step is not None
            # Those lost as others tell it are theirs to name: a broken link has two ends.
            self._cut = self._unlinked()
            self._me = replace(self._me, stage=Stage.HALTED if has_state else Stage.READY)
            self._trace.event(
                "report",
                generation=generation,
                step=self._step,
                voted=self._voted,
                lost=sorted(lost),
                reason=reason,
            )
        self._me = replace(self._me, generation=max(generation, self._me.generation))
        self._say()

    def _say(self) -> None:
        self._report_to(
            {
                "type": "standing",
                "stage": self._me.stage.value,
                "generation": self._me.generation,
                "linked": self._me.linked,
                "step": self._step,
                "voted": self._voted,
                "cut": sorted(self._cut),
                "stepping": self._stepping,
                "sharded": self._sharded,
                "allowed": self._allowed.value,
            }
        )

    def _raise_if_stopped(self) -> None:
        if self._stopped:
            raise JobStopped(self._stopped)


def admission(world: World, step: Step) -> bytes:
    """What members tell a newcomer: the world it is in, and the step they stand at."""
    return json.dumps({"world": world.to_json(), "step": step}).encode()
