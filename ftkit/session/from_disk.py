"""From disk: a rank's state out of a checkpoint, when no memory has the step."""

import time

from ftkit.checkpoint.load import load_state, small_of_seats, small_of_stages
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.source import CheckpointSource, identity, small_by_seat
from ftkit.checkpoint.persist.store import open_store
from ftkit.checkpoint.restore import Restored
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.ids import Seat, Step


def load_from_disk(
    url: str, step: Step, seat: Seat, state: ProtectedState, *, stages: bool = False
) -> Restored | None:
    """Load a checkpoint, written by a world of any size, into this rank's state. Blocks.

    Reads the boxes that this rank holds, and no others.

    Args:
      url: the root.
      step: exactly this one: it is what all ranks agreed on.
      seat: this rank's, for state that is a seat's own.
      state: what to load into, in place.
      stages: ranks hold other tensors, rather than parts of the same.

    Returns:
      What was read, without sources in memory; None when there is no checkpoint of that step.

    Raises:
      IntegrityError: it is damaged. The state may be partly loaded and must not be trained on.
      StateChanged: it is of another model. The state is unchanged.
      StoreError: the store failed.
    """
    start = time.monotonic()
    store = open_store(url)
    if identity(store, step) is None:
        return None
    found = open_checkpoint(store, step)
    smalls = small_by_seat(found)
    small = small_of_stages(smalls, seat) if stages else small_of_seats(smalls, seat)
    report = load_state(state, [CheckpointSource(found)], small=small, stage=stages)
    return Restored(
        step=step,
        layout=state.layout(),
        reads=(),
        bytes=report.bytes,
        seconds=time.monotonic() - start,
        failures=(),
    )
