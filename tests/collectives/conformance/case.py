"""A case: one call of torch.distributed, made on two groups from the same inputs, compared.

A case is a function `(side) -> tensors`, where a `Side` is one group and the means to make
inputs and calls. Its outcome is what came out, bit for bit, or which error it raised, and
whether the call raised it or the wait. All cases of a run go through the same pair of groups
in the same processes, one after another, so hundreds of them cost what their calls cost.
"""

# torch's stubs know neither what a default group is nor its private helpers.
# mypy: allow-untyped-calls

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from . import inputs


class Side:
    """One of the two groups, with everything a case needs to call it."""

    def __init__(self, name: str, group: Any) -> None:
        self.name = name
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.place = "call"
        self.translated = False

    def make(self, dtype, shape, layout="plain", salt=0, kind="whole"):
        """This rank's tensor; the same values on both sides."""
        return self._as_asked(inputs.make(dtype, shape, 1000 * salt + self.rank, kind), layout)

    def blank(self, dtype, shape, layout="plain"):
        return self._as_asked(torch.zeros(shape).to(dtype), layout)

    def _as_asked(self, values, layout):
        if self.name != "gloo":
            return inputs.laid_out(values, layout)
        # gloo takes the memory behind a tensor with gaps for the tensor; its answers to
        # contiguous ones are what ours must be for every layout.
        return values.to(inputs.WIDER[values.dtype]) if self.translated else values

    def call(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Make the call asynchronously, then wait: an error is one of the call or the wait."""
        self.place = "call"
        work = function(*args, group=self.group, async_op=True, **more)
        self.place = "wait"
        if work is not None:
            work.wait()
        self.place = "after"
        return work


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Side], Any]
    ulps: int = 0
    """How far floats may be apart, in units of the last place of the largest result."""
    translated: bool = False
    """gloo lacks the dtype: it is asked with a wider one, and its answer is narrowed."""


@dataclass(frozen=True)
class Outcome:
    """What a case did on one side: `values`, or an error at a place."""

    values: tuple[Any, ...] = ()
    error: str = ""
    place: str = ""
    message: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"{self.error} at {self.place}: {self.message}"
        return str(self.values)[:300]


@dataclass(frozen=True)
class Difference:
    case: str
    gloo: str
    ours: str
    kind: str
    """`ours only` raises, `gloo only` raises, `errors` differ, `values` differ."""


def outcome(case: Case, side: Side) -> Outcome:
    side.place, side.translated = "call", case.translated
    try:
        values = case.run(side)
    except Exception as error:  # noqa: BLE001 - which one is the matter
        kinds = [k.__name__ for k in type(error).__mro__ if k.__module__ == "builtins"]
        return Outcome(error=kinds[0], place=side.place, message=str(error).split("\n")[0][:160])
    return Outcome(values=tuple(flat(values)))


def compare(case: Case, theirs: Outcome, ours: Outcome) -> Difference | None:
    """None when both sides did the same."""

    def differ(kind: str) -> Difference:
        return Difference(case.name, str(theirs), str(ours), kind)

    if theirs.error and ours.error:
        # We may find out at the call what gloo finds out on its thread.
        same = theirs.error == ours.error and ours.place in (theirs.place, "call")
        return None if same else differ("errors")
    if ours.error:
        return differ("ours only")
    if theirs.error:
        return differ("gloo only")
    alike = len(theirs.values) == len(ours.values) and all(
        equal(narrowed(a, b, case), b, case.ulps)
        for a, b in zip(theirs.values, ours.values, strict=True)
    )
    return None if alike else differ("values")


def narrowed(a: Any, b: Any, case: Case) -> Any:
    return a.to(b.dtype) if case.translated and isinstance(a, torch.Tensor) else a


def equal(a: Any, b: Any, ulps: int) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(a == b)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if not a.numel():
        return True
    if not ulps:
        return bits(a) == bits(b)
    scale = max(a.abs().max().item(), 1.0) * torch.finfo(a.dtype).eps * ulps
    return bool(torch.allclose(a.double(), b.double(), rtol=0, atol=scale, equal_nan=True))


def bits(tensor: torch.Tensor) -> bytes:
    memory = tensor.contiguous().reshape(-1).view(torch.uint8)
    if tensor.dtype == torch.bool:
        memory = memory.ne(0)  # gloo adds True and True to 2
    return memory.numpy().tobytes()


def flat(values: Any) -> list[Any]:
    """Tensors and plain values out of nested lists."""
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in flat(value)]
    return [values]


def differences(cases: Iterable[Case], gloo: Side, ours: Side) -> tuple[int, list[Difference]]:
    """Run all cases on both sides: how many there were, and where they differ."""
    count, found = 0, []
    for case in cases:
        count += 1
        difference = compare(case, outcome(case, gloo), outcome(case, ours))
        if difference is not None:
            found.append(difference)
    return count, found
