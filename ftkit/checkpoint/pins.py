"""Pins: how a tier below keeps an arena's slot from being overwritten, while others use it."""

import os
from pathlib import Path

from ftkit.checkpoint.slots import PAGE, Geometry, Pin, Sealed


def set_pin(path: Path, sealed: Sealed, pin: Pin, *, on: bool = True) -> bool:
    """Keep a snapshot from being overwritten, or (`on=False`) let go of it.

    For anybody, while the writer has the arena open. A writer that has just chosen the slot
    takes it nevertheless: readers check what they read.

    Returns:
      Whether the snapshot is there.

    Raises:
      OSError: there is no such arena.
      IntegrityError: its first page is damaged.
    """
    # Without a mapping: pinning must not cost more in a larger arena.
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        geometry = Geometry.from_page(os.pread(fd, PAGE, 0))
        for slot in range(geometry.slots):
            at = geometry.slot_at(slot)
            if Sealed.from_page(os.pread(fd, PAGE, at)) == sealed:
                os.pwrite(fd, bytes([on]), geometry.pin_at(slot, pin))
                # It may have been chosen between the two: then it is being overwritten.
                return Sealed.from_page(os.pread(fd, PAGE, at)) == sealed
        return False
    finally:
        os.close(fd)
