"""Hugging Face's Trainer: `Trainer` and `TrainingArguments`, to be imported from here instead.

Each rank's Trainer believes that it is alone and accumulates the micro-batches of all ranks:
what it counts, scales and logs is then about the whole global batch, whatever the world. Of
these micro-batches it plays those of its slots, all of them within the last call of
`training_step` of an update, as often as it takes until the update counts (`updates`). The
loop, the optimizer, schedulers, callbacks, checkpoints and evaluation are the Trainer's own.

For other trainers (trl's `SFTTrainer`) mix the parts in: ``class Mine(FaultTolerant,
SFTTrainer)``, ``class MineConfig(Alone, SFTConfig)``.
"""

import copy
import copyreg
import json
import time
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from ftkit.core.errors import UsageError
from ftkit.integrations.alone import alone, local_index, local_rank, own_gpu, require
from ftkit.integrations.updates import Updates
from ftkit.session import Session, init
from ftkit.session.loader import END, reading_of

require("huggingface", "transformers", "accelerate")

import transformers  # what it needs is looked for first
from transformers.trainer_callback import ExportableState, ProgressCallback
from transformers.trainer_utils import seed_worker

from ftkit.integrations.accelerate import be

#: How long one evaluation or one save may keep a rank from training before it counts as hung.
APART_S = 3600.0

#: Of the log's history, so much is kept for a rank that comes back; the oldest goes first.
HISTORY_BYTES_MAX = 400_000

#: The parts of the Trainer's loop that `FaultTolerant` takes hold of.
_LOOP = (
    "_inner_training_loop",
    "_init_training_state",
    "_prepare_for_training",
    "_run_epoch",
    "get_batch_samples",
    "training_step",
    "_save_checkpoint",
    "_save_rng_state",
    "_load_rng_state",
    "_finalize_training",
)


