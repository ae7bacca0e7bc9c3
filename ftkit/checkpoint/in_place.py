"""In place: a part of a snapshot read from its arena straight into where its tensors live.

On several threads, for nobody trains meanwhile: each takes the next chunk, reads it, and checks
its digest while it is in the cache. Read and not mapped: the first touch of a mapped page costs
more than the copy of it.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.chunks import PADDING, Unit, units
from ftkit.checkpoint.slabs import Head

#: Each needs a core; more than the memory can feed are no use.
THREADS_MAX = 4


def read_in_place(arena: Arena, head: Head, chunks: range, targets: Sequence[memoryview]) -> None:
    """Read some chunks of a part into the tensors that they belong to. Blocks.

    Args:
      arena: open; holds the part.
      head: of the part.
      chunks: which, counted from the part's first (`Head.span`).
      targets: one writable buffer of bytes (format "B") per entry of the layout, of its size.

    Raises:
      IntegrityError: a chunk fails, or the slab was overwritten meanwhile. The targets hold
        anything.
    """
    size = head.sealed.chunk_bytes
    first = head.first_chunk
    todo = units(head.layout, size, chunks=range(chunks.start + first, chunks.stop + first))
    data_at = arena.data_offset(head.sealed)
    threads = max(1, min(THREADS_MAX, len(os.sched_getaffinity(0)), len(todo)))
    waiting = iter(zip(chunks, todo, strict=True))

    def work(mine: Iterator[tuple[int, Unit]]) -> None:
        for chunk, unit in mine:
            views = [
                memoryview(bytearray(p.count))
                if p.entry == PADDING
                else targets[p.entry][p.offset : p.offset + p.count]
                for p in unit.pieces
            ]
            arena.read(data_at + chunk * size, views)
            head.check(chunk, *views)

    if threads == 1:
        work(waiting)
    else:
        with ThreadPoolExecutor(threads, "ftkit-restore") as pool:
            # The next of an iterator is taken under the GIL: each chunk by one thread.
            list(pool.map(work, [waiting] * threads))
    arena.data_offset(head.sealed)
