"""Ledger: work and wait of every rank by step, for the event stream and what is drawn from it.

What it hands out now and then is the event "steps"::

    {"generation": 3,
     "steps": [41, 42],                      in order
     "seats": [0, 1, 2],
     "places": ["dp=0 pp=0", ...],           of those seats; "" where there is none
     "work": [[0.51, 0.50], ...],            by seat and step: seconds of forward and backward,
     "wait": [[0.02, 0.01], ...],            and seconds blocked in collectives; null: not told
     "seats_left_out": 0,                    that are not among `seats`
     "waits": [[1, 2, 0.25], ...],           seat 1 waited 0.25 s for seat 2, in these steps
     "waits_from": "collectives",            or "steps"
     "transfers": [[0, 0.002, 12], ...]}     group 0: median transfer of 12 collectives

`waits` are of the collectives that were sampled (`lateness`), of whatever group, where the last to
come was late by itself. Where there are none, of whole steps: the others waited for the one that
waited least, for as much longer as they waited longer. Either way no clock is told but each rank's
own. In a job of many ranks those are kept whose work differs most, and the longest waits.
"""

from typing import Final

from ftkit.core.ids import Generation, Seat, Step
from ftkit.detection.aligned import StepOf
from ftkit.detection.cusum import median
from ftkit.detection.lateness import Joined

#: Phases that are a member's own work for its slots. The optimizer's is not: it is the same
#: however many slots there are.
WORK: Final = ("forward", "backward")

SEATS_MAX: Final = 256
WAITS_MAX: Final = 256
_GROUPS_MAX: Final = 256
#: Numbers of work in one event, at most, but for a single step.
_CELLS_MAX: Final = 4096


class Ledger:
    """Takes whole steps; keeps what was not handed out yet, within bounds."""

    def __init__(self) -> None:
        self._generation: Generation | None = None
        self._steps: dict[Step, dict[Seat, tuple[float, float]]] = {}
        self._places: dict[Seat, str] = {}
        self._waits: dict[tuple[Seat, Seat], float] = {}
        self._sampled: dict[tuple[Seat, Seat], float] = {}
        self._transfers: dict[int, list[float]] = {}
        self._left_out = 0
        self._ready: list[dict[str, object]] = []

    def add(self, step: StepOf) -> None:
        """Enter one step."""
        some = next(iter(step.values()))
        if some.generation != self._generation:
            self._close()
            self._generation = some.generation
        cells = {
            one.seat: (sum(one.seconds.get(p, 0.0) for p in WORK), one.waited_s)
            for one in step.values()
        }
        self._enter_waits({seat: waited for seat, (_, waited) in cells.items()})
        if len(cells) > SEATS_MAX:
            usual = median([work for work, _ in cells.values()])
            kept = sorted(cells, key=lambda seat: -abs(cells[seat][0] - usual))[:SEATS_MAX]
            self._left_out = max(self._left_out, len(cells) - len(kept))
            cells = {seat: cells[seat] for seat in kept}
        self._steps[some.step] = cells
        self._places.update({one.seat: one.place for one in step.values() if one.seat in cells})
        if sum(len(row) for row in self._steps.values()) >= _CELLS_MAX:
            self._close()

    def join(self, joined: Joined) -> None:
        """Enter one collective."""
        self._transfers.setdefault(joined.group, []).append(joined.transfer_s)
        if joined.by_itself:
            for seat, spent in joined.waited_s.items():
                pair = (seat, joined.last)
                self._sampled[pair] = self._sampled.get(pair, 0.0) + spent

    def take(self, *, rest: bool = False) -> list[dict[str, object]]:
        """Fields of the events that are full; with `rest`, of what there is besides."""
        if rest:
            self._close()
        ready, self._ready = self._ready, []
        return ready

    def _enter_waits(self, waited: dict[Seat, float]) -> None:
        last = min(waited, key=lambda seat: (waited[seat], seat))
        for seat, spent in waited.items():
            if spent > waited[last]:
                pair = (seat, last)
                self._waits[pair] = self._waits.get(pair, 0.0) + spent - waited[last]

    def _close(self) -> None:
        if not self._steps:
            return
        steps = sorted(self._steps)
        seats = sorted({seat for row in self._steps.values() for seat in row})
        waits = self._sampled or ({} if self._transfers else self._waits)
        longest = sorted(waits.items(), key=lambda item: -item[1])[:WAITS_MAX]

        def column(seat: Seat, which: int) -> list[float | None]:
            rows = (self._steps[step].get(seat) for step in steps)
            return [None if cell is None else round(cell[which], 5) for cell in rows]

        self._ready.append(
            {
                "generation": self._generation,
                "steps": steps,
                "seats": seats,
                "places": [self._places.get(seat, "") for seat in seats],
                "work": [column(seat, 0) for seat in seats],
                "wait": [column(seat, 1) for seat in seats],
                "seats_left_out": self._left_out,
                "waits": [[i, j, round(spent, 5)] for (i, j), spent in longest],
                "waits_from": "collectives" if self._transfers else "steps",
                "transfers": [
                    [group, round(median(took), 6), len(took)]
                    for group, took in sorted(self._transfers.items())[:_GROUPS_MAX]
                ],
            }
        )
        self._steps, self._places, self._waits, self._left_out = {}, {}, {}, 0
        self._sampled, self._transfers = {}, {}
