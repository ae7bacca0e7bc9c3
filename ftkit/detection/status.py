"""StatusBoard: one file of shared memory in which the ranks of a node say where they stand.

The node's agent creates it, the ranks map it and write, anybody of the same user reads. A
rank never waits for a reader, nor a reader for a rank that is hung, stopped or dead: rows and
rings stay as they were left (`row` holds the layout and why no torn row can be taken for a
whole one). ::

    header 128 B | a row of 128 B | a ring of 256 x 96 B | a ring of 128 x 176 B     | 64 B
                   for each seat    of collectives        of finished steps         of what
                                                          (`step_record`)           is awaited
"""

import errno
import mmap
import os
import struct
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from ftkit.core.errors import CapacityError, IntegrityError
from ftkit.core.ids import Generation, MemberId, Step
from ftkit.detection.ring import RING_BYTES, RING_RECORDS, Standing, newest, standing
from ftkit.detection.row import (
    AWAITED_BYTES,
    COPY,
    COPY_BYTES,
    PHASES,
    PLAIN,
    ROW_BYTES,
    WARM,
    WORD,
    Awaited,
    OpRecord,
    Row,
    allowance_ns,
    decode_awaited,
    stamp,
)
from ftkit.detection.seat_writer import Place, SeatWriter
from ftkit.detection.step_record import STEP_BYTES, STEPS_KEPT, StepRecord, decode_step

SEATS_MAX: Final = 4096

_HEADER: Final = struct.Struct("<8sIIII")
#: The board's file name in a node's folder of shared memory.
BOARD: Final = "board"
_MAGIC: Final = b"ftkboard"
_FORMAT: Final = 3
_STEPS_BYTES: Final = STEPS_KEPT * STEP_BYTES
#: A read fails only when two writes overtake it; a rank that does nothing but write fails
#: about one read in two, so a hundred in a row mean damage.
_READ_TRIES: Final = 100


class _Look(NamedTuple):
    """What stands at a seat beside its rings."""

    identity: int
    heartbeat: int
    allowance_ns: int
    copy: bytes


