"""Key: names a message within a job, the same at both of its ends."""

from typing import NamedTuple

from ftkit.collectives.frames import Header, Kind
from ftkit.core.ids import MemberId


class Key(NamedTuple):
    """One message; `peer` is the other end."""

    generation: int
    peer: int
    group: int
    seq: int
    tag: int
    part: int
    flags: int


def key_of(header: Header) -> Key:
    """The message that a frame from a peer belongs to."""
    return Key(
        header.generation,
        header.source,
        header.group,
        header.seq,
        header.tag,
        header.part,
        header.flags,
    )


def header_of(key: Key, member: MemberId, kind: Kind, total: int) -> Header:
    """What goes in front of a message of `total` bytes from `member`."""
    return Header(
        kind,
        key.flags,
        key.group,
        key.generation,
        key.seq,
        key.tag,
        key.part,
        member,
        0,
        total,
        total,
    )
