"""Fetch: a snapshot in another node's arena, read through its byte server and checked here."""

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Self

from ftkit.checkpoint.lines import ByteLine
from ftkit.checkpoint.serve import RANGE_BYTES_MAX
from ftkit.checkpoint.slabs import Head
from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part

HEAD_BYTES_MAX = 256 << 20

#: Reads ranges over a line: (line, request, first, end, stride), as `ByteLine.ranges`.
Ranges = Callable[[ByteLine, Mapping[str, object], int, int, int], Iterator[memoryview]]


class Remote:
    """A connection that reads one part of a snapshot. Use from one thread."""

    def __init__(self, line: ByteLine, request: dict[str, object]) -> None:
        """Take over a connection, and read the head; see `fetch`."""
        self._line = line
        self._request = request
        self.head_bytes = bytes(line.read({**request, "op": "head"}, HEAD_BYTES_MAX))
        self.head = Head.parse(self.head_bytes)

    def blocks(
        self, chunks: range | None = None, *, range_bytes: int = RANGE_BYTES_MAX
    ) -> Iterator[memoryview]:
        """The data in order, a chunk at a time, each checked; valid until the next is asked for.

        The next range travels while this one is used.

        Args:
          chunks: which chunks, counted from the part's first (`Head.span`); None for all.
          range_bytes: of a range; two of them are held. At most 16 MiB.

        Raises:
          IntegrityError: a chunk is damaged, or the snapshot is no longer there.
          WireError: the server is gone, silent or mad.
        """
        if chunks is None:
            chunks = range(len(self.head.digests))
        return checked(self._line, self._request, self.head, chunks, range_bytes)

    def close(self) -> None:
        """Hang up. May be called twice."""
        self._line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def checked(
    line: ByteLine,
    part: Mapping[str, object],
    head: Head,
    chunks: range,
    range_bytes: int = RANGE_BYTES_MAX,
    *,
    ranges: Ranges = ByteLine.ranges,
) -> Iterator[memoryview]:
    """Chunks of a part as `Remote.blocks`, over any connection.

    Args:
      line: to the byte server that has the part.
      part: the fields of a request that name it.
      head: what the part must be; that of another step fits none of its chunks.
      chunks: counted from the part's first.
      range_bytes: of a range.
      ranges: how they are read.
    """
    size = head.sealed.chunk_bytes
    end = min(chunks.stop * size, head.sealed.data_bytes)
    stride = max(1, range_bytes // size) * size
    chunk = chunks.start
    for data in ranges(line, {**part, "op": "data"}, chunk * size, end, stride):
        for at in range(0, len(data), size):
            block = data[at : at + size]
            head.check(chunk, block)
            chunk += 1
            yield block


def fetch(
    address: tuple[str, int],
    secret: bytes,
    arena: str,
    step: Step,
    generation: Generation,
    *,
    timeout_s: float = 10.0,
) -> Remote:
    """Open a part in a remote arena. Blocks until its head has been read and checked.

    Args:
      address: of an `ArenaServer`.
      secret: the job's.
      arena: the arena's file name, without directory.
      step: which snapshot.
      generation: of that step.
      timeout_s: the longest silence of the server, now and while blocks are read.

    Raises:
      IntegrityError: the snapshot is not there, or its head is damaged.
      AuthenticationError: the server holds another secret.
      ProtocolError: the server refused the request, or speaks something else.
      WireError: nobody listens, or the connection broke or fell silent.
    """
    line = ByteLine.open(address, secret, timeout_s=timeout_s)
    try:
        return Remote(line, {"arena": arena, "step": step, "generation": generation})
    except BaseException:
        line.close()
        raise


def list_copies(
    address: tuple[str, int], secret: bytes, node: NodeId, *, timeout_s: float = 10.0
) -> list[Copy]:
    """The sealed parts that a byte server has. Blocks.

    Args:
      address: of an `ArenaServer`.
      secret: the job's.
      node: the node it runs on, for the copies returned.
      timeout_s: the longest silence of the server.

    Raises:
      WireError: it cannot be reached, or answers something else.
    """
    line = ByteLine.open(address, secret, timeout_s=timeout_s)
    try:
        answer = line.ask({"op": "list"})
        return [
            Copy(
                seat=Seat(int(found["seat"])),
                node=node,
                path=str(found["arena"]),
                step=Step(int(found["step"])),
                generation=Generation(int(found["generation"])),
                part=Part.from_json(found["part"]),
            )
            for found in answer["copies"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"byte server at {address} sent no list of copies") from error
    finally:
        line.close()
