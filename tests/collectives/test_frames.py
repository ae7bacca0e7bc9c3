"""Frames: whatever arrives is a valid header or a ProtocolError, never anything else."""

# mypy: allow-untyped-calls

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.collectives.frames import (
    CONTROL_BYTES_MAX,
    HEADER_BYTES,
    OFFER_BYTES,
    SEGMENT_BYTES_MAX,
    Header,
    Kind,
    Offer,
    pack,
    pack_offer,
    parse,
    parse_offer,
)
from ftkit.collectives.fuse import Fuse
from ftkit.collectives.link import Link, Ticket
from ftkit.core.errors import ProtocolError, WireError
from ftkit.core.ids import MemberId

U32 = st.integers(0, 2**32 - 1)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    kind = draw(st.sampled_from(Kind))
    limit = SEGMENT_BYTES_MAX if kind is Kind.DATA else CONTROL_BYTES_MAX
    length = draw(st.integers(0, limit))
    offset = draw(st.integers(0, 2**39)) if kind is Kind.DATA else 0
    total = offset + length + (draw(st.integers(0, 2**38)) if kind is Kind.DATA else 0)
    return Header(
        kind,
        draw(st.integers(0, 1)),
        draw(U32),
        draw(U32),
        draw(st.integers(0, 2**64 - 1)),
        draw(U32),
        draw(U32),
        draw(U32),
        offset,
        total,
        length,
    )


@given(headers())
def test_a_header_survives_the_wire(header):
    assert parse(pack(header)) == header


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_garbage_is_refused(data):
    with pytest.raises(ProtocolError):
        parse(data)


@given(headers(), st.integers(0, HEADER_BYTES * 8 - 1))
def test_any_flipped_bit_is_noticed(header, bit):
    data = bytearray(pack(header))
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        parse(data)


@pytest.mark.parametrize(
    "change",
    [
        {"length": SEGMENT_BYTES_MAX + 1, "total": SEGMENT_BYTES_MAX + 1},
        {"total": 2**41},
        {"offset": 10, "length": 10, "total": 19},
        {"kind": Kind.TELL, "length": CONTROL_BYTES_MAX + 1, "total": CONTROL_BYTES_MAX + 1},
        {"flags": 2},
        {"kind": 77},
    ],
)
def test_an_impossible_header_is_refused_though_its_checksum_is_right(change):
    good = Header(Kind.DATA, 0, 1, 1, 1, 0, 0, 1, 0, 8, 8)
    with pytest.raises(ProtocolError):
        parse(pack(good._replace(**change)))


U64 = st.integers(0, 2**64 - 1)


@given(st.builds(Offer, U64, U64, st.integers(-1, 2**31 - 1), U64, U64, U64, U64, st.booleans()))
def test_an_offer_survives_the_wire(offer):
    assert parse_offer(pack_offer(offer)) == offer


@given(st.binary(max_size=60).filter(lambda b: len(b) != OFFER_BYTES))
def test_an_offer_of_another_size_is_refused(data):
    with pytest.raises(ProtocolError):
        parse_offer(data)


class Inbox:
    """A router that keeps whole messages."""

    def __init__(self):
        self.messages = {}
        self.park = False

    def place(self, link, header):
        if self.park:
            return None
        memory = self.messages.setdefault(header.seq, bytearray(header.total))
        return memoryview(memory)[header.offset : header.offset + header.length], "token"

    def arrived(self, link, header, view, token):
        pass


def make_pair(segment=4096):
    a, b = socket.socketpair()
    kwargs = {"cma": None, "can_offer": False, "segment_bytes": segment, "fuse": Fuse()}
    return Link(a, MemberId(2), **kwargs), Link(b, MemberId(1), **kwargs), b


def data_header(seq, size, generation=1):
    return Header(Kind.DATA, 0, 0, generation, seq, 0, 0, 1, 0, size, size)


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=6))
def test_messages_of_any_size_arrive_whole(sizes):
    out, in_, _ = make_pair()
    inbox, tickets = Inbox(), []
    payloads = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
    for seq, payload in enumerate(payloads):
        tickets.append(Ticket())
        out.queue(
            data_header(seq, len(payload)), memoryview(payload), tickets[-1], urgent=seq % 2 == 0
        )
    for _ in range(1000):
        out.flush()
        in_.receive(inbox)
        if not out.has_output:
            break
    in_.receive(inbox)
    assert all(t.done for t in tickets)
    assert {s: bytes(m) for s, m in inbox.messages.items()} == dict(enumerate(payloads))
    out.close()
    in_.close()


def read_to_the_end(link):
    for _ in range(5):
        link.receive(Inbox())


@given(st.binary(min_size=1, max_size=300))
def test_a_link_fed_with_garbage_fails_cleanly(data):
    out, in_, _ = make_pair()
    out.sock.sendall(data)
    out.close()
    with pytest.raises((ProtocolError, WireError)):
        read_to_the_end(in_)
    in_.close()


def test_a_frame_in_another_members_name_is_refused():
    out, in_, _ = make_pair()
    out.queue(data_header(0, 0)._replace(source=9), memoryview(b""), None, urgent=True)
    out.flush()
    with pytest.raises(ProtocolError, match="in the name of 9"):
        in_.receive(Inbox())
    out.close()
    in_.close()


def test_an_aborted_send_finishes_only_the_segment_it_began_and_from_a_copy():
    segment = 1 << 20
    out, in_, _ = make_pair(segment)
    memory = bytearray(b"a" * (8 * segment))
    ticket = Ticket()
    out.queue(data_header(1, len(memory)), memoryview(memory), ticket, urgent=False)
    out.flush()
    assert out.has_output, "the socket took 8 MiB at once: nothing was left to abort"
    out.drop_output(1)
    memory[:] = b"z" * len(memory)  # the owner reuses it at once
    out.queue(data_header(2, 5, generation=2), memoryview(b"fresh"), None, urgent=False)
    inbox = Inbox()
    while out.has_output:
        out.flush()
        in_.receive(inbox)
    in_.receive(inbox)
    assert bytes(inbox.messages[2]) == b"fresh", "the stream went out of frame"
    assert b"z" not in inbox.messages[1]
    assert inbox.messages[1].count(b"a") < len(memory)
    assert not ticket.done
    out.close()
    in_.close()


def test_a_parked_link_keeps_its_place():
    out, in_, _ = make_pair()
    out.queue(data_header(1, 3), memoryview(b"abc"), None, urgent=True)
    out.flush()
    inbox = Inbox()
    inbox.park = True
    in_.receive(inbox)
    assert in_.parked
    assert in_.parked_bytes == 3
    inbox.park = False
    in_.receive(inbox)
    assert not in_.parked
    assert bytes(inbox.messages[1]) == b"abc"
    out.close()
    in_.close()
