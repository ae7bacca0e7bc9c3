"""FaultPlan: faults on purpose, as data. What a drill injects, and where in a step.

A rank finds its faults in the environment and injects them into itself, so that "in the
optimizer of step 7" means exactly that; faults of other processes are injected by the drill.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum

from ftkit.core.errors import UsageError

VARIABLE = "FTKIT_DRILL"

#: The fault that strikes no rank.
KILL_COORDINATOR = "kill-coordinator"


class Kind(StrEnum):
    """What happens."""

    KILL = "kill"
    """SIGKILL."""
    STOP = "stop"
    """SIGSTOP: the process is there and does nothing."""
    RAISE = "raise"
    """An exception in the user's code."""
    HANG = "hang"
    """The training thread sleeps for ever; the other threads, the heartbeat's too, live."""
    EXIT = "exit"
    """The process ends at once with exit code 1, as from native code: nothing is said."""
    SEGFAULT = "segfault"
    """It reads memory that is not its own."""
    ABORT = "abort"
    """It calls abort(), as a failed check in native code does."""
    OOM = "oom"
    """It allocates until its address space is used up (RLIMIT_AS)."""
    PAUSE = "pause"
    """SIGSTOP, and SIGCONT `lasts_s` later: nobody may lose its place for a second of it."""
    GIL_HANG = "gil-hang"
    """The training thread is in native code that never gives the interpreter back."""
    SPIN = "spin"
    """The training thread runs round in a loop of Python that does not end."""
    DEADLOCK = "deadlock"
    """The training thread waits for a lock that it holds itself."""
    DESYNC_SKIP = "desync-skip"
    """It leaves a collective out that the others call."""
    DESYNC_SIZE = "desync-size"
    """It calls a collective with fewer elements than the others."""
    DESYNC_OP = "desync-op"
    """It calls another collective than the others."""


#: A rank that calls other collectives than its peers: strikes where a bucket is reduced.
DESYNCS = frozenset({Kind.DESYNC_SKIP, Kind.DESYNC_SIZE, Kind.DESYNC_OP})


class Point(StrEnum):
    """Where in a step it happens."""

    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    """As bucket `bucket` becomes ready, before its reduction is issued."""
    ALL_REDUCE = "all-reduce"
    """While the reduction of bucket `bucket` is under way."""
    IN_COLLECTIVE = "in-collective"
    """At byte `byte` of what this rank moves for the reduction of bucket `bucket`: inside a
    frame, a header or a memory read. For faults by signal."""
    VOTE = "vote"
    """The ballot is on its way; the result is not known to this rank."""
    COMMIT = "commit"
    """The vote has passed; nothing has changed yet."""
    OPTIMIZER = "optimizer"
    """While the optimizer changes parameters."""
    CAPTURE = "capture"
    """While the snapshot of the step is being made."""
    RECOVERY = "recovery"
    """While this rank enters a new world after another's fault; `step` counts from that."""
    MIGRATION = "migration"
    """While layers of a pipeline move: as it begins (bucket 0), while their state travels (1), while
    gradients follow (2), at the switch (3). Most jobs never come there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFault:
    """One fault of one rank."""

    kind: Kind
    point: Point
    seat: int
    member: int
    """The incarnation meant, so that the process that replaces it is spared."""
    step: int
    """It strikes at this step, or at the first one after it."""
    bucket: int = 0
    delay_s: float = 0.0
    """For points that last: how far into it."""
    byte: int = 0
    """For `IN_COLLECTIVE`: which byte, modulo those of the bucket."""
    lasts_s: float = 1.0
    """For `PAUSE`: how long."""


def to_environ(faults: list[PlannedFault]) -> dict[str, str]:
    """The variable that tells ranks of their faults."""
    return {VARIABLE: json.dumps([asdict(f) for f in faults])} if faults else {}


def from_environ(environ: Mapping[str, str], *, member: int) -> list[PlannedFault]:
    """The faults planned for `member`. Raises UsageError when they cannot be read."""
    text = environ.get(VARIABLE)
    if not text:
        return []
    try:
        faults = [
            PlannedFault(**{**f, "kind": Kind(f["kind"]), "point": Point(f["point"])})
            for f in json.loads(text)
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{VARIABLE} holds no faults: {error}") from error
    return [f for f in faults if f.member == member]
