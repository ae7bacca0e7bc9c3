"""SeatWriter: how one rank writes its row and its rings."""

import zlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from ftkit.core.ids import MemberId
from ftkit.detection.ring import RING_RECORDS
from ftkit.detection.row import (
    AWAITED_BYTES,
    COPY_BYTES,
    PHASE_CODE,
    PHASES,
    RECORD,
    RECORD_BYTES,
    RECORD_HEAD_BYTES,
    STAMPED,
    WORD,
    Phase,
    allowance_word,
    encode_awaited,
)
from ftkit.detection.step_record import STEP_BYTES, STEPS_KEPT, StepRecord, encode_step

#: The place of a collective that found none.
NOWHERE: Final = -1


class Place(NamedTuple):
    """Where on the board the parts of one seat begin, in bytes."""

    row: int
    ring: int
    steps: int
    awaited: int


class SeatWriter:
    """The one writer of a seat's row and rings. Not thread-safe: `Recorder` holds a lock.

    Fields of the row are set as attributes and take effect together in `publish`.
    """

    def __init__(
        self, data: memoryview, words: memoryview, place: Place, member: MemberId, pid: int
    ) -> None:
        """Use `StatusBoard.attach`."""
        self._bytes, self._words = data, words
        self._base, self._first, self._ring = place.row, place.row // 8, place.ring
        self._steps, self._awaited = place.steps, place.awaited
        self.member = member
        self.generation = 0
        self.step = 0
        self._phase_code = PHASE_CODE[Phase.STARTING]
        self.flags = 0
        self._identity = member | pid << 32
        self._version = int(words[self._first]) & WORD
        self._next = 0
        #: Whether the record at each place of the ring is pending.
        self._pending = bytearray(RING_RECORDS)

        head = self._fill(0)
        # Between these stores the row is refused by readers rather than given to the wrong one.
        words[self._first + 1] = self._identity
        words[self._first + 2] = 0
        words[self._first + 3] = 0
        words[self._first] = head

    @property
    def phase(self) -> Phase:
        """The phase of the row."""
        return PHASES[self._phase_code]

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase_code = PHASE_CODE[phase]

    def publish(self, t_progress_ns: int) -> None:
        """Make the fields, as they are now, the row that readers see."""
        self._words[self._first] = self._fill(t_progress_ns)

    def beat(self, t_ns: int) -> None:
        """Stamp the heartbeat. The one method that may run beside another."""
        self._words[self._first + 2] = t_ns

    def allow(self, until_ns: int) -> None:
        """Permit a stall until then; 0 withdraws it."""
        self._words[self._first + 3] = allowance_word(until_ns)

    def record_enter(self, group: int, seq: int, op: bytes, nbytes: int, t_ns: int) -> int:
        """Put a pending record into the ring, over the oldest that has ended. In about 1 µs.

        Returns:
          its place, for `record_leave`; NOWHERE when all 256 are pending, and it is not told.
        """
        place, pending = self._next, self._pending
        if pending[place]:
            place = pending.find(0, place)
            if place < 0 and (place := pending.find(0)) < 0:
                return NOWHERE
        self._next = (place + 1) % RING_RECORDS
        pending[place] = 1
        start = self._ring + place * RECORD_BYTES
        rest = RECORD.pack(seq, t_ns, nbytes, self.member, self.generation, group & WORD, op)
        words, first = self._words, start >> 3
        words[first + 1] = 0  # until the checksum is there, it is no record
        self._bytes[start + RECORD_HEAD_BYTES : start + RECORD_BYTES] = rest
        words[first] = 0
        words[first + 1] = zlib.crc32(rest)
        return place

    def record_leave(self, place: int, t_ns: int, ok: bool) -> None:
        """Complete the record at `place`, once."""
        if place >= 0:
            self._pending[place] = 0
            # One aligned word: the sign carries the outcome.
            word = t_ns if ok else -t_ns & 0xFFFFFFFFFFFFFFFF
            self._words[(self._ring + place * RECORD_BYTES) >> 3] = word

    def record_step(self, record: StepRecord) -> None:
        """Put a finished step into the ring of steps, over the oldest."""
        start = self._steps + record.number % STEPS_KEPT * STEP_BYTES
        self._bytes[start : start + STEP_BYTES] = encode_step(record)

    def await_(self, group: int, seq: int, members: Sequence[int], *, t_ns: int) -> None:
        """Say whose bytes a pending collective waits for."""
        start = self._awaited
        told = encode_awaited(group, seq, t_ns, members)
        self._bytes[start : start + AWAITED_BYTES] = told

    def _fill(self, t_progress_ns: int) -> int:
        """Fill the copy that is not published. Returns the word that publishes it."""
        version = (self._version + 1) & WORD or 2  # 0 says "never attached"
        self._version = version
        stamped = STAMPED.pack(
            version,
            self._identity,
            self.generation,
            self.step,
            t_progress_ns,
            self._phase_code,
            self.flags,
        )
        start = self._base + 32 + (version & 1) * COPY_BYTES
        self._bytes[start : start + COPY_BYTES] = stamped[-COPY_BYTES:]
        return version | zlib.crc32(stamped) << 32
