"""The data plane's frames: a fixed header, checked before anything is allocated, then bytes.

A *message* is one transfer between two members (a chunk of a collective, a p2p tensor). It
travels as one or more frames of at most `SEGMENT_BYTES_MAX`, so that a sender whose
generation is aborted has to finish only the segment it began to keep the stream in frame.

====== ======== ===============================================================
kind   payload  meaning
====== ======== ===============================================================
DATA   bytes    a segment of a message, at `offset` of `total`
OFFER  53 bytes where the message lies in the sender's memory: fetch it
ACK    none     the offered message was read; the sender may reuse its memory
ABORT  JSON     the generation is over: {"lost": [member, ...], "reason": text}
TELL   bytes    a small message outside any operation and any generation
BYE    none     the sender leaves cleanly; nothing follows
====== ======== ===============================================================

All integers are big-endian. The last field is the CRC-32 of the bytes before it: a stream
that slipped by one byte is noticed at the next header, not after a gigabyte.
"""

import struct
import zlib
from enum import IntEnum
from typing import NamedTuple

from ftkit.core.errors import ProtocolError

MAGIC = 0xF7C1
SEGMENT_BYTES_MAX = 16 << 20
CONTROL_BYTES_MAX = 1 << 20
MESSAGE_BYTES_MAX = 1 << 40

#: flag: the message belongs to send/recv, not to a collective.
P2P = 1

_BODY = struct.Struct("!HBBIIQIIIQQI")
_CRC = struct.Struct("!I")
HEADER_BYTES = _BODY.size + _CRC.size
_OFFER = struct.Struct("!QQiQQQQ?")
OFFER_BYTES = _OFFER.size


class Kind(IntEnum):
    """What a frame is; the table above."""

    DATA = 1
    OFFER = 2
    ACK = 3
    ABORT = 4
    TELL = 5
    BYE = 6


_KINDS = {int(k): k for k in Kind}


class Header(NamedTuple):
    """One frame's header. `length` bytes of payload follow it on the stream."""

    kind: Kind
    flags: int
    group: int
    generation: int
    seq: int
    tag: int
    part: int
    source: int
    offset: int
    total: int
    length: int


def pack(header: Header) -> bytes:
    """The header's `HEADER_BYTES` bytes."""
    body = _BODY.pack(MAGIC, *header)
    return body + _CRC.pack(zlib.crc32(body))


def parse(data: bytes | bytearray | memoryview, at: int = 0) -> Header:
    """Read the header at `data[at : at + HEADER_BYTES]`.

    Raises:
      ProtocolError: these bytes are no header of ours; nothing after them can be trusted.
    """
    body = data[at : at + _BODY.size]
    magic, kind, flags, group, generation, seq, tag, part, source, offset, total, length = (
        _BODY.unpack(body)
    )
    if magic != MAGIC:
        raise ProtocolError(f"frame begins with {magic:#06x}, not {MAGIC:#06x}")
    (crc,) = _CRC.unpack_from(data, at + _BODY.size)
    if crc != zlib.crc32(body):
        raise ProtocolError(f"frame header fails its checksum ({crc:#010x})")
    known = _KINDS.get(kind)
    if known is None or flags & ~P2P:
        raise ProtocolError(f"frame of unknown kind {kind} or flags {flags:#x}")
    limit, whole = (
        (SEGMENT_BYTES_MAX, MESSAGE_BYTES_MAX)
        if known is Kind.DATA
        else (CONTROL_BYTES_MAX, CONTROL_BYTES_MAX)
    )
    if length > limit or total > whole or offset + length > total:
        raise ProtocolError(
            f"{known.name} frame covers {offset}+{length} of {total} bytes; "
            f"at most {limit} a frame and {whole} a message are allowed"
        )
    return Header(known, flags, group, generation, seq, tag, part, source, offset, total, length)


class Offer(NamedTuple):
    """Where a message lies in the memory of its sender, in bytes."""

    address: int
    length: int
    fd: int = -1
    """Descriptor of the resident segment that holds it; -1 for private memory."""
    serial: int = 0
    """The segment's inode."""
    offset: int = 0
    """Where in the segment the message begins."""
    receipt: int = 0
    """What a reader writes into the segment when it is through; 0 for nothing."""
    receipt_offset: int = 0
    """Where it writes that: 8 bytes in the order of the host."""
    acknowledge: bool = True
    """Whether it also says so, by an ACK."""


def pack_offer(offer: Offer) -> bytes:
    """The payload of an OFFER."""
    return _OFFER.pack(*offer)


def parse_offer(payload: bytes | bytearray | memoryview) -> Offer:
    """The inverse of `pack_offer`. Raises ProtocolError when it is something else."""
    if len(payload) != _OFFER.size:
        raise ProtocolError(f"an offer has {_OFFER.size} bytes, got {len(payload)}")
    return Offer(*_OFFER.unpack(payload))
