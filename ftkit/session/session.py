"""Session: this rank's part in the job, from `ftkit.init()` to the end of the step loop.

It joins the rooms: membership and plans from the control thread, the process group and its
gradients from `collectives`, snapshots from `checkpoint`, the status row from `detection`.
The training thread does everything that may block; nothing here runs on the happy path but
one exchange of ballots a step.
"""

import atexit
import contextlib
import os
import random
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ftkit.collectives import backend
from ftkit.collectives.gradients import GradientReducer
from ftkit.collectives.group import Group
from ftkit.collectives.slots import assign
from ftkit.core import exit_codes
from ftkit.core.clock import MonotonicClock
from ftkit.core.errors import (
    CapacityError,
    GenerationAborted,
    JobFault,
    JobStopped,
    NotDeterministic,
    OutsideStep,
    StateChanged,
    StepRolledBack,
    UsageError,
    WireError,
)
from ftkit.core.fault_plan import Point, from_environ
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.core.rank_env import RankEnv
from ftkit.core.trace import Trace
from ftkit.core.world import Member, World
from ftkit.detection.config import DetectionConfig
from ftkit.detection.recorder import Recorder
from ftkit.detection.row import Phase
from ftkit.detection.status import StatusBoard
from ftkit.recovery.data_cursor import derive
from ftkit.recovery.vote import Ballot, Tally, tally
from ftkit.session.control import Control
from ftkit.session.feed import Feed, MapStyle, feed_of
from ftkit.session.inject import Injector
from ftkit.session.membership import Entry, Fate, Link, Membership, admission
from ftkit.session.snapshots import Snapshots
from ftkit.session.step import Step, is_aborted

#: Votes that do not pass, one after another, after which the step is given up.
VOTES_MAX = 3


