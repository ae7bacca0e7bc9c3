"""Session: this rank's part in the job, from `ftkit.init()` to the end of the step loop.

The training thread does everything that may block. On the happy path a step costs one
exchange of ballots and nothing else.
"""

import contextlib
import json
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ftkit.core.errors import GenerationAborted, OutsideStep, UsageError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.ids import Step as StepNumber
from ftkit.core.trace import Trace
from ftkit.core.world import Member, World
from ftkit.detection.row import Phase
from ftkit.recovery.clocks import ClockGovernor
from ftkit.recovery.facts import Allowed
from ftkit.session.blocks import Blocks
from ftkit.session.builder import Build, Builder
from ftkit.session.clock import Clock
from ftkit.session.consistency import Consistency, cut_refusal, refusal
from ftkit.session.ends import Ends
from ftkit.session.feed import Feed, LoaderFeed, MapStyle, feed_of
from ftkit.session.layers import Layers
from ftkit.session.loop import Loop
from ftkit.session.numbers import OnNaN
from ftkit.session.parts import Parts
from ftkit.session.raised_rate import raise_rate
from ftkit.session.replicas import OnDiverged
from ftkit.session.role import of_mesh
from ftkit.session.scaled import Scaled
from ftkit.session.schedulers import Schedulers
from ftkit.session.shards_digest import shards_digest
from ftkit.session.snapshots import Snapshots
from ftkit.session.step import Step
from ftkit.session.swapped import SwappedSchedule
from ftkit.session.verify import Verification, verify
from ftkit.session.warm_up import warm_up
from ftkit.session.worlds import Worlds
from ftkit.session.zero import ZeroOptimizer


