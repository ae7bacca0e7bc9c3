"""Ring: where a member stands in its collectives, read off the last 256 of them. Pure.

A record is written once, when its collective begins, and one word of it when that ends (`row` has
the layout). All else a reader works out: the oldest that is pending is the one that is waited for.
Places of pending records are not written over, so it is there however many came after it.

A look costs some tens of microseconds, at ten a second; the two stores it saves cost a rank more
than a microsecond at every collective.
"""

from typing import Final, NamedTuple

from ftkit.core.ids import Generation, MemberId
from ftkit.detection.row import RECORD_BYTES, WORD, OpRecord, decode_record

RING_RECORDS: Final = 256
RING_BYTES: Final = RING_RECORDS * RECORD_BYTES

_WORDS: Final = RECORD_BYTES // 8
#: Words of a record: t_leave, with the outcome as its sign; seq; t_enter; member and generation;
#: the group, in the low half.
_T_LEAVE, _SEQ, _T_ENTER, _IDENTITY, _GROUP = 0, 2, 3, 5, 6
_SIGN: Final = 1 << 63


class Standing(NamedTuple):
    """Where one member stands, in one generation. Times in ns of its own clock."""

    group: int = 0
    """Of the collective described: the oldest pending, or the last that ended."""
    entered: int = -1
    """The highest collective of `group` that was entered; -1: none."""
    left: int = -1
    """The one before the pending one; `entered` when none is."""
    op: str = ""
    t_enter_ns: int = 0
    """0: none is pending."""
    t_moved_ns: int = 0
    """When the last one began or ended."""


def standing(ring: bytes, member: MemberId, generation: Generation) -> Standing:
    """What a ring says of `member` in `generation`.

    Args:
      ring: a copy of it; it may have been written meanwhile.
      member: whose records count; a seat's ring keeps those of members before it.
      generation: likewise.
    """
    words = memoryview(ring).cast("Q")
    mine = member | generation << 32
    identities = words[_IDENTITY::_WORDS].tolist()
    places = [i for i, identity in enumerate(identities) if identity == mine]
    if not places:
        return Standing()
    enters = words[_T_ENTER::_WORDS].tolist()
    leaves = [_when(word) for word in words[_T_LEAVE::_WORDS].tolist()]

    def first(among: list[int], key: list[int], *, last: bool) -> OpRecord | None:
        """The whole record with the least of `key`, or with the most."""
        # One that is being written has no checksum yet: the look came before it, so to speak.
        while among:
            i = (max if last else min)(among, key=key.__getitem__)
            if record := decode_record(ring[i * RECORD_BYTES : (i + 1) * RECORD_BYTES]):
                return record
            among = [j for j in among if j != i]
        return None

    oldest = first([i for i in places if not leaves[i]], enters, last=False)
    ended = first([i for i in places if leaves[i]], leaves, last=True)
    shown = oldest or ended
    if shown is None:
        return Standing()
    newest = first(places, enters, last=True) or shown
    seqs, groups = words[_SEQ::_WORDS].tolist(), words[_GROUP::_WORDS].tolist()
    highest = first([i for i in places if groups[i] & WORD == shown.group], seqs, last=True)
    entered = (highest or shown).seq
    return Standing(
        group=shown.group,
        entered=entered,
        left=shown.seq - 1 if oldest else entered,
        op=shown.op,
        t_enter_ns=shown.t_enter_ns if oldest else 0,
        t_moved_ns=max(newest.t_enter_ns, ended.t_leave_ns if ended else 0),
    )


def newest(ring: bytes, count: int) -> list[OpRecord]:
    """The last `count` collectives of a ring, oldest first, whatever member made them.

    Records that are being written, or whose bytes flipped, are left out.
    """
    enters = memoryview(ring).cast("Q")[_T_ENTER::_WORDS].tolist()
    places = sorted((i for i, at in enumerate(enters) if at), key=enters.__getitem__)
    found = (
        decode_record(ring[i * RECORD_BYTES : (i + 1) * RECORD_BYTES]) for i in places[-count:]
    )
    return [record for record in found if record]


def _when(word: int) -> int:
    """The time in a word whose sign is the outcome."""
    return word if word < _SIGN else (1 << 64) - word
