"""Lightning: `FtkitStrategy`, the strategy of a Trainer whose ranks may die.

Each rank's Trainer believes that it is alone (a strategy of a single device), and its loader gives
it one batch where the job takes one for each rank: the others travel with it unseen. All batches of
an update are played within the strategy's optimizer step, as often as it takes until the update
counts (`updates`); the closure of Lightning is called once for each batch of this rank's slots.
Between updates the ranks may ask each other (a barrier before a checkpoint is read, whether to
stop), and each goes by what it knows itself where somebody dies meanwhile.
"""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ftkit.core.errors import UsageError
from ftkit.integrations.alone import local_index, local_rank, own_gpu, require
from ftkit.integrations.updates import Updates
from ftkit.session import Session, init
from ftkit.session.loader import END, reading_of

require("lightning", "lightning")

from lightning.fabric.utilities import rank_zero as fabric_rank_zero
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torchmetrics import Metric

#: How long one evaluation or one save may keep a rank from training before it counts as hung.
APART_S = 3600.0

#: No job has more steps.
_NO_END = 1 << 62


class FtkitStrategy(SingleDeviceStrategy):
    """`Trainer(strategy=FtkitStrategy())`, of a script started by `ftkit run`, or alone."""

    strategy_name = "ftkit"

    def __init__(self, **kwargs: Any) -> None:
        """Join the job.

        Args:
          **kwargs: those of `SingleDeviceStrategy` other than the device.
        """
        self._session = init()
        super().__init__(device=own_gpu() or "cpu", **kwargs)
        self._updates: Updates | None = None
        self._loader: _Groups | None = None
        self._memory: _Memory | None = None
        self._groups: list[list[Any]] = []
        """Of the update under way: for each batch that the Trainer was given, all of its group."""
        self._batch: Any = None
        self._of = 0
        """The batch that is played now, and how many there are in its group."""
        self._played = False
        self._apart = contextlib.ExitStack()
        """Open while an evaluation runs."""
        # Until it is in a world of several, a rank that comes back has no number but its seat.
        self._be(self._session.seat, local_rank())

    # ---- who this is

    @property
    def is_global_zero(self) -> bool:
        return bool(self.global_rank == 0)

    def _be(self, rank: int, local: int) -> None:
        self.global_rank, self.local_rank = rank, local
        rank_zero_only.rank = fabric_rank_zero.rank_zero_only.rank = rank

    # ---- the beginning

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):
            self._root_device = torch.device("cpu")  # the Trainer's word counts, not what there is
        super().setup_environment()

    def setup(self, trainer: Any) -> None:
        base: Any = super()
        base.setup(trainer)
        if not trainer.training:
            return
        _check(trainer)
        for metric in _metrics(trainer.lightning_module):
            # Whole on every rank, where they are of an evaluation; and no rank waits for another.
            metric.distributed_available_fn = _never
        self._memory = _Memory(trainer)

    def process_dataloader(self, dataloader: Any) -> Any:
        trainer = self.lightning_module.trainer
        if not trainer.training or trainer.sanity_checking:
            return dataloader
        if self._loader is not None:
            raise UsageError("reload_dataloaders_every_n_epochs: a job reads one loader to its end")
        self._loader = _Groups(dataloader, self._session, trainer.fit_loop, _seed())
        return self._loader

    def barrier(self, name: Any = None) -> None:
        if name == "run-stage" and self.lightning_module.trainer.training:
            self._join(self.lightning_module.trainer)
        self._ask(dist.barrier)

    def _join(self, trainer: Any) -> None:
        """Enter the job: optimizers and checkpoints are there, the loop has not begun."""
        if self._updates is not None:
            raise UsageError("a job is one training: trainer.fit() may be called once")
        assert self._memory is not None, "set up"
        scaler = getattr(self.precision_plugin, "scaler", None)
        schedulers = [config.scheduler for config in self.lr_scheduler_configs]
        self._session.protect(
            model=trainer.lightning_module,
            optimizer=self.optimizers,
            scheduler=schedulers or None,
            trainer=self._memory,
            **({"scaler": scaler} if scaler is not None else {}),
        )
        slots = trainer.accumulate_grad_batches * self._session.seats
        self._updates = Updates(self._session, slots=slots, until=_NO_END, seed=_seed(), mean=False)
        self._updates.begin()
        self._be(self._session.rank, local_index(self._session))

    # ---- the loop

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert self._updates is not None, "joined"
        assert self._loader is not None, "it gave the batch"
        assert self._memory is not None, "set up"
        self._memory.recall()
        if not self._groups:
            self._updates.close()
        self._groups.append(self._loader.handed.popleft())

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        if self._batch is None:
            # All are played with the last one of the update.
            return torch.zeros((), device=self.root_device)
        if not args:
            raise UsageError("training_step(dataloader_iter) has no batches that could be shared")
        return base.training_step(self._batch, *args[1:], **kwargs)

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        if self._batch is None:
            return closure_loss
        # The mean over a group; that over its groups is Lightning's.
        return base.backward(closure_loss / self._of, optimizer, *args, **kwargs)

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        base: Any = super()
        result = self._play(closure)
        if isinstance(closure, Closure) and closure._result is None:
            # The last update of an epoch had no batch for this rank; the loop asks for a loss.
            closure._result = ClosureResult(closure_loss=None)
        return base.optimizer_step(optimizer, lambda: result, model, **kwargs)

    def on_train_end(self) -> None:
        if self._updates is not None:
            self._updates.end()
        self._played = False

    def _play(self, closure: Callable[[], Any]) -> Any:
        """Play the batches of the update until it counts. Returns the loss of the last one."""
        assert self._updates is not None, "joined"
        trainer = self.lightning_module.trainer
        logged = _Logged(trainer)
        result: Any = None

        def play(item: tuple[Any, int]) -> Any:
            nonlocal result
            batch, self._of = item
            batch = self.precision_plugin.convert_input(batch)
            batch = self.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
            self._batch = self.batch_to_device(batch, dataloader_idx=0)
            trainer._logger_connector.on_batch_start(self._batch)
            try:
                result = closure()
            finally:
                self._batch = None
            return None if result is None else result / self._of

        batches = [(batch, len(group)) for group in self._groups for batch in group]
        self._groups = []
        self._updates.play(batches, play, undo=logged.undo)
        self._played = True
        self._be(self._session.rank, local_index(self._session))
        return result

    # ---- what ranks do apart

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        base: Any = super()
        with self._session.unhurried(APART_S):  # the others wait for the one that writes
            base.save_checkpoint(*args, **kwargs)

    def on_validation_start(self) -> None:
        base: Any = super()
        base.on_validation_start()
        self._apart.enter_context(self._session.unhurried(APART_S))

    def on_validation_end(self) -> None:
        base: Any = super()
        self._apart.close()
        base.on_validation_end()

    # ---- what ranks ask each other between two updates

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean", **_: Any) -> Any:
        if not isinstance(tensor, torch.Tensor):
            return tensor
        # Over the links of ranks, as gradients go: NCCL would take a GPU for each.
        total = tensor.detach().cpu().clone()
        if not self._ask(partial(dist.all_reduce, total)):
            return tensor
        mean = isinstance(reduce_op, str) and reduce_op.lower() in ("mean", "avg")
        return (total / self._session.world_size if mean else total).to(tensor.device)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        try:
            text = json.dumps(obj).encode()
        except (TypeError, ValueError):
            return obj  # nothing is pickled here; each rank has its own
        length = torch.tensor([len(text)])
        if not self._ask(partial(dist.broadcast, length, src=src)):
            return obj
        told = torch.zeros(int(length.item()), dtype=torch.uint8)
        if self.global_rank == src:
            told = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        if not self._ask(partial(dist.broadcast, told, src=src)):
            return obj
        return json.loads(told.numpy().tobytes())

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:  # noqa: A002
        votes = torch.tensor([int(decision)])
        if not self._ask(partial(dist.all_reduce, votes)):
            return decision
        return bool(votes.item() == self._session.world_size if all else votes.item() > 0)

    def _ask(self, collective: Callable[[], Any]) -> bool:
        """Run a collective that all ranks come to; False where there is none, or it failed.

        A rank that comes back does not take part in what the others do before its first update,
        so nobody asks before that; and within an update ranks play different numbers of batches.
        """
        if not self._played or self._batch is not None or self._session.world_size == 1:
            return False
        try:
            with self._session.unhurried(APART_S):
                collective()
        except RuntimeError:
            return False  # somebody died; the next update finds the world mended
        return True


