"""Row and OpRecord: what a rank leaves in shared memory about itself, and their bytes.

A row is 128 bytes, sixteen aligned 64-bit words, little endian::

    word    0  version (low 32 bits) and CRC-32 (high 32 bits) of what is published
            1  member (low) and pid (high)                          written at attach
            2  t_heartbeat                                          heartbeat thread
            3  allowance, with a checksum of its own                `Recorder.allow`
         4..6  copy 0 of the fields that change together
         7..9  copy 1
       10..15  free

A writer fills the copy that is not published, then stores word 0, whose version picks the
copy (its parity) and whose checksum covers version, word 1 and that copy. So:

* a writer killed or stopped on any line leaves the row before or the row after, whole;
* a reader that was overtaken by two writes, or meets stores out of order, or flipped bytes,
  sees a wrong checksum and never a mixed row;
* words 2 and 3 mean something alone and are single aligned stores; a flipped bit in word 3 would
  excuse a member for years, so it has its own check.

A row changes at each phase. Where a member stands in its collectives it does not hold: that is
read off their ring (`ring`), where each is written once as it begins, and one word as it ends.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import Generation, MemberId, Step
from ftkit.detection.declared import whole

ROW_BYTES: Final = 128
COPY_BYTES: Final = 24
WORD: Final = 0xFFFFFFFF

#: generation, step, t_progress, phase, flags
COPY: Final = struct.Struct("<IIQBB6x")
#: version and word 1, and then the copy: what the checksum of a row covers.
STAMPED: Final = struct.Struct("<IQIIQBB6x")
_STAMP: Final = struct.Struct("<IQ")
assert COPY.size == COPY_BYTES
assert STAMPED.size == _STAMP.size + COPY_BYTES

#: Flag: this process has finished a step, so that it no longer gets the grace of the first.
WARM: Final = 1
#: Flag: this process has no session; its row is written by what wraps torch's own process group.
PLAIN: Final = 2

#: A record is two words, t_leave and the checksum over the rest, and then the rest.
RECORD_BYTES: Final = 96
RECORD_HEAD_BYTES: Final = 16
OP_BYTES: Final = 40
#: seq, t_enter, nbytes, member, generation, group, and 4 bytes left free, op
RECORD: Final = struct.Struct("<QQQIIIxxxx40s")
assert RECORD_HEAD_BYTES + RECORD.size == RECORD_BYTES

_RECORD_HEAD: Final = struct.Struct("<qQ")

#: Of the members whose bytes an operation waits for, so many are told.
AWAITED_MAX: Final = 8
AWAITED_BYTES: Final = 64
#: crc, group, seq, since, how many, and so many members
AWAITED: Final = struct.Struct("<IIQQI8I4x")
assert AWAITED.size == AWAITED_BYTES


class Phase(StrEnum):
    """Where a member's training thread stands. The order is that of a life, then of a step."""

    STARTING = "starting"
    """The process runs and has not joined a world."""
    SETUP = "setup"
    """After init, before the first step."""
    DATA = "data"
    """Reading the batch."""
    FORWARD = "forward"
    """User code: forward and backward."""
    REDUCE = "reduce"
    """Waiting for the reduction of gradients."""
    VOTE = "vote"
    """Waiting for the vote on the step."""
    OPTIMIZER = "optimizer"
    CAPTURE = "capture"
    """Waiting for, or making, the snapshot."""
    BETWEEN = "between"
    """Outside a step; `step` is the last one begun here, whether or not it counts."""
    RECOVERY = "recovery"
    """Being repaired; recovery has its own deadlines."""
    DONE = "done"
    """The training loop has ended."""


