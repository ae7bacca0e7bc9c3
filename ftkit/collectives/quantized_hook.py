"""QuantizedHook: DDP reduces its buckets quantized.

ddp = DistributedDataParallel(net)
ddp.register_comm_hook(None, QuantizedHook(dist.group.WORLD, codec="int8"))
"""

from typing import Any

import torch
import torch.distributed as dist

from ftkit.collectives.process_group import FtkitProcessGroup
from ftkit.collectives.quantized import ErrorFeedback, all_reduce_quantized
from ftkit.collectives.work import FtkitWork
from ftkit.core.errors import UsageError


class QuantizedHook:
    """A communication hook: the mean of the gradients, in place, the same bits everywhere.

    With `feedback` it keeps one float32 copy of the gradients. DDP cuts its buckets anew after
    the first step; what was owed in a bucket of another size is dropped then.
    """

    def __init__(self, group: Any, *, codec: str = "int8", feedback: bool = False) -> None:
        """Reduce over `group`, which must be of the backend "ftkit".

        Raises:
          UsageError: it is of another backend.
        """
        if not isinstance(group, FtkitProcessGroup):
            raise UsageError(
                "QuantizedHook reduces over a process group of the backend "
                f'"ftkit", not {type(group).__name__}: init_process_group("ftkit")'
            )
        self._group = group
        self._codec = codec
        self._feedback: dict[int, ErrorFeedback] | None = {} if feedback else None
        # DDP names a hook in its log by this.
        self.__qualname__ = f"QuantizedHook({codec})"
        self.__name__ = "quantized"

    def __call__(
        self,
        state: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        """(DDP) Start the reduction of one bucket."""
        grads = bucket.buffer()
        feedback = None
        if self._feedback is not None:
            feedback = self._feedback.setdefault(bucket.index(), ErrorFeedback())
        handle = all_reduce_quantized(
            self._group,
            grads,
            codec=self._codec,
            op="avg",
            feedback=feedback,
            timeout_s=self._group.timeout_s,
        )
        return FtkitWork(handle, grads, self._abort).get_future()

    def _abort(self, reason: str) -> None:
        group = self._group.group
        group.abort(group.world.generation, reason)
