"""Spikes: a loss that leaps, with gradients that leap too. Pure.

Both are judged on a log scale against the median and the median absolute deviation of the last
`WINDOW` steps, so that neither a slow fall nor a single leap moves what is usual. A leap of the
loss alone is a hard batch, and one of the gradients alone is the optimizer's business; both
together, in two of three steps, are a training that is about to be lost.

Small batches have gradients whose norm varies by half of itself, so that even a tenfold one is
within six deviations: there, three times the usual norm is enough beside such a loss.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass

WINDOW = 200
#: Before so many steps nothing is usual yet.
STEPS_MIN = 20
LOSS_Z, NORM_Z = 8.0, 6.0
NORM_TIMES = 3.0
#: So many of the last `RECENT` steps.
TIMES, RECENT = 2, 3
#: Deviations are never taken for smaller than this, on the log scale: half a per cent.
SIGMA_MIN = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """Two of three steps were far from what is usual."""

    step: int
    loss: float
    usual_loss: float
    loss_z: float
    norm_z: float


class Spikes:
    """The history of one job's losses. Owned by one thread."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._recent: deque[bool] = deque(maxlen=RECENT)

    def update(self, step: int, loss: float, norm: float) -> Spike | None:
        """Take in a step; what it is part of, if it is.

        Args:
          step: its number.
          loss: mean over its slots. At or below 0 it is not judged: there is no logarithm.
          norm: of its gradients.
        """
        if not (loss > 0 and norm > 0 and math.isfinite(loss) and math.isfinite(norm)):
            return None  # what is not finite is said elsewhere, with whose it is
        found = None
        if len(self._losses) >= STEPS_MIN:
            loss_z, norm_z = _z(math.log(loss), self._losses), _z(math.log(norm), self._norms)
            times = math.log(norm) - statistics.median(self._norms)
            self._recent.append(
                loss_z > LOSS_Z and (norm_z > NORM_Z or times > math.log(NORM_TIMES))
            )
            if self._recent[-1] and sum(self._recent) >= TIMES:
                usual = math.exp(statistics.median(self._losses))
                found = Spike(step=step, loss=loss, usual_loss=usual, loss_z=loss_z, norm_z=norm_z)
        self._losses.append(math.log(loss))
        self._norms.append(math.log(norm))
        return found


def _z(value: float, history: deque[float]) -> float:
    """Standard deviations above the median, with the deviation of a normal distribution's MAD."""
    usual = statistics.median(history)
    sigma = 1.4826 * statistics.median(abs(x - usual) for x in history)
    return (value - usual) / max(sigma, SIGMA_MIN)
