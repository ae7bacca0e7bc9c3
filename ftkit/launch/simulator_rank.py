"""SimRank: a rank process of the simulator, with the real `react` and `tally` inside.

It plays the part of a session: trains, votes, halts by itself when a link breaks, and does
what the plan asks. Everything it does later it schedules on the simulation's clock; what a
halt interrupts carries `epoch` and comes to nothing. What its training thread does (`_work`)
ends where that hangs; its control thread hears plans and breaks, halts, leaves and tells.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.world import World
from ftkit.detection.row import Phase
from ftkit.launch.simulator_capture import Capture
from ftkit.launch.simulator_checks import TrainingState, slots_of
from ftkit.launch.simulator_glance import Glance
from ftkit.launch.simulator_network import Circle, Exchange
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.member import Duty, Standing, react
from ftkit.recovery.plan import Mode, Plan
from ftkit.recovery.vote import Ballot, Tally, tally

if TYPE_CHECKING:
    from ftkit.launch.simulator import Simulation


#: What a rank is doing in a step, as its row says it; anything else is user code.
_PHASES = {"reduce": Phase.REDUCE, "vote": Phase.VOTE}

#: Ballots are cast one after another, so that a fault can come between; in a large world faster.
BALLOT_S, BALLOTS_S = 0.0002, 0.02


class SimRank:
    """One incarnation of a seat."""

    def __init__(self, sim: "Simulation", member: MemberId, seat: Seat, node: NodeId) -> None:
        self.sim = sim
        self.member, self.seat, self.node = member, seat, node
        self.alive = True
        self.stopped_since: float | None = None
        self.hangs = False
        """Its training thread does nothing any more."""
        self.backlog: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.plan: Plan | None = None
        self.stage = Stage.STARTING
        self.generation = Generation(0)
        self.linked = Generation(0)
        self.prepared = Generation(0)
        self.voted = False
        self.cut: frozenset[MemberId] = frozenset()
        self.stepping = False
        self.at_step = Step(0)
        """The step it plays, or played last, whatever it has given up since."""
        self.broken_setup = False
        self.refuses = False
        self.world: World | None = None
        # By generation: a vote may switch to an offer that was replaced since it was cast.
        self._offers: dict[Generation, World] = {}
        #: Whom it is linked to, and what the network has still on its way here.
        self.circle: Circle | None = None
        self.notice_s = self.inbox_s = self.reset_s = -1.0
        self._linked_world: World | None = None
        self._state: TrainingState | None = None
        self._held = Generation(0)
        self._greeted = self._begun = self._busy = self._leaving = False
        self._epoch = 0
        self._sequence = 0
        self._doing = ""
        self._aborted: set[Generation] = set()
        self._capture = Capture(self)
        self._loaded: TrainingState | None = None
        """Its new shard, while others have still to load theirs."""
        self._casting: tuple[Ballot, float, float] | None = None
        """Its ballot, when it began to cast it, and how long that takes."""
        self._warm = False
        self._shown = self._place()
        self._moved_s = sim.now
        self._later(sim.rng.uniform(0.01, 0.4), self._hello)

    @property
    def step(self) -> Step | None:
        """Steps committed; None without state."""
        return self._state.step if self._state else None

    @property
    def gives_up(self) -> bool:
        """Whether what it holds is of no use without the shards of others, now that it halted."""
        return self.sim.sharded and self.stepping and self.stage is Stage.HALTED

    @property
    def writes_shards(self) -> bool:
        """Whether what its arena holds may still change."""
        return self.alive and self.stepping and self.stage in (Stage.ACTIVE, Stage.HALTED)

    def _place(self) -> tuple[Phase, Step, Generation]:
        """Where the training thread stands, as it would put it into its row."""
        played = Step(0 if self.step is None else self.step + 1)
        if self.stage is Stage.ACTIVE:
            phase = _PHASES.get(self._doing, Phase.FORWARD)
            if self.step is None:
                phase = Phase.RECOVERY if self.stepping else Phase.SETUP
        else:
            phase = {Stage.STARTING: Phase.STARTING, Stage.DONE: Phase.DONE}.get(
                self.stage, Phase.RECOVERY
            )
        return phase, played, self.generation

    def glance(self) -> Glance:
        """What its agent reads in shared memory, and in /proc."""
        beat = self.sim.now if self.stopped_since is None else self.stopped_since
        stopped = self.stopped_since is not None
        return Glance(self.member, self.seat, self._shown, self._moved_s, beat, self._warm, stopped)

    def facts(self) -> MemberFacts:
        """What its agent knows of it once told."""
        return MemberFacts(
            member=self.member,
            seat=self.seat,
            node=self.node,
            stage=self.stage,
            generation=self.generation,
            linked=self.linked,
            step=self.step,
            voted=self.voted,
            cut=self.cut,
            stepping=self.stepping,
            sharded=self.sim.sharded and self.stepping,
            at_step=self.at_step,
            port=1 if self._greeted else 0,
        )

    def do(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action` in this process: now, after SIGCONT, or never."""
        if not self.alive:
            return
        if self.stopped_since is not None:
            self.backlog.append((action, args))
            return
        action(*args)
        if not self.hangs and (place := self._place()) != self._shown:
            self._shown, self._moved_s = place, self.sim.now

    def wake(self) -> None:
        """SIGCONT: everything that waited happens at once, in order."""
        self.stopped_since = None
        backlog, self.backlog = self.backlog, []
        for action, args in backlog:
            self.do(action, *args)

    def hang(self) -> None:
        """Code of its script hangs, the next time that any runs: in a world, and in no exchange."""
        self._later(0.01, self._hang)

    def _hang(self) -> None:
        self.hangs = self.stage in (Stage.ACTIVE, Stage.HALTED) and not self._doing
        if not self.hangs:
            self.hang()

    def _later(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        self.sim.after(delay_s, self.do, action, *args)

    def _work(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        """Let the training thread do `action`, unless it hangs by then."""
        self._later(delay_s, self._unless_hung, action, *args)

    def _unless_hung(self, action: Callable[..., None], *args: Any) -> None:
        if not self.hangs:
            action(*args)

    def _train(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        """Go on with `action`, unless a halt comes first."""
        self._work(delay_s, self._unless_halted, self._epoch, action, *args)

    def _unless_halted(self, epoch: int, action: Callable[..., None], *args: Any) -> None:
        if epoch == self._epoch and self.stage is Stage.ACTIVE:
            action(*args)

    def _point(self, name: str) -> bool:
        """Pass a point at which a fault may strike; False when it killed this process."""
        self.sim.injector.point(name, self)
        return self.alive

    def _say(self) -> None:
        self.sim.agents[self.node].told(self.facts())

    # What the plan asks.

    def _hello(self) -> None:
        self._greeted = True
        self._say()
        if self._point("hello"):
            self.sim.agents[self.node].greeted(self)

    def take_plan(self, plan: Plan) -> None:
        """A plan arrives from the agent."""
        if not self._greeted or (self.plan is not None and plan.order <= self.plan.order):
            return
        self.plan = plan
        if not self._begun:
            self._begun = True
            if plan.world is None or plan.mode is Mode.FORMING:
                # Its script sets up inside a world, with collectives.
                self._ready(False)
            else:
                self._later(self.sim.rng.uniform(0.02, 0.3), self._ready, True)
        self.heed()

    def _ready(self, stepping: bool) -> None:
        self.stepping = stepping
        self.stage = Stage.READY
        self.heed()
        self._say()

    def _duty(self) -> tuple[Duty, World | None]:
        assert self.plan is not None, "only a plan has duties"
        standing = Standing(
            member=self.member,
            stage=self.stage,
            generation=self.generation,
            linked=self.linked,
            prepared=self.prepared,
        )
        return react(standing, self.plan)

    def heed(self) -> None:
        """Do what the plan asks, as far as it goes at once."""
        while self.alive and self.plan is not None and not self._leaving:
            duty, world = self._duty()
            if duty is Duty.HALT:
                self.halt(self.plan.halted, "the plan says so")
            elif duty is Duty.LEAVE:
                self._leaving = True
                self._abort()
                self._work(0.02, self.sim.die, self, 1)
            elif duty is Duty.PREPARE and world is not None:
                if self.sim.network.unlinked(self, world):
                    self._later(0.05, self.heed)
                    return
                self._offers[world.generation] = world
                self.prepared = world.generation
                if not self._point("prepared"):
                    return
            else:
                if duty in (Duty.RESUME, Duty.LINK) and not self._busy:
                    self._busy = True
                    self._work(self.sim.delay_s(), self._task)
                return

    def _task(self) -> None:
        """The training thread looks what there is to do while it stands still."""
        self._busy = False
        if self._leaving or self.plan is None:
            return
        if self.gives_up:
            self._give_up()
            return
        duty, world = self._duty()
        if duty is Duty.RESUME and world is not None:
            self._resume(world, self.plan.step)
        elif duty is Duty.LINK and world is not None:
            self._busy = True
            if self.stepping:
                self._work(self.sim.delay_s() * 3, self._link, world)
            else:
                # It waited for a world to set up in; now it sets up alone, as a newcomer.
                self._work(0.1, self._set_up_alone)
        else:
            self.heed()

    def _give_up(self) -> None:
        """Finish the capture under way: nothing in its arena changes until it is in a new world."""
        if not self.gives_up:
            return
        self._capture.seal()
        self._state, self.voted = None, False
        self.stage = Stage.READY
        self._say()
        if self._point("gave-up"):
            self.heed()

    def _set_up_alone(self) -> None:
        self._busy = False
        self.stepping = True
        self._say()
        self.heed()

    def _link(self, world: World) -> None:
        self._busy = False
        if self.stage is Stage.ACTIVE or self._leaving:
            return
        if self.sim.network.connect(self, world):
            self._later(0.1, self.heed)
            return
        self._state, self.voted = None, False
        self.stage, self.linked = Stage.LINKED, world.generation
        self._linked_world = world
        self._say()
        if self._point("linked"):
            self.heed()

    # Entering.

    def _resume(self, world: World, step: Step) -> None:
        self.sim.checker.resumes(self, step)
        if away := self.sim.network.connect(self, world):
            self.cut = away
            self.halt(world.generation, f"members {_some(away)} cannot be reached")
            self.heed()
            return
        forward = self._state is not None and step == self._state.step + 1
        self._enter(world)
        if forward:
            self._commit(self._held)
            if not self.alive:
                return
        self.voted = False
        self._say()
        if not self._point("entered"):
            return
        if world.generation in self._aborted:
            self.halt(world.generation, "it was aborted before")
            self.heed()
            return
        self.heed()  # the next newcomers may be waiting already
        if not self.stepping:
            self._train(self.sim.rng.uniform(0.02, 0.3), self._set_up, step)
        elif self._state is None:
            self._restore(step, None)
        else:
            self._train(0.001, self._begin)

    def _enter(self, world: World) -> None:
        self.sim.checker.entered(self, world)
        self.stage, self.world = Stage.ACTIVE, world
        self.generation = world.generation
        self.linked = self.prepared = Generation(0)
        self.cut = frozenset()
        self._sequence = 0
        self._doing = ""
        self._offers = {g: w for g, w in self._offers.items() if g > self.generation}
        self.sim.note("enter", self, f"generation {world.generation} step {self.step}")

    def admit(self, world: World, step: Step) -> None:
        """A member says that this newcomer is in `world`, which stands at `step`."""
        if world.generation <= self.generation or self.stage is not Stage.LINKED:
            return
        attempt = self.linked
        self._enter(world)
        self._say()
        if not self._point("admitted"):
            return
        if self.sim.network.connect(self, world) or world.generation in self._aborted:
            self.halt(world.generation, "refused: a link is down")
            self.heed()
            return
        self.heed()
        # The step was committed by the world this newcomer had linked to.
        self._restore(step, attempt)

    def _set_up(self, step: Step) -> None:
        self.stepping = True
        self._say()
        self._restore(step, None)

    def _restore(self, step: Step, attempt: Generation | None) -> None:
        sharded = self.sim.sharded
        found = self.sim.shards.find(step) if sharded else self.sim.arenas.find(step, attempt)
        if found is None:
            self._train(0.05, self._restore, step, attempt)
        else:
            done = self._agree if sharded else self._restored
            self._train(self.sim.rng.uniform(0.005, 0.1), done, found)

    def _agree(self, found: TrainingState) -> None:
        """Wait until all have loaded their shards: until then nobody overwrites the old ones."""
        assert self.world is not None, "an active rank has a world"
        self._loaded, self._doing = found, "agree"
        self.sim.network.put(self, self.world, "agree", self._sequence, found)

    def _restored(self, found: TrainingState) -> None:
        self._state = found
        self.sim.checker.restored(self, found)
        if self.sim.sharded:
            if found.step:
                self._capture.begin(found)
        else:
            self.sim.arenas.forget_newer(self.node, self.seat, found)
        self._say()
        if self._point("restored"):
            self._begin()

    # Playing a step.

    def _begin(self) -> None:
        assert self._state is not None, "a rank without state does not train"
        if self._state.step >= self.sim.until:
            self._abandon()
            self.stage = Stage.DONE
            self.sim.network.unwatch(self)
            self._say()
            if self._point("done"):
                self._later(self.sim.rng.uniform(0.01, 0.3), self.sim.die, self, 0)
            return
        self._sequence += 1
        self.at_step = Step(self._state.step + 1)
        self.sim.checker.attempted(self, self._state)
        self._train(self.sim.compute_s(), self._reduce)

    def _reduce(self) -> None:
        assert self.world is not None, "an active rank has a world"
        rank = self.world.rank_of(self.member)
        assert rank is not None, "a rank is in its own world"
        share = slots_of(rank, self.world.size, self.sim.slots)
        self._doing = "reduce"
        self.sim.network.put(self, self.world, "reduce", self._sequence, share)

    def heard(self, what: str, sequence: int, exchange: Exchange) -> None:
        """What all members sent in an exchange is here; of an older generation it is refused."""
        generation = exchange.circle.world.generation
        if (generation, what, sequence) != (self.generation, self._doing, self._sequence):
            return
        if self.stage is not Stage.ACTIVE or not self.sim.network.reaches(exchange, self):
            return
        if what == "agree":
            assert self._loaded is not None, "it waits with what it has loaded"
            self._doing = ""
            if self._point("agreed") and self.stage is Stage.ACTIVE:
                self._restored(self._loaded)
            return
        if what == "reduce":
            if exchange.result is None:
                self.sim.checker.reduced(self, list(exchange.said.values()))
                exchange.result = True
            self._vote()
            return
        if exchange.result is None:
            # All have the same ballots, and count them in the same way.
            members = exchange.circle.world.members
            exchange.result = tally([exchange.said[m.member] for m in members])
        self._count(exchange.result)

    def _vote(self) -> None:
        assert self._state is not None, "a rank without state does not vote"
        assert self.world is not None, "an active rank has a world"
        self._doing = "vote"
        self.voted, self._held = True, self.generation
        if not self._point("reduced") or self.stage is not Stage.ACTIVE:
            return
        ballot = Ballot(
            generation=self.generation,
            step=Step(self._state.step + 1),
            digest=int(self.refuses),
            prepared=self.prepared,
        )
        self.refuses = False
        cast_s = min(BALLOT_S * max(self.world.size - 2, 0), BALLOTS_S)
        self._casting = (ballot, self.sim.now, cast_s)
        self._train(cast_s, self._cast)
        self.sim.injector.point("ballot", self, within_s=cast_s)

    def _cast(self) -> None:
        """Nobody leaves an exchange before his own part is on its way to all."""
        assert self.world is not None, "an active rank has a world"
        assert self._casting is not None, "it has begun to cast"
        ballot, self._casting = self._casting[0], None
        self.sim.network.put(self, self.world, "vote", self._sequence, ballot)

    def cut_off(self, at_s: float) -> None:
        """What was being cast has gone to those it came to by then, and to nobody else."""
        if self._casting is None or self.world is None:
            return
        (ballot, began_s, cast_s), self._casting = self._casting, None
        count = int((at_s - began_s) / cast_s * (self.world.size - 1)) if cast_s else 0
        if count:
            network = self.sim.network
            network.put(self, self.world, "vote", self._sequence, ballot, cast_to=count)

    def _count(self, result: Tally) -> None:
        self._doing = ""
        if not result.passed:
            self.voted = False
            self._train(0.001, self._begin)
            return
        self._commit(self.generation)
        if not self.alive or self.stage is not Stage.ACTIVE:
            return
        if result.switch is not None:
            self._switch(result.switch)
        if self._state is not None:
            self._train(0.005, self._begin)

    def _commit(self, attempt: Generation) -> None:
        before = self._state
        assert before is not None, "a rank without state does not commit"
        self._capture.seal()  # a capture must be done before the state changes again
        self._state = before.after(attempt)
        self.voted, self._warm = False, True
        self.sim.checker.committed(self, before, self._state)
        self.sim.note("commit", self, f"step {self.step} of generation {attempt}")
        self._capture.begin(self._state)
        self._point("committed")

    def _switch(self, generation: Generation) -> None:
        network, new = self.sim.network, self._offers[generation]
        newcomers = network.beyond(self, new)
        step = self.step
        assert step is not None, "a rank that switches has just committed"
        if self.sim.sharded:
            # Everybody loads its new shards from what was captured here.
            self._capture.seal()
            self._state = None
        self._enter(new)
        self._say()
        network.flood(self, "admit", generation, newcomers, SimRank.admit, new, step)
        if not self._point("switched"):
            return
        if network.connect(self, new) or generation in self._aborted:
            self.halt(generation, "a link is down")
            self.heed()
            return
        self.heed()
        if self.sim.sharded:
            self._restore(step, None)

    # Halting.

    def halt(self, generation: Generation, reason: str) -> None:
        """Stand still: every generation up to `generation` is over for this rank."""
        if self.stage is Stage.ACTIVE:
            self._abort()
            self.broken_setup = not self.stepping
            assert self.world is not None, "an active rank has a world"
            self.cut = self.sim.network.unlinked(self, self.world)
            self.sim.network.unwatch(self)
            unborn = not self.stepping and self.sim.unborn_say_halted
            self.stage = Stage.HALTED if self._state is not None or unborn else Stage.READY
            self.sim.note("halt", self, f"{reason}; step {self.step} voted {self.voted}")
        self.generation = max(generation, self.generation)
        self._say()
        if self._point("halted") and self.gives_up:
            self._work(self.sim.rng.uniform(0.001, 0.05), self._give_up)

    def _abort(self) -> None:
        self._abandon()
        if self.stage is Stage.ACTIVE and self.world is not None:
            self.sim.network.flood(
                self,
                "abort",
                self.generation,
                self.world.member_ids,
                SimRank.take_abort,
                self.generation,
            )

    def _abandon(self) -> None:
        self.cut_off(self.sim.now)
        self._epoch += 1
        self._doing = ""

    def take_abort(self, generation: Generation) -> None:
        """A peer says that `generation` is broken."""
        if generation > self.generation:
            self._aborted.add(generation)
        elif generation == self.generation and self.stage is Stage.ACTIVE:
            self.halt(generation, "a peer aborted it")
            self.heed()

    def see_links(self) -> None:
        """A connection is gone, and perhaps more of them."""
        if self.stage is Stage.ACTIVE and self.world is not None:
            if away := self.sim.network.unlinked(self, self.world):
                self.halt(self.generation, f"lost members {_some(away)}")
                self.heed()
        elif (
            self.stage is Stage.LINKED
            and self._linked_world is not None
            and self.sim.network.unlinked(self, self._linked_world)
        ):
            # It cannot be let in without this link, so it connects anew.
            self.stage, self.linked = Stage.READY, Generation(0)
            self.sim.network.unwatch(self)
            self._say()
            self.heed()


def _some(members: frozenset[MemberId]) -> str:
    return ", ".join(str(m) for m in sorted(members)[:4]) + (" ..." if len(members) > 4 else "")
