"""Ends: copies of a pipeline's first and last layer, on the ranks beside theirs (CheckFree+).

Nobody learns an embedding's part by changing places with it, so it is copied: its rank sends it at the
begin of every step, and the rank beside captures it with its own state. A copy is therefore that of the
step before. It travels while micro-batches do, and takes its place as the optimizer steps, when no
capture reads it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ftkit.checkpoint.walk import dtype_name, named_tensors
from ftkit.collectives.group import Group
from ftkit.core.errors import UsageError
from ftkit.session.mean_stage import copied_name, layer_of


class Ends:
    """What this rank sends of them, and what it keeps. The training thread's."""

    def __init__(
        self,
        group: Group,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        bounds: Sequence[int],
        numbers: Mapping[int, int],
    ) -> None:
        """Tell the ranks beside what is coming. Blocks until all ranks have.

        Args:
          group: of this world.
          model: this rank's stage.
          optimizer: of that; copies take their places as it steps.
          bounds: how the layers are cut.
          numbers: the layer of each tensor, by its id; none where the slots are not played by layers.

        Raises:
          UsageError: a tensor's name does not tell its layer, by which it would be found after a loss.
          GenerationAborted: the world ended meanwhile.
        """
        rank, size = group.rank, group.size
        groups = {id(p): i for i, g in enumerate(optimizer.param_groups) for p in g["params"]}
        keepers = {0: (0, 1), bounds[-1] - 1: (size - 1, size - 2)} if size > 1 else {}
        mine = dict[int, list[tuple[str, torch.Tensor]]]()
        for name, tensor, _ in named_tensors("model", model):
            found = layer_of(name)
            if numbers and (found is None or numbers.get(id(tensor)) != found[1]):
                raise UsageError(
                    f"{name} is {_of_layer(numbers.get(id(tensor)))} given to session.swapped(): the "
                    "first number in a name must be its layer's, or a lost stage could not be made of "
                    "those beside it. Name them so, as in ModuleDict({'0': embedding, '1': block, ...})"
                )
            if found is not None and keepers.get(found[1], (-1, -1))[0] == rank:
                copied = copied_name(name, groups.get(id(tensor), 0))
                mine.setdefault(found[1], []).append((copied, tensor))
        told = {
            layer: [(name, dtype_name(t), list(t.shape)) for name, t in tensors]
            for layer, tensors in mine.items()
        }
        heard = [json.loads(one) for one in group.exchange(json.dumps(told).encode()).wait()]
        self._out = [
            (keepers[layer][1], _tag(layer, i), tensor)
            for layer, tensors in mine.items()
            for i, (_, tensor) in enumerate(tensors)
        ]
        self.kept: dict[str, torch.Tensor] = {}
        """Copies, by name; captured with this rank's state."""
        self._in = list[tuple[int, int, torch.Tensor, torch.Tensor]]()
        for layer, (owner, keeper) in keepers.items():
            if keeper != rank:
                continue
            for i, (name, dtype, shape) in enumerate(heard[owner].get(str(layer), ())):
                kept = self.kept[name] = torch.zeros(shape, dtype=getattr(torch, dtype))
                self._in.append((owner, _tag(layer, i), torch.zeros_like(kept), kept))
        optimizer.register_step_post_hook(self._take)

    def travel(self) -> list[dist.Work]:
        """Begin to send and to receive: to be waited for before the step's end. Does not block."""
        works = [dist.isend(t.detach().cpu().contiguous(), to, tag=tag) for to, tag, t in self._out]
        works += [dist.irecv(into, of, tag=tag) for of, tag, into, _ in self._in]
        return [work for work in works if work is not None]

    def settle(self) -> None:
        """Have copies of what was built or loaded just now, before anything captures them. Blocks.

        Raises:
          GenerationAborted: the world ended meanwhile.
        """
        for work in self.travel():
            work.wait()
        self._take()

    @torch.no_grad()
    def _take(self, *_hook: Any) -> None:
        for _, _, fresh, kept in self._in:
            kept.copy_(fresh)


def _of_layer(number: int | None) -> str:
    return "of no layer" if number is None else f"of layer {number} as"


def _tag(layer: int, tensor: int) -> int:
    """Of a message with a tensor of the first layer, or of the last; below `SwappedSchedule`'s."""
    return 2 * tensor + (layer > 0)