class Alone:
    """(mixin for arguments) Sets the devices up for a process that is alone, and joins the job."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        base: Any = super()
        me: Any = self
        with alone(cpu=me.use_cpu):
            device: torch.device = base._setup_devices
        session = init()
        # Until it is in a world of several, a rank that comes back has no number but its seat.
        be(session.seat, local_rank())
        if device.type == "cuda":
            device = own_gpu() or device
            torch.cuda.set_device(device)
            me._n_gpu = 1
        me.distributed_state.device = device
        return device

    def __reduce_ex__(self, protocol: Any) -> Any:
        # training_args.bin can be read where there is no ftkit.
        plain = next(c for c in type(self).__mro__[1:] if not issubclass(c, Alone))
        return copyreg._reconstructor, (plain, object, None), dict(vars(self))  # type: ignore[attr-defined]


class FaultTolerant:
    """(mixin for trainers) Plays every update as a step of the session."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's.

        Raises:
          UsageError: an option that cannot be had; the message says why.
        """
        super().__init__(*args, **kwargs)
        self._training: _Training | None = None
        _check(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; once in a process.

        Raises:
          UsageError: called again.
        """
        base: Any = super()
        me: Any = self
        if self._training is not None:
            raise UsageError("a job is one training: trainer.train() may be called once")
        self._training = _Training(me, init())
        mine = me.args.gradient_accumulation_steps
        me.args.gradient_accumulation_steps = self._training.slots
        try:
            return base.train(*args, **kwargs)
        finally:
            me.args.gradient_accumulation_steps = mine

    # ---- the beginning

    def get_train_dataloader(self) -> Any:
        base: Any = super()
        if self._training is None:
            return base.get_train_dataloader()
        return self._training.loader_of(base.get_train_dataloader())

    def num_examples(self, dataloader: Any) -> int:
        base: Any = super()
        given = dataloader.given if isinstance(dataloader, _Loader) else dataloader
        count: int = base.num_examples(given)
        return count

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        base: Any = super()
        if trial is not None:
            raise UsageError("a hyperparameter search trains many times, a job once")
        epoch, batches = base._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        assert self._training is not None, "train() makes it"
        # Early, for the state to be there when the job is joined; given back when asked for.
        self._training.prepared = base._prepare_for_training(
            max_steps, self._training.loader, resume_from_checkpoint
        )
        return self._training.join(max_steps, num_train_epochs, epoch, batches)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        assert self._training is not None, "train() makes it"
        return self._training.prepared

    # ---- the loop

    def _run_epoch(self, **kwargs: Any) -> None:
        base: Any = super()
        assert self._training is not None, "train() makes it"
        if self._training.begin_epoch(kwargs["epoch"]) and kwargs["resume_from_checkpoint"] is None:
            # As after a checkpoint, the loop is to begin in the middle of the epoch.
            kwargs["resume_from_checkpoint"] = "a snapshot"
        base._run_epoch(**kwargs)
        self._training.end_epoch()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        base: Any = super()
        assert self._training is not None, "train() makes it"
        self._training.close()
        batches, items = base.get_batch_samples(epoch_iterator, num_batches, device)
        self._training.hold(batches)
        return batches, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        base: Any = super()
        me: Any = self
        assert self._training is not None, "train() makes it"
        if not me.accelerator.sync_gradients:
            return torch.zeros((), device=me.args.device)  # all are played with the last

        def play(batch: Any) -> torch.Tensor:
            loss: torch.Tensor = base.training_step(model, copy.copy(batch), num_items_in_batch)
            return loss

        return self._training.play(play)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        base: Any = super()
        assert self._training is not None, "train() makes it"
        started = self._training.end(start_time)
        return base._finalize_training(trial, num_train_samples, started)

    # ---- what ranks do apart

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        base: Any = super()
        with init().unhurried(APART_S):
            return base.evaluation_loop(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        base: Any = super()
        if skip_scheduler and self._training is not None and self._training.restored:
            return {}  # before the first update (eval_on_start): the others did it long ago
        return base._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        base: Any = super()
        with init().unhurried(APART_S):
            base._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        base: Any = super()
        me: Any = self
        if me.args.should_save:  # those who are alone all write the same file
            base._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Nothing is drawn from what it would load: every slot has a key of its own."""


class TrainingArguments(Alone, transformers.TrainingArguments):
    """`transformers.TrainingArguments` of a rank of the job."""


class Trainer(FaultTolerant, transformers.Trainer):
    """`transformers.Trainer` whose ranks may die; started by `ftkit run`, or alone."""


class _Training:
    """One call of `train`: what stands between a Trainer and the session's steps."""

    def __init__(self, trainer: Any, session: Session) -> None:
        self._trainer = trainer
        self._session = session
        self.slots: int = trainer.args.gradient_accumulation_steps * session.seats
        seed = trainer.args.data_seed
        self._seed: int = trainer.args.seed if seed is None else seed
        self.loader: _Loader | None = None
        self.prepared: Any = None
        self._memory = _Memory(trainer)
        self._updates: Updates | None = None
        self._batches: Sequence[Any] = ()
        self._trains = True

    @property
    def restored(self) -> bool:
        """Whether this rank came into a job that had begun."""
        return self._memory.loaded

    def loader_of(self, given: Any) -> "_Loader":
        """What the loop is to read: the batches of `given`, alike on every rank."""
        self.loader = _Loader(given, self._seed)
        return self.loader

    def join(self, max_steps: int, epochs: int, epoch: int, batches: int) -> tuple[int, int]:
        """Enter the job. Returns the epoch and the batch of it that the loop begins with."""
        trainer, memory = self._trainer, self._memory
        assert self.loader is not None, "the loop asks for it first"
        scaler = getattr(trainer.accelerator, "scaler", None)
        optimizer = trainer.optimizer
        self._session.protect(
            model=trainer.model,
            optimizer=getattr(optimizer, "optimizer", optimizer),
            scheduler=trainer.lr_scheduler,
            trainer=memory,
            **({"scaler": scaler} if scaler is not None else {}),
        )
        memory.epoch, memory.batches = epoch, batches
        self._updates = Updates(
            self._session, slots=self.slots, until=max_steps, seed=self._seed, mean=False
        )
        self._updates.begin()
        self._follow_world()
        over = trainer.control.should_training_stop or trainer.state.global_step >= max_steps
        if memory.loaded and over:
            return epochs, 0
        self.loader.leave_out = memory.batches
        return memory.epoch, memory.batches

    def begin_epoch(self, epoch: int) -> bool:
        """The loop begins `epoch`. Returns whether it is to pass over batches of it."""
        assert self.loader is not None, "the loop asks for it first"
        self._memory.recall()
        # Where the loop begins in the middle it wraps the loader, and tells only the wrapper.
        self.loader.set_epoch(epoch)
        leaves_out = self._trains = self.loader.leave_out > 0
        if not leaves_out:
            self._memory.epoch, self._memory.batches = epoch, 0
        return leaves_out

    def end_epoch(self) -> None:
        """The loop ends an epoch.

        Raises:
          UsageError: it was too short for an update, and the loop would begin it again for ever.
        """
        read = self._memory.batches
        if read and not self._trains:
            raise UsageError(
                f"the iterable data set ended after {read} batches, and an update takes {self.slots} "
                "(gradient_accumulation_steps for each rank): accumulate less, make batches smaller, "
                "start fewer ranks, or let it go on for longer"
            )

    def close(self) -> None:
        """The update before is over, with all that the loop did after it."""
        assert self._updates is not None, "joined"
        self._updates.close()

    def hold(self, batches: Sequence[Any]) -> None:
        """These are the batches of the update that comes."""
        self._batches = batches
        self._memory.batches += len(batches)

    def play(self, play: Any) -> torch.Tensor:
        """Play the update until it counts. Returns its loss."""
        assert self._updates is not None, "joined"
        trainer = self._trainer
        self._trains = True
        loss = self._updates.play(self._batches, play)
        self._follow_world()
        if loss is None:
            # Lost with a rank: like the Trainer's own filter of NaN, take the average so far.
            since = trainer.state.global_step - trainer._globalstep_last_logged
            average: torch.Tensor = trainer._tr_loss / (1 + since)
            return average
        return torch.tensor(loss, device=trainer.args.device)

    def end(self, started: float) -> float:
        """The loop is over. Returns when the training began, `started` for this process."""
        assert self._updates is not None, "joined"
        self._memory.recall()
        self._updates.close()
        if self._trainer.args.load_best_model_at_end:
            self._wait_for_saves()
        self._updates.end()
        return started - self._memory.before_s

    def _wait_for_saves(self) -> None:
        """The first rank may still write what all are about to read."""
        try:
            torch.distributed.barrier()
        except RuntimeError:
            pass  # somebody died at the very end: nobody waits for it, or for what it wrote

    def _follow_world(self) -> None:
        """Who saves and logs is the first of the present world."""
        trainer, session = self._trainer, self._session
        state = trainer.args.distributed_state
        now = session.rank, local_index(session)
        if (state.process_index, state.local_process_index) == now:
            return
        be(*now)
        was = trainer.state.is_world_process_zero
        trainer.state.is_world_process_zero = trainer.is_world_process_zero()
        trainer.state.is_local_process_zero = trainer.is_local_process_zero()
        if trainer.state.is_world_process_zero and not was:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.training_bar is None:
                    callback.on_train_begin(trainer.args, trainer.state, trainer.control)


class _Memory:
    """(Stateful) Where a Trainer stands between two updates: what its own checkpoints hold, and sums."""

    _SUMS = ("_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")
    _MORE = ("current_flos", "_initial_num_input_tokens_seen")
    _OF_THIS_PROCESS = ("is_local_process_zero", "is_world_process_zero", "stateful_callbacks")

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.epoch = 0
        self.batches = 0
        """Of the epoch, that the updates so far have taken."""
        self.before_s = 0.0
        """How long the job had trained when this process came to it."""
        self._began = time.monotonic()
        self._recall: dict[str, Any] = {}
        self.loaded = False
        self._history = ""
        self._history_items = -1

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        state = {k: v for k, v in vars(trainer.state).items() if k not in self._OF_THIS_PROCESS}
        log = state.pop("log_history")
        if len(log) != self._history_items:
            self._history_items = len(log)
            self._history = _tail(log)
        sums = {k: getattr(trainer, k, None) for k in self._SUMS + self._MORE}
        sums["_tr_loss"] = float(getattr(trainer, "_tr_loss", 0.0))
        return {
            "state": json.dumps(state),
            "history": self._history,
            "callbacks": json.dumps([callback.state() for callback in self._exportable()]),
            "sums": json.dumps(sums),
            "place": [self.epoch, self.batches],
            "stop": trainer.control.should_training_stop,
            "seconds": time.monotonic() - self._began + self.before_s,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trainer = self._trainer
        for name, value in json.loads(state_dict["state"]).items():
            setattr(trainer.state, name, value)
        trainer.state.log_history = json.loads(state_dict["history"])
        kept = json.loads(state_dict["callbacks"])
        for callback, state in zip(self._exportable(), kept, strict=True):
            for name, value in state.get("attributes", {}).items():
                setattr(callback, name, value)
        self._recall = json.loads(state_dict["sums"])
        self.epoch, self.batches = state_dict["place"]
        trainer.control.should_training_stop = state_dict["stop"]
        self.before_s = state_dict["seconds"]
        self.loaded = True

    def recall(self) -> None:
        """Put the sums back, which the Trainer clears after the job was joined."""
        trainer, sums = self._trainer, self._recall
        self._recall = {}
        for name, value in sums.items():
            if name == "_tr_loss":
                trainer._tr_loss = torch.tensor(value, device=trainer.args.device)
            elif value is not None:
                setattr(trainer, name, value)

    def _exportable(self) -> Iterator[Any]:
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                yield callback


def _tail(log: Sequence[Any]) -> str:
    """The newest entries of a log as a JSON list."""
    kept: list[str] = []
    size = 0
    for entry in reversed(log):
        text = json.dumps(entry)
        size += len(text) + 2
        if size > HISTORY_BYTES_MAX:
            break
        kept.append(text)
    return f"[{', '.join(reversed(kept))}]"


class _Row(IterableDataset[Any]):
    """The batches of one epoch after another; those to be left out are None, and not loaded."""

    def __init__(self, given: Any, seed: int) -> None:
        self._given = given
        loader = getattr(given, "base_dataloader", given)
        init_fn = getattr(loader, "worker_init_fn", None)
        if isinstance(init_fn, partial) and init_fn.func is seed_worker:
            # It seeds by rank; here every batch has a key of its own, on any rank.
            loader.worker_init_fn = None
        self._reading = reading_of(loader, seed)
        self.epoch = 0
        self.leave_out = 0

    def __iter__(self) -> Iterator[Any]:
        if hasattr(self._given, "set_epoch"):
            self._given.set_epoch(self.epoch)
        self._reading.begin(self.epoch)
        count, self.leave_out = self.leave_out, 0
        for _ in range(count):
            self._reading.leave_out()
            yield None
        while (batch := self._reading.take()) is not END:
            yield batch


class _Loader(DataLoader[Any]):
    """What the Trainer's loop reads from: `given`, with an order that all ranks share."""

    def __init__(self, given: Any, seed: int) -> None:
        self.given = given
        self._row = _Row(given, seed)
        super().__init__(self._row, batch_size=None, collate_fn=_as_it_is)

    def __len__(self) -> int:
        return len(self.given)

    def set_epoch(self, epoch: int) -> None:
        self._row.epoch = epoch

    @property
    def leave_out(self) -> int:
        """Batches that the next iteration begins with and does not load."""
        return self._row.leave_out

    @leave_out.setter
    def leave_out(self, count: int) -> None:
        self._row.leave_out = count


def _as_it_is(batch: Any) -> Any:
    return batch


def _check(trainer: Any) -> None:
    """Raise UsageError when the trainer is set to something that cannot be had here."""
    args = trainer.args
    reasons = {
        "gives it transformers.TrainingArguments, which made a process group of its own: import "
        "TrainingArguments from ftkit.integrations.huggingface too": not isinstance(args, Alone),
        "shards its model (FSDP, DeepSpeed, tensor or context parallelism): its ranks hold what "
        "no other has, and could not take over from each other": (
            trainer.is_fsdp_enabled
            or trainer.is_deepspeed_enabled
            or trainer.is_distributed_loading_by_transformers
            or getattr(args, "parallelism_config", None) is not None
        ),
        "sets auto_find_batch_size: a slot of the global batch has one size for the whole job": (
            args.auto_find_batch_size
        ),
        "sets ignore_data_skip: a rank that comes back has to pass over what was trained on": (
            args.ignore_data_skip
        ),
        f"uses the optimizer {args.optim!s}, which steps during backward: there is no moment at "
        "which the ranks could agree before it": (
            "lomo" in str(args.optim) or "layerwise" in str(args.optim)
        ),
        f"accumulates {args.gradient_accumulation_steps} micro-batches "
        "(gradient_accumulation_steps): an update takes one at least": (
            args.gradient_accumulation_steps < 1
        ),
        "sets max_steps=0: give how many updates to train for, or -1 to go by num_train_epochs": (
            args.max_steps == 0
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"ftkit cannot train what {reason}")
    lacking = [name for name in _LOOP if not hasattr(transformers.Trainer, name)]
    if lacking:
        raise UsageError(
            f"transformers {transformers.__version__} has no Trainer.{lacking[0]}, which ftkit "
            "takes hold of: install a version that `ftkit[huggingface]` allows"
        )
    changed = [
        name
        for name in ("_inner_training_loop", "_run_epoch")
        if getattr(type(trainer), name)
        is not getattr(FaultTolerant, name, getattr(transformers.Trainer, name))
    ]
    if changed:
        raise UsageError(f"{type(trainer).__name__} has a {changed[0]} of its own")
