"""Accelerate: `Accelerator`, to be imported from here, whose `steps` are those of the session.

Accelerate leaves the loop to the script, so the loop is written as with ftkit alone; what was
prepared is what is protected. Each rank's Accelerator believes that it is alone.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from ftkit.core.errors import UsageError
from ftkit.core.ids import Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.integrations.alone import alone, local_index, require
from ftkit.session import init
from ftkit.session.feed import LoaderFeed
from ftkit.session.step import Step

require("accelerate", "accelerate")

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import parse_flag_from_env, send_to_device


class Accelerator(accelerate.Accelerator):
    """`accelerate.Accelerator` of a rank of the job; started by `ftkit run`, or alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Join the job. Arguments as Accelerate's.

        Raises:
          UsageError: something had made a process group, or a plugin shards the model.
        """
        # Accelerate's own word for it: an argument, which may come second, or a variable.
        cpu = bool(kwargs.get("cpu")) or parse_flag_from_env("ACCELERATE_USE_CPU")
        with alone(cpu=cpu):
            super().__init__(*args, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.num_processes > 1 or str(self.distributed_type) != "DistributedType.NO":
            raise UsageError(
                f"Accelerate works as {self.distributed_type} with {self.num_processes} processes: "
                "make the Accelerator of ftkit.integrations.accelerate before anything else of "
                "Accelerate's, without plugins that shard the model"
            )
        self._session = init()
        me: Any = self
        self._batches_of_rank: int = me.gradient_accumulation_steps
        # The session divides by the slots; `backward` must not do so again.
        self.gradient_accumulation_steps = 1
        be(self._session.seat, local_index(self._session))

    def steps(
        self, loader: Iterable[Any], *, until: int, slots: int | None = None, seed: int = 0
    ) -> Iterator[Step]:
        """The step loop (`Session.steps`) over what was prepared, which is protected.

        Args:
          loader: prepared or not; a slot is one of its batches, on this rank's device.
          until: steps to commit in all.
          slots: batches of the global batch; `gradient_accumulation_steps` for each seat if not
            given.
          seed: decides the order of batches and every slot's random numbers.

        Raises:
          UsageError: nothing was prepared, or called twice.
        """
        if not self._models or not self._optimizers:
            raise UsageError("prepare the model and the optimizer before accelerator.steps()")
        session = self._session
        session.protect(
            model=[self.unwrap_model(model) for model in self._models],
            optimizer=[optimizer.optimizer for optimizer in self._optimizers],
            scheduler=[scheduler.scheduler for scheduler in self._schedulers] or None,
            **({"scaler": self.scaler} if self.scaler is not None else {}),
            **{f"registered{i}": thing for i, thing in enumerate(self._custom_objects)},
        )
        count = slots or self._batches_of_rank * session.seats
        feed = _Placed(
            getattr(loader, "base_dataloader", loader),
            self.device,
            slots=count,
            seed=seed,
            tell=session.trace.event,
        )
        return self._follow(session.steps(feed, slots=count, until=until, seed=seed))

    def _follow(self, steps: Iterator[Step]) -> Iterator[Step]:
        """Let the first of the present world be the main process."""
        for step in steps:
            be(self._session.rank, local_index(self._session))
            yield step


class _Placed(LoaderFeed):
    """(Feed) Batches on the device."""

    def __init__(self, loader: Iterable[Any], device: Any, **given: Any) -> None:
        super().__init__(loader, **given)
        self._device = device

    def batch(self, step: StepNumber, slot: Slot) -> Any:
        return send_to_device(super().batch(step, slot), self._device)


def be(rank: int, local: int) -> None:
    """Let Accelerate take this process for `rank` of the job, and `local` of its node."""
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        if state:
            state["process_index"], state["local_process_index"] = rank, local
