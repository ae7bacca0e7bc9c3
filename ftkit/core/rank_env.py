"""RankEnv: what an agent tells a rank through its environment, in one place.

The agent sets these beside torchrun's variables; `ftkit.init` reads them. A process without
them is alone: a world of one that needs nobody.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ftkit.core.errors import UsageError

_PREFIX = "FTKIT_"
_CONVERT: Mapping[str, Callable[[str], Any]] = {
    "seat": int,
    "member": int,
    "node": int,
    "seats": int,
    "local_seat": int,
    "max_stall_s": float,
    "checkpoint_every": int,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnv:
    """Everything a rank needs to join its job."""

    job: str
    seat: int
    member: int
    node: int
    seats: int
    """Seats of the whole job."""
    agent: str
    """Path of the agent's Unix socket."""
    secret: str
    """The job's secret in hexadecimal."""
    host: str
    """Address on which this rank's data plane listens."""
    run_dir: str
    shm_dir: str
    """Where this node's arenas and status board live."""
    local_seat: int
    """This seat's row on the node's status board."""
    max_stall_s: float
    checkpoint_dir: str
    """Where to load from when no arena has the step; empty for nowhere."""
    checkpoint_every: int
    """Snapshots of every so many steps are marked as due to go to disk; 0 for none."""

    def to_environ(self) -> dict[str, str]:
        """The variables to set."""
        return {_PREFIX + f.name.upper(): str(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "RankEnv | None":
        """What the agent set, or None outside a job.

        Raises:
          UsageError: some of the variables are there and others are missing or malformed.
        """
        found = {f.name: environ.get(_PREFIX + f.name.upper()) for f in fields(cls)}
        if found["agent"] is None:
            return None
        if missing := [_PREFIX + name.upper() for name, value in found.items() if value is None]:
            raise UsageError(f"the environment lacks {missing}; start this with `ftkit run`")
        values = {name: value for name, value in found.items() if value is not None}
        try:
            return cls(**{name: _CONVERT.get(name, str)(value) for name, value in values.items()})
        except ValueError as error:
            raise UsageError(f"the environment of this rank is malformed: {error}") from error