class Session:
    """One rank of a job. Made by `ftkit.init`; used by the training thread only."""

    def __init__(self, parts: Parts) -> None:
        """Take over the parts of a rank; `join` comes next."""
        self._parts = parts
        self._worlds = Worlds(parts)
        self._modules: list[torch.nn.Module] = []
        self._snapshots: Snapshots | None = None
        self._schedulers = Schedulers(None)
        self._loop: Loop | None = None
        self._builder: Builder | None = None
        self._layers: Layers | None = None
        self._blocks: Blocks | None = None
        self._recut = True
        self._loss_scaling = False
        self._allowed = Allowed.NOTHING
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._digest_of_all: str | None = None
        self._consistency = Consistency.BITWISE
        self._clock = Clock(None, parts.trace, seats=1)
        self._newcomer = False
        self._cleanup = contextlib.ExitStack()
        self._closed = False

    @property
    def world(self) -> World:
        """The members of this generation; only this rank until it was let in."""
        return self._parts.group.world

    @property
    def rank(self) -> int:
        """This rank's number in the present world. Changes with the world."""
        return self._parts.group.rank

    @property
    def world_size(self) -> int:
        """Members of the present world."""
        return self.world.size

    @property
    def seat(self) -> int:
        """This rank's place in the job, whatever the world."""
        return self._parts.seat

    @property
    def seats(self) -> int:
        """Places in the job: the ranks it was started with."""
        return self._parts.env.seats if self._parts.env else 1

    @property
    def generation(self) -> int:
        """The number of the present world."""
        return self.world.generation

    @property
    def step(self) -> int:
        """Steps committed so far; 0 before the first."""
        return self._parts.membership.step or 0

    @property
    def trace(self) -> Trace:
        """This rank's event stream; `trace.event(kind, ...)` adds to it."""
        return self._parts.trace

    def join(self) -> None:
        """Say hello; the first members wait for their world, later ones for the step loop."""
        parts = self._parts
        if parts.control is None:
            alone = Member(
                member=MemberId(0), seat=Seat(0), node=NodeId(0), host="127.0.0.1", port=0
            )
            world = World.of(Generation(1), [alone])
            parts.group.edit(world, timeout_s=parts.stall_s)
            parts.membership.entered(world, StepNumber(0))
        else:
            host, port = parts.group.address
            parts.control.report({"type": "hello", "host": host, "port": port})
            parts.control.start(parts.membership.take_plan)
            self._newcomer = parts.membership.introduce().world is not None
            if not self._newcomer:
                parts.membership.ready(stepping=False)
                self._worlds.settle()
                # The first world may have formed without this rank: then it is a spare.
                self._newcomer = not parts.membership.active
        parts.recorder.phase(Phase.SETUP)

    @property
    def model(self) -> torch.nn.Module:
        """The model as `build` made it for the present world; another one after a failure.

        There is none before the step loop, and none is protected by `protect(model=...)`.
        """
        model: torch.nn.Module = _built(self._builder and self._builder.model, "model")
        return model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of `model`, from the same call of `build`."""
        optimizer: torch.optim.Optimizer = _built(
            self._builder and self._builder.optimizer, "optimizer"
        )
        return optimizer

    @property
    def scheduler(self) -> Any:
        """The scheduler of `optimizer`, where `build` returns one."""
        return _built(self._builder and self._builder.scheduler, "scheduler")

    def protect(
        self,
        *,
        model: torch.nn.Module | Iterable[torch.nn.Module] = (),
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        scheduler: object | None = None,
        build: Build | None = None,
        shards: int | None = None,
        stages: bool = False,
        recut: bool = True,
        allow_approximate: bool | str = False,
        consistency: str = "bitwise",
        device: str | None = None,
        **extra: object,
    ) -> None:
        """Keep this state safe: captured at every step, restored after a failure.

        Either `model` and `optimizer`, which every rank holds whole, or `build`, which makes them
        in shards: docs/sharded.md.

        Args:
          model: one module or several. A DistributedDataParallel keeps its forward pass;
            its gradients are reduced by this session instead, slot by slot.
          optimizer: one optimizer or several; every parameter of the model that requires
            gradients is reduced, whichever optimizer holds it. A `ftkit.ZeroOptimizer` holds a part
            of its state on each rank: docs/sharded.md.
          scheduler: anything with `state_dict` and `load_state_dict`, one or several. Step it
            inside `with step:`, after the optimizer; one stepped outside is warned of.
          build: called with the mesh of the world as the step loop begins and whenever the world, or
            the cut of a pipeline, has changed, in the same process; returns (model, optimizer) or (model, optimizer,
            scheduler), the model sharded over that mesh by `fully_shard`. They are
            `session.model`, `session.optimizer` and `session.scheduler` until the next change.
          shards: with `build`: cut a copy of the model over so many ranks, and keep several copies
            (HSDP): the mesh has the dimensions "replicate" and "shard". Where it does not
            divide the world, a copy is cut over the next larger number that does.
          stages: with `build`: the model is a pipeline, and what `build` returns are the layers of
            this rank's stage, with their names in the whole model: docs/pipelines.md.
          recut: with `stages`: whether layers move between ranks while the job trains, once measured
            times show that another cut pays. `build` is called again then, in a world that has not
            changed; the bits stay the same.
          allow_approximate: with `build`: whether the job may go on where part of its state is lost beyond
            memory and parity, with older or averaged values in its place; always told, never
            silent: docs/approximate.md. "checkfree+", of a pipeline: its first and last stages, too, from
            the stages beside, which learn their parts as `session.swapped` plays the slots. That costs
            progress at every step, failure or not.
          consistency: "bitwise" promises the undisturbed run's bits and refuses what would make them
            depend on the world; "scaled" the same samples, random numbers and weights, in
            micro-batches that are resized, equal but for rounding; "best_effort", with
            `build`, refuses nothing: docs/sharded.md.
          device: with `build`: the kind of device of the mesh; "cuda" where there is one.
          **extra: further objects with `state_dict` and `load_state_dict`, whose values are
            tensors or JSON-safe. A GradScaler belongs here: docs/gpus.md.

        Raises:
          UsageError: called twice, or something cannot be protected.
        """
        if self._snapshots is not None:
            raise UsageError("session.protect() may be called once")
        self._consistency = Consistency.of(consistency)
        self._recut, self._allowed = recut, _allowed(allow_approximate, stages=stages)
        self._loss_scaling = any(
            isinstance(e, torch.amp.GradScaler) and e.is_enabled() for e in extra.values()
        )
        if build is not None:
            if model != () or optimizer != () or scheduler is not None:
                raise UsageError(
                    "build= returns model, optimizer and scheduler: give none beside it"
                )
            self._protect_built(
                Builder(
                    build, shards=shards, consistency=consistency, device=device, stages=stages
                ),
                extra,
            )
            return
        if shards is not None or device is not None or stages or allow_approximate:
            raise UsageError(
                "shards=, stages=, device= and allow_approximate= go with build=: of a model that "
                "every rank holds whole nothing is lost while one lives"
            )
        if self._consistency is Consistency.BEST_EFFORT:
            raise UsageError(
                'consistency="best_effort" goes with build=: of a model that every rank holds whole '
                'nothing is refused that it would allow; leave it out, or take "scaled"'
            )
        self._modules = [model] if isinstance(model, torch.nn.Module) else list(model)
        optimizers = (
            [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        )
        if not self._modules or not optimizers:
            raise UsageError("protect needs model= and optimizer=, or build= for a sharded model")
        zero = [o for o in optimizers if isinstance(o, ZeroOptimizer)]
        if len(zero) > 1:
            raise UsageError("protect takes one ZeroOptimizer: give it groups of parameters")
        reason = refusal(self._consistency, self._modules, optimizers, sharded=False)
        if reason := reason or cut_refusal(self._modules, [o.inner for o in zero]):
            raise UsageError(reason)
        for module in self._modules:
            if isinstance(module, DistributedDataParallel):
                self._cleanup.enter_context(module.no_sync())
                # Or its first forward pass would broadcast buffers to ranks that do not.
                module.require_forward_param_sync = False
        self._snapshots = Snapshots(
            model=self._modules,
            optimizer=optimizers,
            scheduler=scheduler,
            extra=extra,
            parts=self._parts,
        )
        if zero:
            self._blocks = Blocks(zero[0], self._parts, self._snapshots)
            self._snapshots.divide(self._blocks)
        self._schedulers = Schedulers(scheduler)
        self._optimizers.update(optimizers)
        self._watch_optimizers()

    def _protect_built(self, builder: Builder, extra: Mapping[str, object]) -> None:
        self._builder = builder
        self._snapshots = Snapshots(
            model=(),
            optimizer=(),
            scheduler=None,
            extra=extra,
            parts=self._parts,
            stages=builder.stages,
        )
        if builder.stages:
            self._layers = Layers(self._parts.group, self.trace, self.seats)
            self._layers.norm_wanted = bool(self._allowed)
            self._layers.swap_wanted = self._allowed is Allowed.SWAPPED
        self._watch_optimizers()

    def _rebuild(self, world: World) -> None:
        """Build the sharded model for `world`, and protect and train that one from here on."""
        assert self._builder is not None, "asked for sharded models only"
        assert self._loop is not None, "built in the step loop"
        assert self._snapshots is not None, "protected"
        start = time.monotonic()
        self._loop.close()
        self._builder.make(world)
        model, optimizer = self.model, self.optimizer
        self._modules = [model]
        beside = dict[str, torch.Tensor]()
        if self._layers is not None and self._allowed:
            raise_rate(model, optimizer, self._layers.raised)
            if self._layers.swap_wanted:
                bounds = self._layers.bounds
                if not bounds:
                    raise UsageError("build asks session.cut() which layers this rank holds")
                ends = Ends(
                    self._parts.group,
                    model,
                    optimizer,
                    bounds=bounds,
                    numbers=self._layers.numbers,
                )
                self._layers.ends, beside = ends, ends.kept
        self._snapshots.adopt(model, optimizer, self._builder.scheduler, beside)
        self._loop.adopt(model, self._builder.scheduler)
        self._optimizers.clear()
        self._optimizers.add(optimizer)
        self.trace.event(
            "build",
            generation=world.generation,
            members=world.size,
            seconds=time.monotonic() - start,
        )

    def steps(
        self,
        data: MapStyle | Iterable[Any] | Feed,
        *,
        slots: int,
        until: int,
        slot_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        collate: Callable[[list[Any]], Any] | None = None,
        verify_every: int | None = None,
        on_diverged: OnDiverged | str = OnDiverged.REPAIR,
        on_nan: OnNaN | str = OnNaN.REPORT,
        mean: bool = True,
        rebalance: bool = False,
        clocks: ClockGovernor | None = None,
    ) -> Iterator[Step]:
        """The step loop: yields the next step to play until `until` are committed.

        A step that was rolled back comes round again; after a restart the loop goes on where
        the job stands.

        Args:
          data: a data set (`__len__`, `__getitem__`), or a DataLoader, of which a slot is
            then one batch, or a `Feed` that gives any slot's batch. The place of a loader with
            `state_dict` and `load_state_dict` is kept with each step: docs/data.md.
          slots: slots of the global batch, at least as many as ranks. Fixed for the job:
            the result does not depend on how many ranks share them. With
            `consistency="scaled"` the batch is divided by samples, `slots` times `slot_size`.
          until: steps to commit in all.
          slot_size: samples in a slot; only for a data set. With `consistency="scaled"` the most
            that are played at once.
          seed: decides the order of samples and every slot's random numbers.
          shuffle: whether a data set is read in a random order.
          collate: makes a batch of a list of samples; torch's default one if not given.
          verify_every: steps between two comparisons of what all ranks hold, bit for bit; 0 for
            never. By default as often as costs no more than half a per cent of the time.
          on_diverged: what becomes of a rank that holds other bits than most: "repair" (it
            fetches them), "evict" (it is replaced) or "report". The step is played again.
          on_nan: what follows when gradients are NaN or infinite, twice from the same samples:
            "report", "skip" (the step counts, the optimizer sees no gradients) or "raise".
          mean: whether gradients are divided by the number of slots. False is for losses that
            are divided already, by what the whole global batch holds (its tokens, say);
            `step.loss` is then the sum too.
          rebalance: whether slots go to ranks by how fast they are, measured every few steps. The
            result is the same, bit for bit. Not for a model that `build` makes.
          clocks: raises this rank's clock to its highest while the world is smaller than the job, and
            lets it go when it is full, or the session closes.

        Raises:
          UsageError: `protect` was not called, there are more ranks than slots, or an option is
            none of those above.
          JobStopped: the job was ended.
        """
        if self._snapshots is None:
            raise UsageError(
                "call session.protect(model=..., optimizer=...), or protect(build=...), before steps()"
            )
        if self._loop is not None:
            raise UsageError("session.steps() may be called once")
        try:
            diverged, nan = OnDiverged(on_diverged), OnNaN(on_nan)
        except ValueError as error:
            raise UsageError(f"{error}: see steps()") from error
        if verify_every is not None and verify_every < 0:
            raise UsageError(f"verify_every is {verify_every}: give steps, or 0 for never")
        scaled = self._consistency is Consistency.SCALED
        most = 1
        if scaled and slot_size is not None and slot_size > 0:
            most, slots, slot_size = slot_size, slots * slot_size, 1
        if slots < self.seats:
            raise UsageError(
                f"{self.seats} ranks cannot share {slots} slots: some would have nothing to do; "
                f"give slots={self.seats} or more, or start fewer ranks"
            )
        if rebalance and self._builder is not None:
            raise UsageError(
                "rebalance=True is for models that every rank holds whole: the ranks of a sharded "
                "one play every micro-batch together, and stages are balanced by session.cut()"
            )
        feed = feed_of(
            data,
            slots=slots,
            slot_size=slot_size,
            seed=seed,
            shuffle=shuffle,
            collate=collate,
            tell=self.trace.event,
        )
        if isinstance(feed, LoaderFeed) and feed.places is not None:
            if self._snapshots.protects(feed.state):
                raise UsageError(
                    "steps() keeps the place of a loader that has state_dict() by itself, with each "
                    "step: do not give it to protect() as well"
                )
            self._snapshots.keep_places(feed.places)
        self._clock = Clock(clocks, self.trace, seats=self.seats)
        self._loop = Loop(
            parts=self._parts,
            worlds=self._worlds,
            modules=self._modules,
            snapshots=self._snapshots,
            schedulers=self._schedulers,
            feed=feed,
            slots=slots,
            seed=seed,
            verify_every=verify_every,
            on_diverged=diverged,
            on_nan=nan,
            until=until,
            mean=mean,
            layers=self._layers,
            recut=self._recut,
            rebalance=rebalance,
            scaled=Scaled(feed, most=most, seed=seed, mean=mean) if scaled else None,
            divided=self._blocks is not None,
            loss_scaling=self._loss_scaling,
        )
        if self._blocks is not None:
            self._blocks.complete = self._loop.complete
        return self._play(self._loop)

    def end_steps(self) -> None:
        """End the loop over `steps` with the present step, as if `until` were reached.

        For early stopping; all ranks must do so at the same step, as with a `break`. After a
        `break` a rank is at work until it ends; here it is done once the loop is left.
        """
        if self._loop is None:
            raise UsageError("session.end_steps() belongs into the loop over session.steps()")
        self._loop.until = 0

    def cut(self, costs: Iterable[float]) -> tuple[int, ...]:
        """Agree with all ranks which layers of a pipeline each holds. For `build`, in every world.

        A full world is cut by `costs` first; a smaller one by what layers took that ran through
        `step.layer`, so that its slowest stage is as fast as can be; of equal cuts the one that moves
        the fewest layers is taken. When layers move while the job trains, the answer is the cut
        that they move to. Blocks until all ranks have asked.

        Args:
          costs: of each layer, in any unit; the same on all ranks.

        Returns:
          Where stages begin, and the number of layers: rank r holds [bounds[r], bounds[r + 1]).

        Raises:
          UsageError: without `stages=True`, or there are fewer layers than ranks.
          GenerationAborted: the world ended meanwhile; let it leave `build`.
        """
        if self._layers is None:
            raise UsageError("session.cut() is for protect(build=..., stages=True)")
        try:
            return self._layers.cut([float(cost) for cost in costs])
        except ValueError as error:
            raise UsageError(str(error)) from error

    def swapped(
        self,
        layers: Mapping[int, torch.nn.Module],
        *,
        hidden: torch.Tensor,
        loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> SwappedSchedule:
        """A schedule that runs the outer stages swapped on every odd slot. For `build`, after `cut`.

        In place of `torch.distributed.pipelining`'s: docs/approximate.md. The first layer and the last
        stay where they are, and are copied to the ranks beside at each step.

        Args:
          layers: those of this rank, by their numbers in the whole model.
          hidden: shaped, typed and placed as what each layer but the last gives of a slot; its values do
            not matter.
          loss_fn: a slot's loss, of the last layer's output and the target.

        Raises:
          UsageError: without `allow_approximate="checkfree+"`, or the layers are not those of the cut.
        """
        if self._layers is None or self._layers.swap is None:
            raise UsageError(
                'session.swapped() is for protect(..., stages=True, allow_approximate="checkfree+"), '
                "in build(mesh), after session.cut()"
            )
        assert self._loop is not None, "built in the step loop"
        return SwappedSchedule(
            self._layers,
            layers,
            hidden=hidden,
            loss_fn=loss_fn,
            rank=self.rank,
            slots=self._loop.slots,
        )

    def verify(self, *, repair: bool = False) -> Verification:
        """Whether all ranks hold the same protected tensors, bit for bit; if not, who differs.

        Called by all ranks alike, between two steps (`if step.index % 100 == 0`, after the
        `with`). Reads the state once, at memory speed, and exchanges 8 bytes a tensor. What is
        sharded is left out.

        Args:
          repair: fetch what is damaged, and no more, from ranks that hold what most do.

        Raises:
          UsageError: called inside `with step:`, or before `protect`.
          StateRefused: a repair was asked for and there is no majority; nothing was changed.
          IntegrityError: the repair of this rank's state failed halfway; let it end the process.
        """
        if self._snapshots is None:
            raise UsageError("call session.protect(model=..., optimizer=...) before verify()")
        if self._builder is not None:
            raise UsageError(
                "verify compares what all ranks hold alike, and shards differ by design"
            )
        if self._loop is not None and self._loop.current is not None:
            raise UsageError("call session.verify() between two steps, not inside `with step:`")
        return verify(self._parts, self._snapshots, step=self.step, repair=repair)

    def role(self, role: str | DeviceMesh, *, place: str = "") -> None:
        """Say which work this rank does: detection compares it with ranks of the same role only.

        Needed where ranks do different work: pipeline stages, parameter servers. Without it all
        ranks are taken to do the same, which holds for data and tensor parallelism.

        Args:
          role: a name of at most 16 characters that ranks with the same work share, such as the
            stage; or the job's DeviceMesh, whose dimension "pp" (or "pipeline", "stage") then
            makes the role, and whose coordinates are the place.
          place: where the rank stands in the job's mesh, for reports: "dp=0 pp=1 tp=0".

        Raises:
          ValueError: not printable ASCII, or too long.
        """
        if isinstance(role, DeviceMesh):
            role, place = of_mesh(role)
        self._parts.recorder.describe(role=role, place=place)

    @contextlib.contextmanager
    def unhurried(self, seconds: float) -> Iterator[None]:
        """Let this rank stand still for up to `seconds` without being taken for hung.

        For evaluation, exporting a model, and whatever else one rank does while the others
        wait for it.
        """
        with self._parts.recorder.allowed(seconds):
            yield

    def close(self) -> None:
        """Leave the job in order: the last snapshot is finished, peers are told goodbye."""
        if self._closed:
            return
        self._closed = True
        self._clock.close()
        if self._loop is not None and self._loop.recutter is not None:
            self._loop.recutter.close()
        if self._loop is not None and "final" not in self.trace.kinds:
            # What a drill compares with the undisturbed run, where the script says nothing.
            self.trace.event("final", params=self.digest(), loss=None, step=self.step)
        if self._blocks is not None:
            self._blocks.close()
        if self._snapshots is not None:
            self._snapshots.close()
        if self._loop is not None:
            self._loop.close()
        self._cleanup.close()
        self._parts.membership.done()
        self._parts.recorder.phase(Phase.DONE)
        if dist.is_initialized():
            dist.destroy_process_group()
        self._parts.close()

    def digest(self) -> str | None:
        """A hash of all protected parameters, in hexadecimal, the same on all ranks.

        Of sharded ones it is known once the step loop has ended, and None before.
        """
        if self._builder is not None:
            return self._digest_of_all
        digest = xxhash.xxh3_128()
        for module in self._modules:
            for param in module.parameters():
                flat = param.detach().cpu().contiguous().reshape(-1)
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _play(self, loop: Loop) -> Iterator[Step]:
        if self._newcomer:
            warm_up()
        build = None if self._builder is None else self._rebuild
        self._worlds.begin_stepping(
            lambda: loop.modules,
            loop.snapshots,
            build,
            layers=self._layers,
            blocks=self._blocks,
            allowed=self._allowed,
        )
        while True:
            self._worlds.settle()
            if self.step >= loop.until:
                if self._all_arrived(loop):
                    break
                continue
            self._clock.entered(self.world_size)
            step = Step(loop, StepNumber(self.step + 1))
            yield step
            if not step.entered:
                raise UsageError("a step must be played: use `with step:`")
            if not step.over:
                loop.after_exception(step)
            step.let_in()
        loop.snapshots.gate()
        self._parts.membership.done()
        self._parts.recorder.phase(Phase.DONE)

    def _all_arrived(self, loop: Loop) -> bool:
        """Whether the loop may end: with shards, only when no rank has to play its end again."""
        group = self._parts.group
        if self._blocks is not None:
            try:
                group.barrier().wait()  # or who lacks rows of the last step would miss us
            except GenerationAborted:
                return False
        if self._builder is None:
            return True
        loop.snapshots.gate()
        digest = shards_digest(loop.modules)
        mine = json.dumps([loop.snapshots.layout, f"{digest:x}"])
        try:
            told = group.exchange(mine.encode()).wait()
        except GenerationAborted:
            return False
        # Replicas hold the same; each shard counts once.
        parts = {int(layout): int(part, 16) for layout, part in map(json.loads, told)}
        self._digest_of_all = f"{sum(parts.values()) % (1 << 64):016x}"
        return True

    def _watch_optimizers(self) -> None:
        """Have every step of a protected optimizer pass through the open step."""
        mine = self._optimizers
        ref = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            session = ref()
            if session is None or optimizer not in mine:
                return
            step = session._loop.current if session._loop else None
            if step is None:
                raise OutsideStep(
                    "a protected optimizer stepped outside `with step:`; its change would be "
                    "lost or doubled by the next failure. Step it inside, or do not protect it"
                )
            step.before_optimizer(optimizer)

        self._cleanup.callback(register_optimizer_step_pre_hook(before_step).remove)


def _built(found: Any, what: str) -> Any:
    if found is None:
        raise UsageError(
            f"session.{what} is what build(mesh) returned, in the step loop: call "
            f"session.protect(build=...), and take session.{what} inside `for step in "
            "session.steps(...)`, anew in each step"
        )
    return found


def _allowed(given: bool | str, *, stages: bool) -> Allowed:
    """Which approximations a script allows. UsageError: there is no such way."""
    if given == "checkfree+" and stages:
        return Allowed.SWAPPED
    if not isinstance(given, bool):
        raise UsageError(
            f'allow_approximate is {given!r}: give True, or "checkfree+" with stages=True'
        )
    if not given:
        return Allowed.NOTHING
    return Allowed.STAGES if stages else Allowed.SHARDS
