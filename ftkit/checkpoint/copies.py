"""Copies: what the arenas of one node hold, and keep for the tiers below."""

import re
from collections.abc import Collection
from pathlib import Path

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.slabs import Pin, Sealed
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import JobId, NodeId, Seat
from ftkit.core.inventory import Copy


def arena_name(job: JobId) -> re.Pattern[str]:
    """What the file name of an arena of this job looks like; group 1 is its seat."""
    stem = arena_path(job, Seat(0)).name.removesuffix("0.arena")
    return re.compile(re.escape(stem) + r"(\d+)\.arena")


def local_copies(
    job: JobId, directory: Path, node: NodeId, *, pinned: Pin | None = None
) -> list[Copy]:
    """Every sealed part in the arenas of a job in a directory, in no particular order.

    Their data has not been checked. An arena that is being made, or damaged, holds nothing
    that counts.

    Args:
      job: whose arenas.
      directory: where they lie.
      node: this node, for the copies returned.
      pinned: only parts that are kept for this.
    """
    found, name = list[Copy](), arena_name(job)
    for path in directory.iterdir():
        match = name.fullmatch(path.name)
        if match is None:
            continue
        try:
            with Arena.open(path) as arena:
                snapshots = [
                    sealed
                    for slab, sealed in enumerate(arena.slabs())
                    if sealed and (pinned is None or arena.pins(slab)[pinned])
                ]
        except (OSError, IntegrityError):
            continue
        found += (
            Copy(
                seat=Seat(int(match[1])),
                node=node,
                path=str(path),
                step=sealed.step,
                generation=sealed.generation,
                part=sealed.part,
            )
            for sealed in snapshots
        )
    return found


def let_go(directory: Path, pin: Pin, *, but: Collection[tuple[Path, Sealed]] = ()) -> None:
    """Take the pins of one tier off all parts in a node's arenas.

    Args:
      directory: where the arenas lie.
      pin: of which tier.
      but: parts that stay pinned, by the path of their arena.
    """
    for path in directory.glob("*.arena"):
        try:
            with Arena.open(path) as arena:
                held = [
                    sealed
                    for slab, sealed in enumerate(arena.slabs())
                    if sealed and arena.pins(slab)[pin] and (path, sealed) not in but
                ]
            if held:
                with Arena.open(path, writable=True) as arena:
                    for sealed in held:
                        arena.pin(sealed, pin, on=False)
        except (OSError, IntegrityError):
            continue  # replaced or damaged: there is no pin to take off
