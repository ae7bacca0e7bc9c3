"""Session: what runs inside a rank, and joins the rooms for the training loop.

* `start`: `init`, how a process becomes a rank
* `session`: `Session`, what the user holds; `loop` and `step`: the step loop and its transaction
* `worlds`: how a rank gets into a world; `membership`: where it stands, under one lock
* `feed`: batches slot by slot; `loader`: a loader's batches, from any one on; `stateful`: at its place
* `buffers`: what forward passes change; `snapshots`: state kept
* `schedulers`: noticed where they are stepped too late
* `parts`, `control`: the connections to the rest of the job; `inject`: drills; `warm_up`
"""

from ftkit.session.session import Session
from ftkit.session.start import init

__all__ = ["Session", "init"]
