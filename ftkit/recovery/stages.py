"""Stages: which layers each rank of a pipeline holds in a new world, agreed by all its ranks. Pure.

Every rank tells what it knows: seconds a layer takes, as it measured or heard them, and which layers
it held. From the same answers all compute the same cut. A full world is cut by what the script says
its layers cost, so a job that has lost and regained a stage stands where it began; a smaller one by
what was measured. A world that is cut anew while it trains has chosen its cut already (`target`).
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from ftkit.core.errors import ProtocolError
from ftkit.recovery.recut import Cut, Layer, Stage, recut


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one rank knows as it enters a world."""

    seconds: Mapping[int, float] = field(default_factory=dict)
    """Of a micro-batch, forward and backward, by layer."""
    held: range = range(0)
    """The layers it had in the world before."""
    target: tuple[int, ...] = ()
    """Bounds that all ranks have agreed on before; empty where they are to be found."""
    raised: tuple[int, ...] = ()
    """Layers that learn faster, since they were averaged from others."""

    def pack(self) -> bytes:
        told = {
            "seconds": dict(self.seconds),
            "held": [self.held.start, self.held.stop],
            "target": self.target,
            "raised": self.raised,
        }
        return json.dumps(told).encode()

    @classmethod
    def unpack(cls, data: bytes) -> "Told":
        """Read what `pack` wrote. Raises ProtocolError on anything else."""
        try:
            told = json.loads(data)
            return cls(
                seconds={int(k): float(v) for k, v in told["seconds"].items()},
                held=range(*map(int, told["held"])),
                target=tuple(map(int, told["target"])),
                raised=tuple(map(int, told["raised"])),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ProtocolError(f"not what a rank tells of its layers: {data[:80]!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """The cut of a world, and why it is that one."""

    cut: Cut
    reason: str
    moved: int
    """Layers that somebody holds now and did not hold before."""


def agree(costs: Sequence[float], told: Sequence[Told], *, seats: int) -> Agreed:
    """The cut of a world with one stage on each rank that tells.

    Args:
      costs: of each layer, as the script believes them, in any unit.
      told: by all ranks, in order.
      seats: ranks that the job was started with.

    Raises:
      ValueError: there are fewer layers than ranks, or a layer costs nothing.
    """
    if any(not cost > 0 for cost in costs):
        raise ValueError(f"every layer costs something, got {list(costs)}")
    known = heard(told, len(costs))
    target = told[0].target
    if target and all(t.target == target for t in told):
        if len(target) != len(told) + 1 or target[-1] != len(costs):
            raise ValueError(f"{list(target)} does not cut {len(costs)} layers for {len(told)}")
        pace = max(sum(known.get(i, costs[i]) for i in range(a, b)) for a, b in pairwise(target))
        return Agreed(
            cut=Cut(bounds=target, slowest_s=pace),
            reason="by measured seconds, while it trained",
            moved=_moved(target, told),
        )
    full = len(told) >= seats
    if full or not known:
        seconds, reason = list(costs), "by the costs given"
        if full:
            reason += ", as every seat is taken"
    else:
        # Of a layer that nobody has measured we know what the script believes, in its unit.
        unit = sum(known.values()) / sum(costs[i] for i in known)
        seconds = [known.get(i, cost * unit) for i, cost in enumerate(costs)]
        reason = f"by measured seconds of {len(known)} of {len(costs)} layers, over {len(told)}"
        reason += f" of {seats} stages"
    layers = [Layer(seconds=s, state_bytes=1) for s in seconds]
    held = [t.held for t in told]
    cut = recut(layers, [Stage()] * len(told), held=held if any(map(len, held)) else None)
    return Agreed(cut=cut, reason=reason, moved=_moved(cut.bounds, told))


def _moved(bounds: Sequence[int], told: Sequence[Told]) -> int:
    return sum(
        layer not in one.held
        for one, (first, end) in zip(told, pairwise(bounds), strict=True)
        for layer in range(first, end)
    )


def heard(told: Sequence[Told], layers: int) -> dict[int, float]:
    """Seconds by layer, the median of what ranks tell; layers that nobody knows are missing."""
    known = dict[int, float]()
    for layer in range(layers):
        every = [t.seconds[layer] for t in told if t.seconds.get(layer, 0.0) > 0]
        if every:
            known[layer] = statistics.median(every)
    return known
