"""SwappedSchedule: plays a pipeline whose outer stages change places on every other slot (CheckFree+).

In which order is `recovery.swapped`'s; this sends what one rank's layers made to whose are next, and
gradients back. Sends never wait, a receive waits for what its rank sends by the same list.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftkit.core.errors import UsageError
from ftkit.recovery.swapped import Segment, orders, segments
from ftkit.session.layers import Layers
from ftkit.session.step import Step

#: Tags below are the copies' of the first layer and the last (`Ends`).
_FIRST_TAG = 1 << 20


class SwappedSchedule:
    """One rank's part in one world's pipeline. Made by `Session.swapped`, in `build`."""

    def __init__(
        self,
        layers: Layers,
        modules: Mapping[int, nn.Module],
        *,
        hidden: Tensor,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        rank: int,
        slots: int,
    ) -> None:
        """Work out the order; as `Session.swapped`."""
        assert layers.swap is not None, "the layers are cut"
        bounds, swap = layers.bounds, layers.swap
        held = range(bounds[rank], bounds[rank + 1])
        if sorted(modules) != list(held):
            raise UsageError(
                f"session.swapped() is given layers {sorted(modules)}, and this rank holds "
                f"{list(held)}: key them by their numbers in the whole model"
            )
        self._layers, self._modules = layers, dict(modules)
        self._numbers = layers.numbers = {
            id(t): i for i, m in modules.items() for t in (*m.parameters(), *m.buffers())
        }
        self._hidden, self._loss_fn = hidden.detach(), loss_fn
        routes = [segments(swap.route(bounds[-1], odd=odd), bounds) for odd in (False, True)]
        self._routes: list[Sequence[Segment]] = [routes[slot % 2] for slot in range(slots)]
        self._hops = max(map(len, routes))
        ranks = len(bounds) - 1
        self._order = orders(self._routes, ranks=ranks, depth=self._hops)[rank]

    def play(self, step: Step, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        """Run all slots forward and backward; between `step.slots()` and the optimizer. Blocks.

        Args:
          step: the open one.
          inputs: of the first layer, by slot; only its rank reads them.
          targets: by slot, for `loss_fn`; only the last layer's rank reads them.

        Returns:
          On the last layer's rank the loss of each slot, detached, for `step.record`; else nothing.

        Raises:
          UsageError: the pipeline was built anew since, a slot lacks what this rank reads, or a
            layer's output is not shaped as `hidden` is.
          JobFault: the job failed; leave it to `with step:`.
        """
        assert self._layers.ends is not None, "built"
        if self._layers.numbers is not self._numbers:
            raise UsageError(
                "this schedule is that of a world that is over: play the one that session.swapped() "
                "gave in the last build(mesh)"
            )
        slots, last_layer = len(self._routes), self._layers.bounds[-1] - 1
        for given, layer, what in ((inputs, 0, "inputs"), (targets, last_layer, "targets")):
            if layer in self._modules and len(given) != slots:
                raise UsageError(
                    f"play() is given {len(given)} {what}, and a step has {slots} slots"
                )
        sent = self._layers.ends.travel()
        under_way = dict[tuple[int, int], tuple[Tensor, Tensor]]()
        losses = dict[int, Tensor]()
        for slot, hop, backward in self._order:
            route = self._routes[slot]
            last = hop + 1 == len(route)
            if backward:
                x, y = under_way.pop((slot, hop))
                if last:
                    y.backward()  # type: ignore[no-untyped-call]
                else:
                    came = self._receive(route[hop + 1].rank, slot, hop, backward=True)
                    if y.requires_grad:
                        y.backward(came)  # type: ignore[no-untyped-call]
                if hop:
                    back = torch.zeros_like(x) if x.grad is None else x.grad
                    sent.append(self._send(back, route[hop - 1].rank, slot, hop - 1, backward=True))
                continue
            if hop:
                x = self._receive(route[hop - 1].rank, slot, hop, backward=False).requires_grad_()
            else:
                x = inputs[slot]
            y = x
            for index in route[hop].layers:
                y = step.layer(index, self._modules[index], y, slot=slot)
            if last:
                y = self._loss_fn(y, targets[slot])
                losses[slot] = y.detach()
            else:
                self._check(y, route[hop].layers[-1])
                to = route[hop + 1].rank
                sent.append(self._send(y.detach(), to, slot, hop + 1, backward=False))
            under_way[slot, hop] = x, y
        for work in sent:
            work.wait()
        self._layers.swapped = True
        return [losses[slot] for slot in sorted(losses)]

    def _check(self, made: Tensor, layer: int) -> None:
        if (made.shape, made.dtype) != (self._hidden.shape, self._hidden.dtype):
            raise UsageError(
                f"layer {layer} gives {list(made.shape)} of {made.dtype}, and hidden= is "
                f"{list(self._hidden.shape)} of {self._hidden.dtype}: layers that change places give "
                "what they take"
            )

    def _send(self, tensor: Tensor, to: int, slot: int, hop: int, *, backward: bool) -> dist.Work:
        work = dist.isend(tensor.contiguous(), to, tag=self._tag(slot, hop, backward))
        assert work is not None, "this rank is in the group"
        return work

    def _receive(self, of: int, slot: int, hop: int, *, backward: bool) -> Tensor:
        made = torch.empty_like(self._hidden)
        dist.recv(made, of, tag=self._tag(slot, hop, backward))
        return made

    def _tag(self, slot: int, hop: int, backward: bool) -> int:
        """Of what segment `hop` of a slot is to receive: unlike any other of the step's."""
        return _FIRST_TAG + 2 * (slot * self._hops + hop) + backward
