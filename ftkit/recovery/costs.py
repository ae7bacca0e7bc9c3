"""Costs: what each way back to training takes on this job, measured or assumed.

Every number has a default, so that a decision can be made at the first failure; `measured`
says which of them are this job's own. All times in seconds, rates in bytes a second.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ftkit.recovery.clocks import speedup

#: A step at the full world where none was measured.
STEP_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """The cost model's inputs. Immutable; `with_measured` makes one that knows more."""

    world: int
    """Ranks of the full job."""
    step_s: Mapping[int, float] = field(default_factory=dict)
    """A step's time by world size, as far as measured."""
    slots: int | None = None
    """Slots of the global batch where they stay whole (`bitwise`); None: work divides evenly."""

    clock_gain: float = 1.0
    """Ranks' highest clock over the usual one, where it is raised while the world is smaller."""
    clock_bound: float = 0.8
    """Share of a step that scales with the clock."""

    detect_s: float = 1.0
    """From a fault to the halt."""
    regroup_s: float = 0.2
    """From the halt until survivors train, transfers apart."""
    grow_s: float = 0.2
    """How long the others stand still when newcomers are let in."""
    respawn_s: float = 5.0
    """From the order to start a process until it can be let in; others may train meanwhile."""
    replacement_s: float = 600.0
    """Until another node stands in for a lost one."""
    spare_s: float = 0.2
    """To promote a hot spare: process up, model built, connected."""
    restart_s: float = 30.0
    """To end and start all processes, up to their first step, loading apart."""

    lost_bytes: float = 0.0
    """State that a lost rank held alone; 0 where others hold replicas of it all."""
    state_bytes: float = 0.0
    """State one rank loads as it starts anew."""
    memory_bps: float = 1e9
    """A rank's rate of reading from memory: peers and arenas."""
    parity_bps: float = 5e8
    """The rate at which lost parts are computed anew."""
    disk_bps: float = 2e8
    """A rank's rate of loading a checkpoint."""

    snapshot_block_s: float = 0.001
    """Training held up by one snapshot."""
    parity_block_s: float = 0.002
    """Training held up by one parity round, off its path as it is."""
    parity_round_s: float = 1.0
    """From the begin of a parity round until it counts."""
    checkpoint_block_s: float = 0.05
    """Training held up by one checkpoint, written in the background."""
    checkpoint_write_s: float = 60.0
    """From the order for a checkpoint until it is committed."""
    beyond_memory: float = 0.1
    """Share of failures after which memory alone does not hold the state."""
    beyond_parity: float = 0.01
    """Share after which parity cannot rebuild it either."""

    stale_lost_steps: float = 10.0
    """Iterations that a stale shard sets training back, in effect. Measured on a toy: 2 to 11."""
    checkfree_lost_steps: float = 60.0
    """The same of a reconstruction from neighbours: 26 to 75 there."""

    measured: frozenset[str] = frozenset()
    """Which of these were measured; the others are assumed."""

    def __post_init__(self) -> None:
        if self.world < 1:
            raise ValueError(f"a job has ranks, got world={self.world}")
        for each in fields(self):
            value = getattr(self, each.name)
            numbers = value.values() if each.name == "step_s" else [value]
            for number in numbers:
                if isinstance(number, int | float) and not (number >= 0 and math.isfinite(number)):
                    raise ValueError(f"{each.name} is {number}: costs are finite and not negative")
        for share in ("beyond_memory", "beyond_parity"):
            if getattr(self, share) > 1:
                raise ValueError(
                    f"{share} is {getattr(self, share)}: a share of failures is at most 1"
                )
        if self.clock_gain < 1 or self.clock_bound > 1:
            raise ValueError(
                f"clocks are raised, and a share of a step is bound by them: clock_gain is "
                f"{self.clock_gain}, clock_bound {self.clock_bound}"
            )
        if any(s <= 0 for s in self.step_s.values()):
            raise ValueError(f"a step takes time, got {dict(self.step_s)}")
        if min(self.memory_bps, self.parity_bps, self.disk_bps) <= 0:
            raise ValueError("bytes move at some rate: memory_bps, parity_bps, disk_bps are > 0")

    def step_time(self, world: int) -> float:
        """A step's seconds with `world` ranks: measured, else scaled from the nearest measured.

        Scaled by the slots of the busiest rank where slots stay whole, else by 1 / world; and where
        clocks are raised in worlds smaller than the job, by that, too.
        """
        if world < 1:
            return math.inf
        if not self.step_s:
            return STEP_S * self._relative(world) / self._relative(self.world)
        nearest = min(self.step_s, key=lambda w: (abs(w - world), -w))
        return self.step_s[nearest] * self._relative(world) / self._relative(nearest)

    def kept(self, world: int) -> float:
        """The share of the full job's throughput that `world` ranks keep, at most 1."""
        return min(1.0, self.step_time(self.world) / self.step_time(world)) if world > 0 else 0.0

    def with_measured(self, **values: Any) -> "Costs":
        """These costs with `values` measured; None and empty ones change nothing."""
        known = {k: v for k, v in values.items() if v is not None and v != {}}
        return replace(self, **known, measured=self.measured | known.keys())

    def to_json(self) -> dict[str, object]:
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        return told | {
            "step_s": {str(w): s for w, s in sorted(self.step_s.items())},
            "measured": sorted(self.measured),
        }

    def _relative(self, world: int) -> float:
        """A step's time, but for a factor. What was measured in a smaller world had clocks raised."""
        faster = speedup(self.clock_gain, self.clock_bound) if world < self.world else 1.0
        return self._share(world) / faster

    def _share(self, world: int) -> float:
        return math.ceil(self.slots / world) if self.slots else 1 / world
