"""A job as its steps tell of it: ranks with roles, noise from a seed, and who is slow when."""

import random
from collections.abc import Callable, Iterator
from typing import Any

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.observations import WorldChanged
from ftkit.detection.signals import StepSeen
from ftkit.detection.step_detector import PaceConfig, StepDetector
from tests.detection.scene import world

FIRST = 100
"""The member on seat 0."""


class Pace:
    """Plays steps of a job into a detector."""

    def __init__(
        self,
        size: int = 8,
        *,
        stages: int = 1,
        noise: float = 0.005,
        seed: int = 0,
        config: PaceConfig | None = None,
        slots: Callable[[int], int] = lambda _: 2,
        step_s: float = 1.0,
    ) -> None:
        """Steps end every `step_s`; what ranks say of their durations is in units of that."""
        self.step_s = step_s
        self.size, self.stages, self.noise = size, stages, noise
        self.rng = random.Random(seed)
        self.slots = slots
        self.detector = StepDetector(config or PaceConfig())
        self.generation = 1
        self.step = 0
        self.now = 0.0
        self.detector.ingest(WorldChanged(world=world(size), at=0.0))

    def seen(self, seat: int, work: float, **changes) -> StepSeen:
        """What the member on `seat` says of the step; `work` is for one slot."""
        stage = seat % self.stages
        values: dict[str, Any] = {
            "member": MemberId(FIRST + seat),
            "seat": Seat(seat),
            "generation": Generation(self.generation),
            "step": Step(self.step),
            "at": self.now,
            "seconds": {
                "data": 0.01 * self.step_s,
                "forward": work * self.slots(seat) * self.step_s,
            },
            "waited_s": 0.1 * self.step_s,
            "slots": self.slots(seat),
            "role": f"pp={stage}" if self.stages > 1 else "",
            "place": f"dp={seat // self.stages} pp={stage}",
        }
        return StepSeen(**(values | changes))

    def play(
        self,
        steps: int,
        factor: Callable[[int, int], float] = lambda seat, step: 1.0,
        *,
        change: Callable[[int, int], dict[str, Any]] = lambda seat, step: {},
        missing: Callable[[int, int], bool] = lambda seat, step: False,
    ) -> Iterator[list[Verdict]]:
        """Play steps; yields what stands after each. `factor` of a seat in a step of this call."""
        for n in range(steps):
            self.step += 1
            self.now += self.step_s
            for seat in range(self.size):
                if missing(seat, n):
                    continue
                noise = self.rng.lognormvariate(0.0, self.noise)
                self.detector.ingest(self.seen(seat, factor(seat, n) * noise, **change(seat, n)))
            yield self.detector.tick(self.now)

    def last(self, *args, **kwargs) -> list[Verdict]:
        """What stands after playing."""
        verdicts: list[Verdict] = []
        for standing in self.play(*args, **kwargs):
            verdicts = standing
        return verdicts

    def ever(self, *args, **kwargs) -> set[tuple[Fault, int]]:
        """Every (fault, seat) that was said while playing."""
        return {(v.fault, int(v.seat)) for standing in self.play(*args, **kwargs) for v in standing}


def slow(*seats: int, by: float = 1.5, since: int = 0) -> Callable[[int, int], float]:
    """These seats are slower, from a step of the call on."""
    return lambda seat, step: by if seat in seats and step >= since else 1.0
