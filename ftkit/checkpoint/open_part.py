"""OpenPart: one part of a snapshot, open for reading, in an arena here or on another node."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.chunks import scatter
from ftkit.checkpoint.fetch import Remote, fetch
from ftkit.checkpoint.in_place import read_in_place
from ftkit.checkpoint.slabs import Head
from ftkit.core.inventory import Copy

Address = tuple[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPart:
    """Valid while it is open. Use from one thread."""

    head: Head
    """Layout, small state and digests, checked."""
    blocks: Callable[[range], Iterator[memoryview]]
    """Chunks, counted from the part's first (`Head.span`), each checked; see `Arena.blocks`."""
    read_into: Callable[[int, int, Sequence[memoryview]], None]
    """Puts chunks `first` to `end` of the state, which the part must hold, into the tensors they
    belong to: one writable buffer of bytes for each entry of the layout. Blocks. IntegrityError
    or WireError leaves anything in the buffers."""
    memory: Callable[[], memoryview] | None
    """The part's data in place, unchecked; raises IntegrityError once it may have been
    overwritten. None on another node."""


@contextmanager
def open_part(
    copy: Copy, path: Path, server: Address | None, secret: bytes, *, timeout_s: float = 10.0
) -> Iterator[OpenPart]:
    """Open a copy. Blocks until its head has been read and checked.

    Args:
      copy: which.
      path: of its arena; of one on another node the name alone counts.
      server: the byte server of its node; None when it is on this one.
      secret: the job's, for byte servers.
      timeout_s: the longest silence of a byte server, now and while it is read.

    Raises:
      IntegrityError: it is gone, or damaged.
      WireError: its node does not answer.
      OSError: there is no such arena.
    """
    if server is not None:
        with fetch(
            server, secret, path.name, copy.step, copy.generation, timeout_s=timeout_s
        ) as remote:
            yield OpenPart(
                head=remote.head,
                blocks=remote.blocks,
                read_into=partial(_receive_into, remote),
                memory=None,
            )
        return
    with Arena.open(path) as arena:
        head = arena.head(arena.find(copy.step, copy.generation))
        yield OpenPart(
            head=head,
            blocks=partial(arena.blocks, head),
            read_into=partial(_read_into, arena, head),
            memory=partial(arena.data, head.sealed),
        )


def _read_into(
    arena: Arena, head: Head, first: int, end: int, targets: Sequence[memoryview]
) -> None:
    read_in_place(arena, head, head.span(first, end), targets)


def _receive_into(remote: Remote, first: int, end: int, targets: Sequence[memoryview]) -> None:
    blocks = remote.blocks(remote.head.span(first, end))
    scatter(remote.head.layout, blocks, targets, first, end)