class Session:
    """One rank of a job. Made by `init`; used by the training thread only."""

    def __init__(self, env: RankEnv | None) -> None:
        """Join the job described by `env`, or be a world of one."""
        self._env = env
        self._cleanup = contextlib.ExitStack()
        self._control = Control(env) if env else None
        seat = Seat(env.seat if env else 0)
        self.seat = seat
        """This rank's place in the job, whatever the world."""
        member = MemberId(env.member if env else 0)
        self._member = member
        self.trace = _trace(env)
        """This rank's event stream; `trace.event(kind, ...)` adds to it."""
        self._injector = Injector(from_environ(os.environ, member=member), self.trace)
        self._board = StatusBoard.open(Path(env.shm_dir) / "board") if env else None
        self._recorder = self._make_recorder()
        self._membership = Membership(
            member,
            report=self._control.report if self._control else _ignore,
            abort=self._abort,
            trace=self.trace,
        )
        self._group = Group(
            member=member,
            secret=bytes.fromhex(env.secret) if env else os.urandom(32),
            host=env.host if env else "127.0.0.1",
            on_fault=self._on_fault,
            recorder=self._recorder,
            on_tell=self._on_tell,
        )
        self._limit_s = env.max_stall_s if env else 30.0
        self._snapshots: Snapshots | None = None
        self._model: list[torch.nn.Module] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._reducer: GradientReducer | None = None
        self._feed: Feed | None = None
        self._slot_count = 0
        self._seed = 0
        self._current: Step | None = None
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._failed_votes = 0
        self._switching: World | None = None
        self._digest = 0
        self._bucket = 0
        self._after_slot_0: list[torch.Tensor] = []
        self._closed = False

    # What the user asks.

    @property
    def world(self) -> World:
        """The members of this generation; only this rank until it was let in."""
        return self._group.world

    @property
    def rank(self) -> int:
        """This rank's number in the present world. Changes with the world."""
        rank = self.world.rank_of(self._member)
        assert rank is not None, "a group's world contains its own member"
        return rank

    @property
    def world_size(self) -> int:
        """Members of the present world."""
        return self.world.size

    @property
    def generation(self) -> int:
        """The number of the present world."""
        return self.world.generation

    @property
    def step(self) -> int:
        """Steps committed so far; 0 before the first."""
        return self._membership.step or 0

    def protect(
        self,
        *,
        model: torch.nn.Module | Iterable[torch.nn.Module],
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
        scheduler: object | None = None,
        **extra: object,
    ) -> None:
        """Keep this state safe: captured at every step, restored after a failure.

        Args:
          model: one module or several. A DistributedDataParallel keeps its forward pass;
            its gradients are reduced by this session instead, slot by slot.
          optimizer: one optimizer or several; every parameter of the model that requires
            gradients is reduced, whichever optimizer holds it.
          scheduler: anything with `state_dict` and `load_state_dict`.
          **extra: further objects with `state_dict` and `load_state_dict`, whose values are
            tensors or JSON-safe.

        Raises:
          UsageError: called twice, or inside the step loop.
        """
        if self._reducer is not None or self._model:
            raise UsageError("session.protect() may be called once")
        self._model = [model] if isinstance(model, torch.nn.Module) else list(model)
        self._optimizers = (
            [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        )
        for module in self._model:
            if isinstance(module, torch.nn.parallel.DistributedDataParallel):
                # Gradients are reduced here, slot by slot; DDP keeps its forward pass.
                self._cleanup.enter_context(module.no_sync())
                module.require_forward_param_sync = False
        self._snapshots = Snapshots(
            model=self._model,
            optimizer=self._optimizers,
            scheduler=scheduler,
            extra=extra,
            env=self._env,
            control=self._control,
            trace=self.trace,
        )
        mine = weakref.WeakSet(self._optimizers)
        ref = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            session = ref()
            if session is not None and optimizer in mine:
                session._before_optimizer()

        self._cleanup.callback(register_optimizer_step_pre_hook(before_step).remove)

    def steps(
        self,
        data: MapStyle | Iterable[Any],
        *,
        slots: int,
        until: int,
        slot_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> Iterator[Step]:
        """The step loop: yields the next step to play until `until` are committed.

        A step that was rolled back comes round again; after a restart the loop goes on where
        the job stands.

        Args:
          data: a data set (`__len__`, `__getitem__`), or a DataLoader, of which a slot is
            then one batch.
          slots: slots of the global batch, at least as many as ranks. Fixed for the job:
            the result does not depend on how many ranks share them.
          until: steps to commit in all.
          slot_size: samples in a slot; only for a data set.
          seed: decides the order of samples and every slot's random numbers.
          shuffle: whether a data set is read in a random order.
          collate: makes a batch of a list of samples; torch's default one if not given.

        Raises:
          UsageError: `protect` was not called, or there are more ranks than slots.
          JobStopped: the job was ended.
        """
        if self._snapshots is None:
            raise UsageError("call session.protect(model=..., optimizer=...) before steps()")
        seats = self._env.seats if self._env else 1
        if slots < seats:
            raise UsageError(
                f"{seats} ranks cannot share {slots} slots: some would have nothing to do; "
                f"give slots={seats} or more, or start fewer ranks"
            )
        self._slot_count, self._seed = slots, seed
        self._feed = feed_of(
            data, slots=slots, slot_size=slot_size, seed=seed, shuffle=shuffle, collate=collate
        )
        self._reducer = GradientReducer(
            [p for m in self._model for p in m.parameters()],
            slots=slots,
            reduce=self._reduce_bucket,
        )
        return self._play(until)

    @contextlib.contextmanager
    def unhurried(self, seconds: float) -> Iterator[None]:
        """Let this rank stand still for up to `seconds` without being taken for hung.

        For evaluation, exporting a model, and whatever else one rank does while the others
        wait for it.
        """
        self._recorder.allow(seconds)
        try:
            yield
        finally:
            self._recorder.allow(0)

    def close(self) -> None:
        """Leave the job in order: the last snapshot is finished, peers are told goodbye."""
        if self._closed:
            return
        self._closed = True
        if self._snapshots is not None:
            self._snapshots.close()
        self._cleanup.close()
        if self._reducer is not None:
            self._reducer.close()
        self._membership.done()
        self._recorder.phase(Phase.DONE)
        if dist.is_initialized():
            dist.destroy_process_group()
        self._group.close()
        if self._control is not None:
            self._control.close()
        self._recorder.close()
        if self._board is not None:
            self._board.close()
        self.trace.close()

    def _make_recorder(self) -> Recorder:
        """The recorder on this node's status board, or on one of its own when alone."""
        clock = MonotonicClock()
        if self._env is None or self._board is None:
            folder = Path(self._cleanup.enter_context(tempfile.TemporaryDirectory()))
            self._board = StatusBoard.create(folder / "board", seats=1)
            return Recorder(self._board.attach(0, self._member), clock)
        config = DetectionConfig(max_stall_s=self._env.max_stall_s)
        return Recorder(
            self._board.attach(self._env.local_seat, self._member),
            clock,
            heartbeat_interval_s=config.heartbeat_interval_s,
        )

    # Joining and entering worlds.

    def _join(self) -> None:
        """Say hello; the first members wait for their world, later ones for the step loop."""
        if self._control is None or self._env is None:
            world = World.of(Generation(1), [_alone()])
            self._group.edit(world, timeout_s=self._limit_s)
            self._membership.entered(world, StepNumber(0))
            return
        host, port = self._group.address
        self._control.report({"type": "hello", "host": host, "port": port})
        self._control.start(self._membership.take_plan)
        plan = self._membership.introduce()
        if plan.world is None:
            self._membership.ready(stepping=False)
            self._settle()

    def _settle(self) -> None:
        """Return once this rank is in a world that goes on, with the state it stands at."""
        while (task := self._membership.next_task()) is not None:
            self._recorder.phase(Phase.RECOVERY)
            match task:
                case Link(world):
                    with contextlib.suppress(WireError):
                        # A member that cannot be reached is being replaced: wait for the
                        # next world.
                        self._group.connect(world.members, timeout_s=self._limit_s)
                        self._membership.linked(world)
                case Entry():
                    self._enter(task)

    def _enter(self, entry: Entry) -> None:
        """Edit the group into `entry.world` and hold the state of `entry.step`."""
        world, step = entry.world, entry.step
        had = self._membership.step
        if world.generation > 1 and self._reducer is not None and not entry.admitted:
            self._injector.at(Point.RECOVERY, step + 1)
        try:
            self._group.edit(world, timeout_s=self._limit_s)
        except (WireError, GenerationAborted, TimeoutError) as error:
            self._group.abort(world.generation, str(error))
            self._membership.refused(world, str(error))
            return
        self._recorder.adopt(world.generation)
        stepping = self._reducer is not None
        behind = (had != step and (had is not None or step > 0)) or (had is None and stepping)
        fresh = step == 0
        self._membership.entered(world, None if behind or (fresh and stepping) else step)
        if not stepping:
            return
        try:
            if fresh:
                self._share_initial_state()
            elif behind:
                assert self._snapshots is not None, "stepping implies protect()"
                self._snapshots.restore(step, world, self._membership)
        except GenerationAborted:
            return
        if not behind and not fresh:
            return
        if self._membership.restored(world.generation, step):
            self.trace.event("admit", step=step, generation=world.generation)

    def _share_initial_state(self) -> None:
        """Everybody starts from rank 0's parameters and buffers."""
        if self.world_size == 1:
            return
        with torch.no_grad():
            for module in self._model:
                for tensor in [*module.parameters(), *module.buffers()]:
                    self._group.broadcast(tensor.detach(), 0).wait()

    def _switch(self, world: World, step: StepNumber) -> None:
        """Enter the newcomers' world, all members together, at the end of `step`."""
        known = self._group.world.member_ids
        for member in world.members:
            if member.member not in known:
                self._group.tell(member.member, admission(world, step))
        self._enter(Entry(world, step, True))

    # The step.

    def _play(self, until: int) -> Iterator[Step]:
        self._membership.ready(stepping=True)
        if self._membership.active and self._membership.step == 0:
            # Formed before anybody had a model: agree on the initial state now.
            with contextlib.suppress(GenerationAborted):
                self._share_initial_state()
        try:
            while True:
                self._settle()
                if self.step >= until:
                    break
                number = StepNumber(self.step + 1)
                step = Step(self, number, self._group.world.generation)
                yield step
                if not step.entered:
                    raise UsageError("a step must be played: use `with step:`")
                self._recorder.phase(Phase.BETWEEN)
        finally:
            if self._snapshots is not None and self.step >= until:
                self._snapshots.finish()
        self._membership.done()
        self._recorder.phase(Phase.DONE)

    def _begin(self, step: Step) -> None:
        assert self._reducer is not None, "steps() made the reducer"
        if self._current is not None:
            raise UsageError("a step is open already: do not nest `with step:`")
        count = sum(p.requires_grad for m in self._model for p in m.parameters())
        if count != self._reducer.params:
            raise StateChanged(
                f"the model has {count} parameters that require gradients, it had "
                f"{self._reducer.params} when it was protected; add parameters before protect()"
            )
        self._current = step
        self._recorder.step(StepNumber(step.index))
        self._reducer.begin()
        self._buffers = [
            (b, b.detach().clone()) for m in self._model for b in m.buffers() if b.numel()
        ]

    def _slots(self, step: Step) -> list[Slot]:
        self._check(step)
        return [Slot(s) for s in assign(self._slot_count, self.world_size)[self.rank]]

    def _start_slot(self, step: Step, slot: Slot) -> Any:
        assert self._reducer is not None, "steps() made the reducer"
        assert self._feed is not None, "steps() made the feed"
        self._check(step)
        self._recorder.phase(Phase.DATA)
        number = StepNumber(step.index)
        self._injector.at(Point.DATA, number)
        key = derive(self._seed, "slot", number, slot) >> 1
        torch.manual_seed(key)
        random.seed(key)
        for buffer, before in self._buffers:
            # Every slot begins with the buffers of the step's beginning; slot 0 decides
            # what they become, as rank 0 does in plain DDP.
            buffer.copy_(before)
        batch = self._feed.batch(number, slot)
        self._reducer.start_slot(slot, last=slot == self._slots(step)[-1])
        self._recorder.phase(Phase.FORWARD)
        self._injector.at(Point.FORWARD, number)
        self._bucket = 0
        return batch

    def _end_slot(self, step: Step, slot: Slot) -> None:
        assert self._reducer is not None, "steps() made the reducer"
        self._check(step)
        self._reducer.end_slot()
        if slot == 0 and self._buffers:
            self._after_slot_0 = [b.detach().clone() for b, _ in self._buffers]

    def _reduce_bucket(self, nodes: Any, out: torch.Tensor, scale: float) -> Any:
        step = self._current
        assert step is not None, "buckets are reduced inside a step"
        self._injector.at(Point.BACKWARD, step.index, bucket=self._bucket)
        self._check(step)
        handle = self._group.reduce_slots(nodes, out, slots=self._slot_count, scale=scale)
        self._injector.at(Point.ALL_REDUCE, step.index, bucket=self._bucket)
        self._bucket += 1
        return handle

    def _reduce(self, step: Step) -> None:
        assert self._reducer is not None, "steps() made the reducer"
        self._check(step)
        self._recorder.phase(Phase.REDUCE)
        self._digest = self._reducer.finish(held=len(self._slots(step)))
        if self._buffers:
            self._share_buffers(step)
        self._recorder.phase(Phase.FORWARD)

    def _share_buffers(self, step: Step) -> None:
        """Buffers become what slot 0 made of them, on every rank."""
        owner = next(
            r for r, held in enumerate(assign(self._slot_count, self.world_size)) if 0 in held
        )
        for i, (buffer, _) in enumerate(self._buffers):
            if self.rank == owner:
                buffer.copy_(self._after_slot_0[i])
            self._group.broadcast(buffer.detach(), owner).wait()

    def _before_optimizer(self) -> None:
        """(optimizer pre-hook) Vote before the first optimizer of a step changes anything."""
        step = self._current
        if step is None:
            raise OutsideStep(
                "a protected optimizer stepped outside `with step:`; its change would be lost "
                "or doubled by the next failure. Step it inside, or do not protect it"
            )
        if not step.committed:
            self._vote(step)
        assert self._snapshots is not None, "protect() made the snapshots"
        self._recorder.phase(Phase.CAPTURE)
        self._snapshots.gate()
        self._recorder.phase(Phase.OPTIMIZER)
        self._injector.at(Point.COMMIT, step.index)
        self._injector.at(Point.OPTIMIZER, step.index)

    def _vote(self, step: Step) -> None:
        """Agree that `step` counts. Returns when it does; blocks through a repair.

        Raises:
          StepRolledBack: it does not.
        """
        assert self._feed is not None, "steps() made the feed"
        if not step._reduced:
            raise UsageError(
                "the step has no gradients: loop over step.batches() to its end before the "
                "optimizer steps"
            )
        self._check(step)
        self._recorder.phase(Phase.VOTE)
        number = StepNumber(step.index)
        prepared = self._membership.prepared
        ballot = Ballot(
            generation=step.generation,
            step=number,
            digest=self._digest,
            data_digest=self._feed.digest(number),
            prepared=prepared.generation if prepared else Generation(0),
            losses=step.losses,
        )
        held = self._slots(step)
        self.trace.event("vote", step=number, generation=step.generation, slots=held)
        self._membership.vote_cast()
        try:
            cast = self._group.exchange(ballot.pack())
            self._injector.at(Point.VOTE, number)
            result = tally([Ballot.unpack(b) for b in cast.wait()])
        except GenerationAborted:
            result = None
        if result is not None and not result.passed:
            self._refuse(result)
        if result is not None and self._membership.vote_passed(step.generation):
            self._failed_votes = 0
            step.committed, step.loss = True, result.loss
            if prepared and result.switch == prepared.generation:
                self._switching = prepared
            return
        if self._membership.fate() is Fate.BACK:
            raise StepRolledBack(f"step {number} was cut short and is played again")
        self.trace.event("forward", step=number, generation=step.generation)
        step.committed = True
        step.loss = result.loss if result is not None else None

    def _refuse(self, result: Tally) -> None:
        """A vote that did not pass is the job's fault; too many in a row are the script's."""
        self._membership.vote_failed()
        self._failed_votes += 1
        self.trace.event("refused", reason=result.reason)
        if "read other data" in result.reason:
            raise NotDeterministic(
                f"{result.reason}. Every rank must read the same batches in the same order: "
                "give the loader no rank-dependent sampler and no unseeded shuffling, or pass "
                "the data set itself"
            )
        if self._failed_votes >= VOTES_MAX:
            raise UsageError(f"{result.reason}, {self._failed_votes} times in a row")
        raise StepRolledBack(result.reason)

    def _end(self, step: Step) -> None:
        """`step` is committed and the optimizers have stepped."""
        assert self._feed is not None, "inside a step"
        assert self._snapshots is not None, "inside a step"
        number = StepNumber(step.index)
        self._current = None
        self.trace.event(
            "commit",
            step=number,
            generation=step.generation,
            loss=step.loss,
        )
        self._feed.committed(number)
        self._snapshots.begin(number, step.generation)
        self._injector.at(Point.CAPTURE, number)
        switching, self._switching = self._switching, None
        if switching is not None and self._membership.active:
            self._switch(switching, number)

    def _roll_back(self, step: Step, error: BaseException) -> None:
        """Undo what the attempt changed: nothing but gradients and buffers."""
        self._current = None
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        self.trace.event(
            "rollback", step=step.index, generation=step.generation, reason=str(error)[:300]
        )

    def _check(self, step: Step) -> None:
        """Raise when the attempt's generation is over, before anything enters the next."""
        if self._group.world.generation != step.generation or not self._membership.active:
            raise StepRolledBack(f"generation {step.generation} is over")

    def _is_job_fault(self, step: Step, error: BaseException) -> bool:
        if isinstance(error, JobFault):
            return True
        over = self._group.aborted or self._group.world.generation != step.generation
        return over and isinstance(error, RuntimeError) and is_aborted(error)

    # What other threads bring.

    def _on_fault(self, generation: Generation, lost: frozenset[MemberId], reason: str) -> None:
        self._membership.take_fault(generation, lost, reason)

    def _on_tell(self, member: MemberId, payload: bytes) -> None:
        self._membership.take_admission(payload)

    def _abort(self, generation: Generation, reason: str) -> None:
        self._group.abort(generation, reason)


_session: Session | None = None
_lock = threading.Lock()


def init() -> Session:
    """Join the job this process was started for, or be alone. Blocks until the world stands.

    Afterwards `torch.distributed` is initialized with the backend "ftkit" over the same
    world, so DDP and plain collectives work. A process that replaces a dead one gets a world
    of one until the step loop lets it in. Called again, it returns the same session.

    Raises:
      UsageError: started by another launcher, or with an incomplete environment.
      JobStopped: the job ended before this rank could join.
    """
    global _session
    with _lock:
        if _session is not None:
            return _session
        env = RankEnv.read(os.environ)
        if env is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "this process is one of several, but ftkit did not start it: use "
                "`ftkit run --nproc N script.py` in place of torchrun"
            )
        session = Session(env)
        session._join()
        backend.register()
        backend.bind(session._group)
        dist.init_process_group(
            "ftkit",
            store=dist.HashStore(),  # type: ignore[attr-defined]  # public, not listed
            rank=session.rank,
            world_size=session.world_size,
        )
        session._recorder.phase(Phase.SETUP)
        atexit.register(session.close)
        sys.excepthook = _say_whose_fault
        _session = session
        return session


def _say_whose_fault(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """(sys.excepthook) Tell the agent by the exit code what a retry could not mend."""
    if isinstance(error, JobStopped):
        print(f"ftkit: this rank leaves: {error}", file=sys.stderr)
        code = exit_codes.STOPPED
    elif isinstance(error, (UsageError, CapacityError)):
        traceback.print_exception(kind, error, trace)
        code = exit_codes.USAGE
    else:
        traceback.print_exception(kind, error, trace)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _alone() -> Member:
    return Member(member=MemberId(0), seat=Seat(0), node=NodeId(0), host="127.0.0.1", port=0)


def _trace(env: RankEnv | None) -> Trace:
    if env is None:
        return Trace(Path(os.devnull))
    path = Path(env.run_dir) / "events" / f"seat-{env.seat}-member-{env.member}.jsonl"
    return Trace(path, seat=env.seat, member=env.member)


def _ignore(message: dict[str, object]) -> None:
    return