class StatusBoard:
    """The rows and rings of one node. Reading is free of locks and safe in any thread."""

    def __init__(self, path: Path, memory: mmap.mmap, seats: int) -> None:
        """Use `create` or `open`; takes over `memory`."""
        self.path = path
        self.seats = seats
        self._memory = memory
        self._bytes = memoryview(memory)
        self._words = self._bytes.cast("Q")

    @classmethod
    def create(cls, path: Path, *, seats: int) -> Self:
        """Make the file at `path`, 0600, with all its pages allocated, and map it.

        Args:
          path: must not exist; its directory must. Best on tmpfs, for instance /dev/shm.
          seats: how many local seats, 1 to 4096: 46.2 kB each.

        Raises:
          FileExistsError: `path` exists; `open` it, or remove it.
          CapacityError: the file system has no room. Found here and not by SIGBUS in a rank.
        """
        if not 1 <= seats <= SEATS_MAX:
            raise ValueError(f"a board has 1 to {SEATS_MAX} seats, not {seats}")
        _little_endian()
        size = _size(seats)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                os.posix_fallocate(fd, 0, size)
            except OSError as error:
                path.unlink()
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise CapacityError(
                        f"no room for a status board of {size} bytes at {path}: {error.strerror}"
                    ) from error
                raise
            memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        # The header comes last: a board whose maker died on the way is refused by `open`.
        memory[: _HEADER.size] = _HEADER.pack(_MAGIC, _FORMAT, seats, ROW_BYTES, RING_RECORDS)
        return cls(path, memory, seats)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> Self:
        """Map a board that exists; `read_only`: so that nothing here can write it, nor `attach`.

        Raises:
          IntegrityError: the file is not a whole board.
        """
        _little_endian()
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            found = os.fstat(fd).st_size
            header = os.pread(fd, _HEADER.size, 0)
            if len(header) < _HEADER.size or not header.startswith(_MAGIC):
                raise IntegrityError(f"{path} is not a status board, or was never finished")
            _, version, seats, row_bytes, ring = _HEADER.unpack(header)
            if (version, row_bytes, ring) != (_FORMAT, ROW_BYTES, RING_RECORDS):
                raise IntegrityError(
                    f"{path} is a status board of format {version} with rows of {row_bytes} "
                    f"bytes, this is format {_FORMAT} with {ROW_BYTES}: the agent and the ranks "
                    "run different versions of ftkit"
                )
            if not 1 <= seats <= SEATS_MAX or found != _size(seats):
                raise IntegrityError(f"{path} says {seats} seats but has {found} bytes")
            access = mmap.ACCESS_READ if read_only else mmap.ACCESS_WRITE
            memory = mmap.mmap(fd, found, access=access)
        finally:
            os.close(fd)
        return cls(path, memory, seats)

    def attach(self, seat: int, member: MemberId, *, pid: int | None = None) -> SeatWriter:
        """Take the row of local `seat` for `member`: called once, in the member's process.

        The row is replaced whole, with the phase STARTING. The ring keeps what a member before
        left in it until it is overwritten. The one that had the seat must be dead: two writers
        would spoil each other's rows, which readers then refuse.

        Args:
          seat: the row, 0 to `seats` - 1: the seat's place on this node, not in the job.
          member: below 2**32.
          pid: the process to be looked up in /proc, by default this one.
        """
        return SeatWriter(
            self._bytes,
            self._words,
            self._place(seat),
            member,
            pid or os.getpid(),
        )

    def read(self, seat: int) -> Row | None:
        """The row of local `seat`; None when no member has ever attached. Never blocks.

        Raises:
          IntegrityError: no whole row in 100 tries: bytes flipped, two writers at one seat, or
            a writer that died between the two last stores of `attach`.
        """
        found = self._look(seat)
        if found is None:
            return None
        generation, step, t_progress, phase, flags = COPY.unpack(found.copy)
        stands = self._standing(seat, found.identity, generation)
        return Row(
            member=MemberId(found.identity & WORD),
            pid=found.identity >> 32,
            generation=Generation(generation),
            step=Step(step),
            phase=PHASES[phase],
            group=stands.group,
            entered=stands.entered,
            left=stands.left,
            op=stands.op,
            t_progress_ns=max(t_progress, stands.t_moved_ns),
            t_enter_ns=stands.t_enter_ns,
            t_heartbeat_ns=found.heartbeat,
            allowance_ns=found.allowance_ns,
            warm=bool(flags & WARM),
            plain=bool(flags & PLAIN),
        )

    def standing(self, seat: int) -> Standing | None:
        """Where the member at local `seat` stands with its collectives. Otherwise as `read`."""
        found = self._look(seat)
        if found is None:
            return None
        return self._standing(seat, found.identity, COPY.unpack(found.copy)[0])

    def _look(self, seat: int) -> _Look | None:
        """What stands at a seat, whole. Raises as `read`."""
        base = self._place(seat)[0]
        words, first = self._words, base // 8
        for _ in range(_READ_TRIES):
            head = words[first]
            if not head:
                return None
            identity, heartbeat = words[first + 1], words[first + 2]
            allowance = allowance_ns(words[first + 3])
            start = base + 32 + (head & 1) * COPY_BYTES
            copy = bytes(self._bytes[start : start + COPY_BYTES])
            if allowance is not None and stamp(head & WORD, identity, copy) == head:
                return _Look(identity, heartbeat, allowance, copy)
        raise IntegrityError(
            f"no whole row of seat {seat} in {_READ_TRIES} reads of {self.path}: its bytes were "
            "damaged, or two processes write it"
        )

    def _standing(self, seat: int, identity: int, generation: int) -> Standing:
        ring = self._place(seat).ring
        records = bytes(self._bytes[ring : ring + RING_BYTES])
        return standing(records, MemberId(identity & WORD), Generation(generation))

    def records(self, seat: int, count: int = RING_RECORDS) -> list[OpRecord]:
        """The last `count` collectives of local `seat`, at most 256, as `newest` tells them."""
        ring = self._place(seat).ring
        return newest(bytes(self._bytes[ring : ring + RING_BYTES]), count)

    def steps(self, seat: int, *, member: MemberId, after: int = -1) -> list[StepRecord]:
        """What `member` left of the steps it finished at local `seat`, oldest first.

        Of the last 128 at most, whole records only. Costs what there is to read, where a reader
        keeps up.

        Args:
          seat: the local seat.
          member: whose; what members before it left is passed over.
          after: the highest number already read; -1 for none.
        """
        start = self._place(seat).steps
        found: list[StepRecord] = []
        for number in range(after + 1, after + 1 + STEPS_KEPT):
            record = self._step_at(start, number % STEPS_KEPT)
            if record is None or (record.member, record.number) != (member, number):
                break
            found.append(record)
        else:
            return found
        if record is not None and record.member == member and record.number < number:
            return found  # the oldest there is: nothing is newer than what was read
        # Overtaken, torn, or somebody else's: whatever is whole of the rest.
        last = found[-1].number if found else after
        rest = (self._step_at(start, place) for place in range(STEPS_KEPT))
        found += sorted(
            (r for r in rest if r and r.member == member and r.number > last),
            key=lambda r: r.number,
        )
        return found

    def awaited(self, seat: int) -> Awaited | None:
        """Whose bytes local `seat` waited for when its data plane last looked; None: unknown."""
        start = self._place(seat).awaited
        return decode_awaited(bytes(self._bytes[start : start + AWAITED_BYTES]))

    def close(self) -> None:
        """Unmap. Writers made by `attach` must not be used any more. May be called twice."""
        self._words.release()
        self._bytes.release()
        self._memory.close()

    def unlink(self) -> None:
        """Remove the file, for whoever made it; those who have it mapped keep it."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _place(self, seat: int) -> Place:
        if not 0 <= seat < self.seats:
            raise ValueError(f"seat {seat} is not on this board of {self.seats} seats")
        rings = (1 + self.seats) * ROW_BYTES
        steps = rings + self.seats * RING_BYTES
        awaited = steps + self.seats * _STEPS_BYTES
        return Place(
            row=(1 + seat) * ROW_BYTES,
            ring=rings + seat * RING_BYTES,
            steps=steps + seat * _STEPS_BYTES,
            awaited=awaited + seat * AWAITED_BYTES,
        )

    def _step_at(self, start: int, place: int) -> StepRecord | None:
        at = start + place * STEP_BYTES
        return decode_step(bytes(self._bytes[at : at + STEP_BYTES]))


def identity_offset(seat: int) -> int:
    """Where in the file it says whose the row of local `seat` is; a drill falsifies that."""
    return (1 + seat) * ROW_BYTES + 8


def _size(seats: int) -> int:
    return ROW_BYTES + (ROW_BYTES + RING_BYTES + _STEPS_BYTES + AWAITED_BYTES) * seats


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise OSError("the status board is laid out for little-endian machines only")
