"""The sharded job of the drills at an even pace, with meshes that are dear to build or newcomers that are late.

A step takes `STEP_S` in a world of any size, so what a smaller world costs is what it takes to change it. Two ranks
are to be lost, the second at `SECOND_LOSS`: before that the job waits a little for the first one's replacement.
"""

import os
import sys
import time
from typing import Any

from tests.drills.sharded import begin, build, steps

#: A variable: for so many seconds a rank builds the mesh of each world but its first.
BUILD = "TEST_BUILD_S"
STEP_S = 0.04
SECOND_LOSS = 40
HOLD, HOLD_S = range(SECOND_LOSS - 10, SECOND_LOSS), 0.4


def main(until: int) -> None:
    session = begin()
    worlds: list[int] = []

    def slowly(mesh: Any) -> Any:
        worlds.append(mesh.size())
        if len(worlds) > 1:
            time.sleep(float(os.environ.get(BUILD, "0")))
        return build(mesh)

    session.protect(build=slowly, device="cpu")
    for step in steps(session, until):
        waits = session.world_size < session.seats and step.index in HOLD
        time.sleep(HOLD_S if waits else STEP_S)


if __name__ == "__main__":
    main(int(sys.argv[1]))
