"""A rank of `ray_nodes`: `benchmarks.training`, whose steps take as long as a file says they shall."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import training

#: Names a file with seconds in it, to sleep before each step.
PACE = "BENCH_PACE"


class Paced(training.Noted):
    """A session whose steps are slow while little is to be seen, and quick at the end."""

    def steps(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The session's steps, each begun when the file says so."""
        for step in super().steps(*args, **kwargs):
            yield step
            time.sleep(float(Path(os.environ[PACE]).read_text()))


if __name__ == "__main__":
    training.Noted = Paced  # type: ignore[misc]
    training.main()
