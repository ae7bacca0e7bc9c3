"""Session: what runs inside a rank, and joins the rooms for the training loop.

* `session`: `init`, `Session`, the step loop
* `step`: the transaction a user writes as ``with step:``
* `feed`: batches of a data set or a loader, slot by slot
* `membership`: where this rank stands in the job, under one lock
* `control`: the connection to this node's agent
"""

from ftkit.session.session import Session, init

__all__ = ["Session", "init"]