class _Groups:
    """The Trainer's loader: one batch of each group of as many as there are seats."""

    def __init__(self, given: Any, session: Session, fit_loop: Any, seed: int) -> None:
        init_fn = getattr(given, "worker_init_fn", None)
        if isinstance(init_fn, partial) and init_fn.func is pl_worker_init_function:
            given.worker_init_fn = None  # it seeds by rank; here every batch has a key of its own
        self._given = given
        self._reading = reading_of(given, seed)
        self._session = session
        self._fit_loop = fit_loop
        self.handed: deque[list[Any]] = deque()
        """Whole groups that the Trainer has been given a batch of, and not begun with."""

    def __len__(self) -> int:
        return math.ceil(len(self._given) / self._session.seats)

    def __getattr__(self, name: str) -> Any:
        # What Lightning, or a module, looks for in a loader: its sampler, its data set.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._given, name)

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self._place()
        seats = self._session.seats
        self.handed.clear()
        self._reading.begin(epoch)
        for _ in range(done * seats):
            self._reading.leave_out()
        while True:
            group: list[Any] = []
            while len(group) < seats and (batch := self._reading.take()) is not END:
                group.append(batch)
            if not group:
                return
            self.handed.append(group)
            yield group[self._session.seat % len(group)]

    def _place(self) -> tuple[int, int]:
        """The epoch to read, and how many groups of it were trained on: as the loops were told."""
        epochs = self._fit_loop.epoch_progress.current
        done = self._fit_loop.epoch_loop.batch_progress.current.processed
        if not self._fit_loop.restarting or epochs.processed == epochs.ready:
            return epochs.processed, 0
        if hasattr(self._given, "__len__") and done >= len(self):
            return epochs.processed + 1, 0
        return epochs.processed, done

    def state_dict(self) -> dict[str, int]:
        """Nothing, but Lightning takes a loader that has it for one that can be resumed."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """See `state_dict`."""


class _Memory:
    """(Stateful) Where a Trainer stands between two updates: what its own checkpoints hold."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._stepped: int | None = None

    def state_dict(self) -> dict[str, Any]:
        loops = self._trainer.fit_loop.state_dict()
        # It is of the batch that comes next.
        loops["epoch_loop.batch_progress"] = {
            **loops["epoch_loop.batch_progress"],
            "is_last_batch": False,
        }
        callbacks = call._call_callbacks_state_dict(self._trainer)
        return {
            "loops": json.dumps(loops),
            "callbacks": {name: _to_json(name, state) for name, state in callbacks.items()},
            "stop": self._trainer.should_stop,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trainer = self._trainer
        trainer.fit_loop.load_state_dict(json.loads(state_dict["loops"]))
        self._stepped = trainer.fit_loop.epoch_loop._batches_that_stepped
        callbacks = {name: _from_json(text) for name, text in state_dict["callbacks"].items()}
        call._call_callbacks_load_state_dict(trainer, {"callbacks": callbacks})
        trainer.should_stop = state_dict["stop"]

    def recall(self) -> None:
        """Put the count back that Lightning guesses when it resumes."""
        if self._stepped is not None:
            self._trainer.fit_loop.epoch_loop._batches_that_stepped = self._stepped
            self._stepped = None


class _Logged:
    """What was logged and counted before an attempt, to be put back when it does not count."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._before = {id(m): (m, _state_of(m), m._update_count) for m in self._all()}

    def undo(self) -> None:
        for metric in self._all():
            _, state, count = self._before.get(id(metric), (metric, None, 0))
            if state is None:
                metric.reset()
                continue
            for name, value in state.items():
                setattr(metric, name, _copy(value))
            metric._update_count = count
            metric._computed = None

    def _all(self) -> Iterator[Any]:
        results = self._trainer._results
        if results is not None:
            yield from (m for m in results.values() if isinstance(m, Metric))
        yield from _metrics(self._trainer.lightning_module)


def _metrics(module: torch.nn.Module) -> Iterable[Any]:
    return (m for m in module.modules() if isinstance(m, Metric))


def _state_of(metric: Any) -> dict[str, Any]:
    return {name: _copy(getattr(metric, name)) for name in metric._defaults}


def _copy(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value.clone()


def _to_json(name: str, state: object) -> str:
    def other(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return {"$tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise UsageError(
            f"the state of the callback {name} has a {type(value).__name__} in it, which cannot be "
            "stored (nothing is ever pickled): convert it in state_dict()"
        )

    return json.dumps(state, default=other)


def _from_json(text: str) -> Any:
    def back(value: dict[str, Any]) -> Any:
        if "$tensor" not in value:
            return value
        return torch.tensor(value["$tensor"], dtype=getattr(torch, value["dtype"]))

    return json.loads(text, object_hook=back)


def _never() -> bool:
    return False


def _seed() -> int:
    """What `seed_everything` was given."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def _check(trainer: Any) -> None:
    """Raise UsageError when the trainer is set to something that cannot be had here."""
    module = trainer.lightning_module
    if not module.automatic_optimization:
        raise UsageError(
            "automatic_optimization = False: a training step that steps optimizers by itself cannot "
            "be played again. Write a plain loop with session.steps()"
        )
    if len(trainer.optimizers) != 1:
        raise UsageError(f"fit() trains with one optimizer, not {len(trainer.optimizers)}")
    if any(type(c).__name__ == "GradientAccumulationScheduler" for c in trainer.callbacks):
        raise UsageError(
            "GradientAccumulationScheduler: the global batch of a job has one size from its "
            "beginning to its end; set accumulate_grad_batches"
        )
    if any(
        type(c).__name__ in ("BatchSizeFinder", "LearningRateFinder") for c in trainer.callbacks
    ):
        raise UsageError("a finder trains before the training: find its value in a run of its own")
