"""RayMetrics: an agent's metrics, where Ray shows its own.

Ray's metrics endpoint, its dashboard and its Prometheus service discovery know what an actor's
process hands to `ray.util.metrics`. Ray puts `ray_` before a name and `_total` behind a counter's, so
`ftkit_rank_steps_total` is `ray_ftkit_rank_steps_total` there, with the same labels and Ray's own.
"""

import logging
import threading
from collections.abc import Callable, Mapping

from ray.util.metrics import Counter, Gauge

from ftkit.launch.metrics import CATALOGUE, Labels

logger = logging.getLogger(__name__)

#: Between two looks; Ray itself passes metrics on every ten seconds.
PUBLISH_S = 2.0

Values = Mapping[tuple[str, Labels], float]


class RayMetrics:
    """Passes an agent's metrics on to Ray, on a thread of its own, which ends with the process."""

    def __init__(self, values: Callable[[], Values]) -> None:
        """Begin. `values` is called on the thread (`Metrics.values`)."""
        self._values = values
        self._known: dict[str, Counter | Gauge] = {}
        self._counted: dict[tuple[str, Labels], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ftkit-ray-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Pass on what there is, and end."""
        self._stop.set()
        self._thread.join(PUBLISH_S)

    def _run(self) -> None:
        over = False
        while not over:
            over = self._stop.wait(PUBLISH_S)
            try:
                self._publish(self._values())
            except Exception as error:  # noqa: BLE001  # whatever Ray says, the job goes on
                logger.warning("Ray takes no metrics any more: %r", error)
                return

    def _publish(self, values: Values) -> None:
        for (name, labels), value in values.items():
            metric = self._known.get(name)
            if metric is None:
                kind, what = CATALOGUE[name]
                make = Counter if kind == "counter" else Gauge
                keys = tuple(key for key, _ in labels)
                metric = self._known[name] = make(name.removesuffix("_total"), what, keys)
            if isinstance(metric, Gauge):
                metric.set(value, dict(labels))
            elif (more := value - self._counted.get((name, labels), 0.0)) > 0:
                metric.inc(more, dict(labels))
                self._counted[name, labels] = value
