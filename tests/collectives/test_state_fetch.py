"""Who sends what: disjoint pieces that cover what is wanted, evenly shared out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.collectives.state_fetch import Range, pack_wants, parse_wants, share_out, without
from ftkit.core.errors import ProtocolError


def covered(spans):
    """Bytes by tensor, each counted as often as it is covered."""
    return Counter((s.tensor, at) for s in spans for at in range(s.start, s.stop))


ranges = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(1, 30)).map(
        lambda r: Range(r[0], r[1], r[1] + r[2])
    ),
    max_size=4,
)


@given(st.lists(ranges, min_size=3, max_size=3), st.integers(0, 3), st.integers(1, 16))
def test_pieces_are_what_was_wanted_from_those_who_have_it(wants, attempt, piece_bytes):
    holders = [(0, 2), (1,), (0, 1, 2)]
    pieces = share_out(wants, holders, attempt=attempt, piece_bytes=piece_bytes)
    for receiver, spans in enumerate(wants):
        assert covered(p.range for p in pieces if p.receiver == receiver) == covered(spans)
    assert all(p.holder in holders[p.range.tensor] for p in pieces)
    assert all(p.range.stop - p.range.start <= piece_bytes for p in pieces)
    if attempt:
        assert len({(p.range.tensor, p.holder) for p in pieces}) == len(
            {p.range.tensor for p in pieces}
        ), "one holder alone, so that a bad one is found out"


def test_the_load_is_even_over_large_and_small_tensors():
    wants = [[], [], [], [Range(0, 0, 1000), *(Range(t, 0, 10) for t in range(1, 31))]]
    pieces = share_out(wants, [(0, 1, 2)] * 31, piece_bytes=64)
    load = Counter[int]()
    for p in pieces:
        load[p.holder] += p.range.stop - p.range.start
    assert max(load.values()) - min(load.values()) <= 64


def test_a_bad_holder_is_left_out_sooner_or_later():
    tried = {
        share_out([[], [], [Range(0, 0, 9)]], [(0, 1)], attempt=attempt)[0].holder
        for attempt in (1, 2)
    }
    assert tried == {0, 1}


@given(ranges, ranges)
def test_what_has_arrived_is_not_wanted_again(wanted, arrived):
    left = covered(without(wanted, arrived))
    gone = covered(arrived)
    assert left == Counter({k: n for k, n in covered(wanted).items() if k not in gone})


@given(ranges)
def test_wants_are_read_as_they_were_written(wants):
    assert parse_wants(pack_wants(wants), [100] * 3) == wants


@pytest.mark.parametrize(
    "noise", [b"", b"{", b"7", b"[[0]]", b"[[0,0,101]]", b"[[9,0,1]]", b"[[0,5,5]]", b"[[-1,0,1]]"]
)
def test_what_lies_outside_the_tensors_is_refused(noise):
    with pytest.raises(ProtocolError):
        parse_wants(noise, [100] * 3)
