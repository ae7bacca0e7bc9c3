"""Parts: the sealed parts in a node's arenas that parity protects, found and pinned."""

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.copies import let_go, local_copies
from ftkit.checkpoint.parity.rounds import NOBODY, PartRef, RoundId
from ftkit.checkpoint.slabs import Pin, Sealed
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Generation, JobId, NodeId, Step
from ftkit.core.inventory import Copy

#: Under this name the parts are pinned that a leader may choose from.
_OFFER = RoundId(Generation(-1), Step(-1), NOBODY)

#: Snapshots offered at once: nodes differ by a step.
OFFERED = 2

#: A leader that has asked and not chosen for so long is gone: what was offered is let go.
OFFER_S = 5.0


def local_parts(directory: Path, job: JobId, node: NodeId) -> list[tuple[Copy, PartRef, Sealed]]:
    """The sealed parts in the arenas of a node. Their data has not been checked."""
    found = []
    for copy in local_copies(job, directory, node):
        path = Path(copy.path)
        try:
            with Arena.open(path) as arena:
                sealed = arena.find(copy.step, copy.generation)
        except (OSError, IntegrityError):
            continue  # overwritten this instant
        part = PartRef(
            arena=path.name,
            seat=copy.seat,
            step=copy.step,
            generation=copy.generation,
            bytes=sealed.data_bytes,
            chunk_bytes=sealed.chunk_bytes,
        )
        found.append((copy, part, sealed))
    return found


def find_part(directory: Path, part: PartRef) -> Sealed | None:
    """What the page of a part says; None when it is not there."""
    try:
        with Arena.open(directory / part.arena) as arena:
            found = arena.find(part.step, part.generation)
    except (OSError, IntegrityError):
        return None
    return found if found.data_bytes == part.bytes else None


class Pins:
    """Which parts no rank may overwrite, and for which round. One thread at a time."""

    def __init__(self, directory: Path, node: NodeId) -> None:
        """Hold nothing in the arenas of `node`, which lie in `directory`, yet."""
        self._directory, self._node = directory, node
        self._held: dict[RoundId, list[tuple[Path, Sealed]]] = {}
        self._offered = 0.0

    def offer(self, parts: Sequence[tuple[Copy, PartRef, Sealed]]) -> None:
        """Pin the newest snapshots, so that they are still there when a leader asks for one."""
        self._let_go(_OFFER)
        self._held[_OFFER] = pins = list[tuple[Path, Sealed]]()
        self._offered = time.monotonic()
        for path, sealed in _newest(parts):
            with suppress(OSError, IntegrityError):
                if _pin(path, sealed):
                    pins.append((path, sealed))

    def hold(self, round_: RoundId, parts: Collection[PartRef]) -> None:
        """Pin the parts of a round, and offer nothing any more.

        Raises:
          IntegrityError: one is no longer there; those before it stay pinned for the round.
          OSError: an arena cannot be opened.
        """
        pins = self._held[round_] = []
        for part in parts:
            path, sealed = self._directory / part.arena, find_part(self._directory, part)
            if sealed is None or not _pin(path, sealed):
                raise IntegrityError(f"{part.arena} of node {self._node} has lost step {part.step}")
            pins.append((path, sealed))
        self._let_go(_OFFER)

    def only(self, rounds: Collection[RoundId]) -> None:
        """Let go of all rounds but these; of what is offered not."""
        for round_ in self._held.keys() - set(rounds) - {_OFFER}:
            self._let_go(round_)

    def again(self) -> None:
        """Pin again what is to be pinned, and nothing else: an arena that grew lost its pins.

        An offer that nobody took up is pinned no longer: ranks need their slabs. Nor is a
        snapshot whose slab was chosen and filled while its predecessor there was being pinned:
        nobody would ever let go of that, and its rank would have a slab less for good.
        """
        if _OFFER in self._held and time.monotonic() - self._offered > OFFER_S:
            self._let_go(_OFFER)
        for pins in self._held.values():
            for path, sealed in pins:
                with suppress(OSError, IntegrityError):
                    _pin(path, sealed)
        let_go(self._directory, Pin.PARITY, but={p for pins in self._held.values() for p in pins})

    def _let_go(self, round_: RoundId) -> None:
        gone = self._held.pop(round_, [])
        held = [pin for pins in self._held.values() for pin in pins]
        for path, sealed in gone:
            if (path, sealed) not in held:
                with suppress(OSError, IntegrityError):
                    _pin(path, sealed, on=False)


def _pin(path: Path, sealed: Sealed, *, on: bool = True) -> bool:
    """Keep a part from being overwritten, or let go of it; whether it is there."""
    with Arena.open(path, writable=True) as arena:
        # It may have been chosen between the two: then it is being overwritten.
        return arena.pin(sealed, Pin.PARITY, on=on) and sealed in arena.slabs()


def _newest(
    parts: Sequence[tuple[Copy, PartRef, Sealed]],
) -> Iterator[tuple[Path, Sealed]]:
    """The newest snapshots of each arena: all nodes have one of them, or soon will."""
    arenas: dict[str, list[Sealed]] = {}
    for copy, _, sealed in parts:
        arenas.setdefault(copy.path, []).append(sealed)
    for path, found in arenas.items():
        for sealed in sorted(found, key=lambda s: s.version)[-OFFERED:]:
            yield Path(path), sealed
