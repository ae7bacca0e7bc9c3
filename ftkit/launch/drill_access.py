"""DrillAccess: how whoever runs a job reaches it from outside to drill it, and nobody else does.

`ftkit run` leaves a file in the run's folder that this user alone can read. It holds a key that is
made of the job's secret, and not the secret: agents let in who holds it as a visitor, who can ask
how a node stands and for a drill, and can be neither rank nor coordinator.
"""

import hashlib
import hmac
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ftkit.core.errors import UsageError
from ftkit.launch.config import JobConfig
from ftkit.launch.whole_file import write_whole

NAME = "drill-access.json"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillAccess:
    """What a drill programme has to know of a job before it asks."""

    job: str
    key: str
    """In hexadecimal; empty: the job was started with --no-drills."""
    engine: str
    seats: int
    """Ranks of a full world."""
    nodes: int
    parity: str
    max_stall_s: float


def drill_key(secret: bytes) -> bytes:
    """The key to the drills of the job with this secret, which cannot be found from it."""
    return hmac.new(secret, b"ftkit drills", hashlib.sha256).digest()


def write_access(config: JobConfig, engine: str, secret: str) -> None:
    """Leave the file, readable by this user alone. UsageError: it cannot be written."""
    access = DrillAccess(
        job=config.job,
        key=drill_key(bytes.fromhex(secret)).hex() if config.drills else "",
        engine=engine,
        seats=config.seats,
        nodes=config.nodes,
        parity=config.parity,
        max_stall_s=config.max_stall_s,
    )
    path = Path(config.run_dir) / NAME
    try:
        write_whole(path, json.dumps({"v": VERSION} | asdict(access)), mode=0o600)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error


def read_access(run_dir: Path) -> DrillAccess:
    """What `write_access` left.

    Raises:
      UsageError: the job is over, is another user's, was not started by `ftkit run` of this
        version, or takes no drills.
    """
    path = run_dir / NAME
    try:
        value = json.loads(path.read_text())
        if value.pop("v") != VERSION:
            raise ValueError("another version's")
        access = DrillAccess(**value)
        bytes.fromhex(access.key)
    except FileNotFoundError:
        raise UsageError(
            f"{run_dir} has no {NAME}: its job is over, or was not started by `ftkit run`"
        ) from None
    except PermissionError:
        raise UsageError(f"{path} is another user's: only who runs a job may drill it") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path} cannot be used: {error}") from error
    if not access.key:
        raise UsageError(f"job {access.job} was started with --no-drills: it takes none")
    return access


def remove_access(run_dir: Path) -> None:
    """The job is over: nobody is to be let in any more."""
    (run_dir / NAME).unlink(missing_ok=True)
