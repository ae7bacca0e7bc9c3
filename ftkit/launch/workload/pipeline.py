"""The training job as a pipeline: the same text and blocks, one stage on each rank, 1F1B.

Torch's own schedule runs it. Layer 0 is the embedding, the last one the output; each draws its first
values from a seed of its own, so that it does not matter which rank builds it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from ftkit.launch.workload.gpt import BYTES, Block, GPTConfig, next_byte_loss

#: What an embedding and an output cost, against a block, by how many multiplications they take.
_EMBED, _OUTPUT = 0.1, 0.4


class Embedding(nn.Module):
    """Bytes and their places as features: int64 (B, T) to float32 (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(BYTES, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """As the class says; newly allocated."""
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        mixed: Tensor = self.drop(self.token(tokens_BT) + self.position(places_T))
        return mixed


def layer_of(config: GPTConfig, index: int, *, seed: int) -> nn.Module:
    """Layer `index` of depth + 2, with the same first values wherever it is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 1000 + index)
        if index == 0:
            return Embedding(config)
        if index <= config.depth:
            return Block(config)
        return nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, BYTES, bias=False))


class Stage(nn.Module):
    """The layers of one stage, named as in the whole model; `step` plays them in order of slots."""

    def __init__(self, config: GPTConfig, held: range, *, seed: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): layer_of(config, i, seed=seed) for i in held})
        self._step: Any = None
        self._slot = 0

    def play(self, step: Any) -> None:
        """The next passes are those of this step, slot 0 first."""
        self._step, self._slot = step, 0

    def forward(self, hidden: Tensor) -> Tensor:
        """The next slot: int64 (B, T) or float32 (B, T, C), to (B, T, C) or logits (B, T, 256)."""
        slot, self._slot = self._slot, self._slot + 1
        for index, layer in self.layers.items():
            hidden = self._step.layer(int(index), layer, hidden, slot=slot)
        return hidden


class Pipeline:
    """What `build` makes and the step loop runs. One for each world."""

    def __init__(
        self, session: Any, config: GPTConfig, *, slots: int, slot_size: int, seed: int
    ) -> None:
        """This rank's stage of a pipeline over all ranks of the session's world."""
        costs = [_EMBED, *[1.0] * config.depth, _OUTPUT]
        bounds = session.cut(costs)
        self._rank, size = session.rank, session.world_size
        self.stage = Stage(config, range(bounds[self._rank], bounds[self._rank + 1]), seed=seed)
        self.first, self.last = self._rank == 0, self._rank == size - 1
        tokens = torch.zeros(slot_size, config.context, dtype=torch.int64)
        # Whether gradients pass between stages, torch tells from these.
        hidden = torch.zeros(slot_size, config.context, config.width, requires_grad=True)
        logits = torch.zeros(slot_size, config.context, BYTES, requires_grad=True)
        stage = PipelineStage(
            self.stage,
            self._rank,
            size,
            torch.device("cpu"),
            input_args=(tokens if self.first else hidden,),
            output_args=(logits if self.last else hidden,),
        )
        self._schedule = Schedule1F1B(stage, slots, loss_fn=next_byte_loss, scale_grads=False)

    def run(self, step: Any, batches: Sequence[Any]) -> None:
        """Forward and backward of every slot; the last stage records the losses."""
        self.stage.play(step)
        inputs = [torch.cat([x for x, _ in batches])] if self.first else []
        losses: list[Tensor] = []
        more: dict[str, Any] = {}
        if self.last:
            more = {"target": torch.cat([y for _, y in batches]), "losses": losses}
        self._schedule.step(*inputs, **more, return_outputs=False)
        for slot, loss in enumerate(losses):
            step.record(loss, slot=slot)


def builder(
    session: Any,
    config: GPTConfig,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
    *,
    slots: int,
    slot_size: int,
    seed: int,
    keep: Callable[[Pipeline], None],
) -> Callable[[Any], tuple[nn.Module, torch.optim.Optimizer]]:
    """A `build` for `protect(..., stages=True)`; `keep` is given the pipeline of each world."""

    def build(mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        pipeline = Pipeline(session, config, slots=slots, slot_size=slot_size, seed=seed)
        session.role(mesh)
        keep(pipeline)
        return pipeline.stage, optimizer_of(pipeline.stage)

    return build