PHASES: Final = tuple(Phase)
PHASE_CODE: Final[Mapping[Phase, int]] = {phase: code for code, phase in enumerate(PHASES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One member as it last described itself. Times are CLOCK_MONOTONIC of its own host, ns."""

    member: MemberId
    pid: int
    generation: Generation
    step: Step
    phase: Phase
    group: int
    """The group of the collective described: the oldest pending, or the last that ended."""
    entered: int
    """The highest collective of `group` that was entered; -1: none."""
    left: int
    """Pending: the one before. Else: `entered`."""
    op: str
    """Name of the collective described, "" before the first."""
    t_progress_ns: int
    """The last change by anything but the heartbeat thread."""
    t_enter_ns: int
    """When the oldest pending collective was entered; 0: none is pending."""
    t_heartbeat_ns: int
    """The last stamp of the heartbeat thread; 0: it has none."""
    allowance_ns: int
    """A stall is permitted until then; 0: never declared."""
    warm: bool
    """Whether this process has finished a step."""
    plain: bool = False
    """Whether this process has no session: it joins no world, and cannot be replaced alone."""

    def shifted(self, offset_ns: int) -> "Row":
        """This row on a clock that is `offset_ns` ahead: for rows that come from another host.

        With offset = (our clock at receipt) - (their clock at reading), ages are kept up to
        the time of transport, which makes everything look younger, never older.
        """
        if not offset_ns:
            return self

        def shift(t_ns: int) -> int:
            return t_ns and max(1, t_ns + offset_ns)

        return Row(  # `replace` takes twice as long, and every row of a job comes this way
            member=self.member,
            pid=self.pid,
            generation=self.generation,
            step=self.step,
            phase=self.phase,
            group=self.group,
            entered=self.entered,
            left=self.left,
            op=self.op,
            t_progress_ns=shift(self.t_progress_ns),
            t_enter_ns=shift(self.t_enter_ns),
            t_heartbeat_ns=shift(self.t_heartbeat_ns),
            allowance_ns=shift(self.allowance_ns),
            warm=self.warm,
            plain=self.plain,
        )

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: object) -> "Row":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping):
            raise ProtocolError(f"not a row: {value!r}")
        try:
            return cls(
                member=MemberId(whole(value["member"])),
                pid=whole(value["pid"]),
                generation=Generation(whole(value["generation"])),
                step=Step(whole(value["step"])),
                phase=Phase(value["phase"]),
                group=whole(value["group"]),
                entered=whole(value["entered"]),
                left=whole(value["left"]),
                op=str(value["op"]),
                t_progress_ns=whole(value["t_progress_ns"]),
                t_enter_ns=whole(value["t_enter_ns"]),
                t_heartbeat_ns=whole(value["t_heartbeat_ns"]),
                allowance_ns=whole(value["allowance_ns"]),
                warm=bool(value["warm"]),
                plain=bool(value["plain"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not a row: {value!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class OpRecord:
    """One collective of one member, as kept in the ring. Times in monotonic ns."""

    member: MemberId
    generation: Generation
    group: int
    seq: int
    op: str
    nbytes: int
    t_enter_ns: int
    t_leave_ns: int
    """0 while it is pending."""
    ok: bool
    """Whether it was left with success; False while it is pending."""

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "OpRecord":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping):
            raise ProtocolError(f"not a record of a collective: {value!r}")
        try:
            return cls(
                member=MemberId(whole(value["member"])),
                generation=Generation(whole(value["generation"])),
                group=whole(value["group"]),
                seq=whole(value["seq"]),
                op=str(value["op"]),
                nbytes=whole(value["nbytes"]),
                t_enter_ns=whole(value["t_enter_ns"]),
                t_leave_ns=whole(value["t_leave_ns"]),
                ok=bool(value["ok"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not a record of a collective: {value!r}") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Awaited:
    """Whose bytes a pending collective waits for, as the data plane saw it."""

    group: int
    seq: int
    at_ns: int
    """When it was looked at, in monotonic ns."""
    members: tuple[MemberId, ...]

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> "Awaited":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        if not isinstance(value, Mapping):
            raise ProtocolError(f"not what a collective awaits: {value!r}")
        try:
            return cls(
                group=whole(value["group"]),
                seq=whole(value["seq"]),
                at_ns=whole(value["at_ns"]),
                members=tuple(MemberId(whole(m)) for m in value["members"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProtocolError(f"not what a collective awaits: {value!r}") from error


def op_bytes(op: str) -> bytes:
    """The name of an op as it is stored: ASCII, cut at 40 bytes."""
    return op.encode("ascii", "replace")[:OP_BYTES]


def stamp(version: int, identity: int, copy: bytes) -> int:
    """Word 0 of a row: `version`, and the checksum over it, the identity word and the copy."""
    return version | zlib.crc32(copy, zlib.crc32(_STAMP.pack(version, identity))) << 32


def allowance_word(until_ns: int) -> int:
    """Word 3: milliseconds, rounded up, in the low 40 bits and their CRC in the rest; 0: none."""
    until_ms = min(-(-until_ns // 1_000_000), (1 << 40) - 1)
    return until_ms | zlib.crc32(until_ms.to_bytes(5, "little")) >> 8 << 40 if until_ms else 0


def allowance_ns(word: int) -> int | None:
    """Until when word 3 permits a stall, in monotonic ns; None when its bytes were damaged."""
    until_ns = (word & (1 << 40) - 1) * 1_000_000
    return until_ns if allowance_word(until_ns) == word else None


def decode_record(data: bytes) -> OpRecord | None:
    """The record in these 96 bytes, or None for one that was never or not wholly written."""
    rest = data[RECORD_HEAD_BYTES:]
    seq, t_enter, nbytes, member, generation, group, name = RECORD.unpack(rest)
    t_leave, crc = _RECORD_HEAD.unpack_from(data)
    if not t_enter or crc != zlib.crc32(rest):
        return None
    if 0 < abs(t_leave) < t_enter:
        return None  # of the one that was here before: its place was taken while we looked
    return OpRecord(
        member=MemberId(member),
        generation=Generation(generation),
        group=group,
        seq=seq,
        op=name.rstrip(b"\0").decode("ascii", "replace"),
        nbytes=nbytes,
        t_enter_ns=t_enter,
        t_leave_ns=abs(t_leave),
        ok=t_leave > 0,
    )


def encode_awaited(group: int, seq: int, at_ns: int, members: Sequence[int]) -> bytes:
    """The bytes of an `Awaited`; of more members than there is room for, the first."""
    told = [*members[:AWAITED_MAX]]
    padded = told + [0] * (AWAITED_MAX - len(told))
    rest = AWAITED.pack(0, group & WORD, seq, at_ns, len(told), *padded)[4:]
    return zlib.crc32(rest).to_bytes(4, "little") + rest


def decode_awaited(data: bytes) -> Awaited | None:
    """The inverse; None for what was never or not wholly written."""
    crc, group, seq, at_ns, count, *members = AWAITED.unpack(data)
    if not at_ns or crc != zlib.crc32(data[4:]):
        return None
    told = tuple(MemberId(m) for m in members[:count])
    return Awaited(group=group, seq=seq, at_ns=at_ns, members=told)
