"""StepRecord: what a rank leaves in shared memory about a step it has finished, and its bytes.

A ring of them stands beside the ring of collectives, under the same rule: a record is written
in one go with a checksum over all of it, so that one which a killed writer left half written,
or which a reader met while it was overwritten, is no record and never a wrong one.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.row import PHASES, Phase
from ftkit.detection.signals import StepSeen

#: Steps of which a seat keeps the record. An agent reads them every half second, however seldom it
#: reports, and misses none of a job whose steps take 4 ms.
STEPS_KEPT: Final = 128

ROLE_BYTES: Final = 16
PLACE_BYTES: Final = 40

#: number, step, t_end, member, generation, slots, flags, a float for each phase, waited, cpu,
#: gc, starved, loss, grad_norm, role, place
_BODY: Final = struct.Struct(f"<QQQIIII{len(PHASES)}f4fdd{ROLE_BYTES}s{PLACE_BYTES}s")
_CRC: Final = struct.Struct("<I")
STEP_BYTES: Final = _BODY.size + _CRC.size
assert STEP_BYTES % 8 == 0

_HAS_CPU: Final = 1
_HAS_LOSS: Final = 2
_HAS_NORM: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One finished step of one member. Durations are seconds; `StepSeen` says what they mean."""

    number: int
    """How many the member had left before this one."""
    member: MemberId
    generation: Generation
    step: Step
    t_end_ns: int
    """CLOCK_MONOTONIC of the member's host."""
    seconds: Mapping[Phase, float] = field(default_factory=dict)
    """Single precision; phases it was not in are left out."""
    waited_s: float = 0.0
    cpu_s: float | None = None
    gc_s: float = 0.0
    starved_s: float = 0.0
    slots: int = 0
    loss: float | None = None
    grad_norm: float | None = None
    role: str = ""
    """ASCII, at most 16 bytes."""
    place: str = ""
    """ASCII, at most 40 bytes."""

    def seen_at(self, seat: Seat) -> StepSeen:
        """The record as a signal of the member that sits there."""
        return StepSeen(
            member=self.member,
            seat=seat,
            generation=self.generation,
            step=self.step,
            at=self.t_end_ns / 1e9,
            seconds={str(phase): round(spent, 7) for phase, spent in self.seconds.items()},
            waited_s=round(self.waited_s, 7),
            cpu_s=None if self.cpu_s is None else round(self.cpu_s, 7),
            gc_s=round(self.gc_s, 7),
            starved_s=round(self.starved_s, 7),
            slots=self.slots,
            loss=self.loss,
            grad_norm=self.grad_norm,
            role=self.role,
            place=self.place,
        )


def encode_step(record: StepRecord) -> bytes:
    """The record's bytes, `STEP_BYTES` of them."""
    seconds = record.seconds
    body = _BODY.pack(
        record.number,
        record.step,
        record.t_end_ns,
        record.member,
        record.generation,
        record.slots,
        (record.cpu_s is not None) * _HAS_CPU
        | (record.loss is not None) * _HAS_LOSS
        | (record.grad_norm is not None) * _HAS_NORM,
        *(seconds.get(phase, 0.0) for phase in PHASES),
        record.waited_s,
        record.cpu_s or 0.0,
        record.gc_s,
        record.starved_s,
        record.loss or 0.0,
        record.grad_norm or 0.0,
        label(record.role, ROLE_BYTES),
        label(record.place, PLACE_BYTES),
    )
    return body + _CRC.pack(zlib.crc32(body))


def decode_step(data: bytes) -> StepRecord | None:
    """The record in these bytes, or None for one that was never or not wholly written."""
    body = data[: _BODY.size]
    if _CRC.unpack_from(data, _BODY.size)[0] != zlib.crc32(body):
        return None
    number, step, t_end, member, generation, slots, flags, *floats, role, place = _BODY.unpack(body)
    if not t_end:
        return None
    *phases, waited, cpu, gc, starved, loss, norm = floats
    return StepRecord(
        number=number,
        member=MemberId(member),
        generation=Generation(generation),
        step=Step(step),
        t_end_ns=t_end,
        seconds={phase: spent for phase, spent in zip(PHASES, phases, strict=True) if spent},
        waited_s=waited,
        cpu_s=cpu if flags & _HAS_CPU else None,
        gc_s=gc,
        starved_s=starved,
        slots=slots,
        loss=loss if flags & _HAS_LOSS else None,
        grad_norm=norm if flags & _HAS_NORM else None,
        role=_text(role),
        place=_text(place),
    )


def label(text: str, limit: int) -> bytes:
    """A role or place as it is stored.

    Raises:
      ValueError: it is not printable ASCII, or longer than there is room for.
    """
    if not (text.isascii() and (text.isprintable())) or len(text) > limit:
        raise ValueError(f"{text!r} must be printable ASCII of at most {limit} characters")
    return text.encode("ascii")


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("ascii", "replace")
