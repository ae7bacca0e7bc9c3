"""Corrupt: a rank falsifies its own numbers as its drill has planned. Nothing without one."""

from collections.abc import Mapping, Sequence

import torch

from ftkit.core.corruption_plan import PlannedCorruption, Target
from ftkit.core.trace import Trace

#: Integers as wide as the floats whose bits are flipped.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Corrupter:
    """Strikes when the training thread passes the planned place. One per step loop."""

    def __init__(self, plan: Sequence[PlannedCorruption], trace: Trace) -> None:
        """Strike as `plan` says; each stroke is an event."""
        self._plan = list(plan)
        self._trace = trace
        self._attempts: dict[tuple[int, int], int] = {}
        """By entry of the plan and step: attempts in which it has struck."""
        self._struck: set[int] = set()
        """Entries that are through in this attempt."""
        self._scaled: list[PlannedCorruption] = []
        """What this attempt's losses are multiplied with."""

    @property
    def armed(self) -> bool:
        """Whether anything is planned at all."""
        return bool(self._plan)

    def begin(self, step: int) -> None:
        """A new attempt at `step`."""
        self._scaled = []
        self._struck = {
            i
            for i, one in enumerate(self._plan)
            if not self._first(i, step) <= step < self._first(i, step) + one.steps
            or self._attempts.get((i, step), 0) >= one.attempts
        }

    def state(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """The forward pass of `step` is about to begin, from this state (names as in snapshots)."""
        for i, one in self._due(Target.WEIGHT, Target.OPTIMIZER):
            mine = sorted(
                name
                for name, tensor in tensors.items()
                if name.startswith("optimizer") == (one.target is Target.OPTIMIZER)
                and tensor.is_floating_point()
                and tensor.numel() > 1
            )
            if not mine:
                continue  # the optimizer has no state before its first step
            name = mine[int(one.place * len(mine))]
            self._falsify(one, tensors[name])
            self._note(i, one, step, tensor=name)

    def slot(self, step: int, slot: int) -> None:
        """A slot begins: all of an attempt are alike."""
        for i, one in self._due(Target.LOSS):
            self._scaled.append(one)
            self._note(i, one, step, slot=slot)

    def gradients(
        self, step: int, slot: int, bucket: int, values: torch.Tensor, *, last: bool
    ) -> None:
        """The gradients of a slot in a bucket are complete, and nobody else has seen them."""
        for i, one in self._due(Target.GRADIENT):
            if bucket >= one.bucket or last:
                self._falsify(one, values)
                self._note(i, one, step, slot=slot, bucket=bucket)
        for one in self._scaled:
            values.mul_(one.factor)

    def loss(self, value: float) -> float:
        """The loss of the present slot, as it is to be recorded."""
        for one in self._scaled:
            value *= one.factor
        return value

    def _first(self, i: int, step: int) -> int:
        """The first step at which an entry strikes: the one planned, or the first one seen after."""
        known = [at for entry, at in self._attempts if entry == i]
        return min([*known, max(step, self._plan[i].step)])

    def _due(self, *targets: Target) -> list[tuple[int, PlannedCorruption]]:
        return [
            (i, one)
            for i, one in enumerate(self._plan)
            if one.target in targets and i not in self._struck
        ]

    def _falsify(self, one: PlannedCorruption, tensor: torch.Tensor) -> None:
        flat = tensor.detach().view(-1)
        at = int(one.place * flat.numel())
        # The next that is not 0: there the exponent's bits are those of any value.
        used = flat[at:].nonzero()
        at += int(used[0]) if used.numel() else 0
        with torch.no_grad():
            if one.bit is None:
                flat[at] = float("nan")
                return
            bits = flat.view(_INTEGERS[flat.element_size()])
            width = 8 * flat.element_size()
            # From the top, so that a bit of the exponent is one in any format.
            bit = width - 1 - min(31 - min(one.bit, 31), width - 1)
            top = bit == width - 1
            bits[at] ^= -(1 << bit) if top else 1 << bit

    def _note(self, i: int, one: PlannedCorruption, step: int, **where: object) -> None:
        self._struck.add(i)
        self._attempts[i, step] = self._attempts.get((i, step), 0) + 1
        first = sum(self._attempts[key] for key in self._attempts if key[0] == i) == 1
        kind = "drill" if first else "drill-again"
        self._trace.event(
            kind, fault=one.name, phase=one.target.value, step=step, bit=one.bit, **where
        )
