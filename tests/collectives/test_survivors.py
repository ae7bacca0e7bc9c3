"""Agreement among survivors, with every order of news that three of them can have."""

import itertools

import pytest

from ftkit.collectives.survivors import Statement, agreed, committed_anywhere, may_go_on
from ftkit.core.errors import ProtocolError
from ftkit.core.ids import MemberId


def ids(*members: int) -> frozenset[MemberId]:
    return frozenset(MemberId(m) for m in members)


def test_a_statement_survives_the_wire() -> None:
    statement = Statement(ids(3, 1), {0: 7, 12345: 1})
    assert Statement.from_bytes(statement.to_bytes()) == statement


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b'{"lost": 3}', b'{"lost": ["x"], "committed": []}', b"\xff"]
)
def test_what_is_no_statement_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        Statement.from_bytes(payload)


def test_agreement_needs_the_same_losses_from_all_who_live() -> None:
    mine = Statement(ids(2))
    assert not agreed(mine, {}, ids(1, 3))
    assert not agreed(mine, {MemberId(1): mine}, ids(1, 3))
    assert not agreed(mine, {MemberId(1): mine, MemberId(3): Statement(ids())}, ids(1, 3))
    more = {MemberId(1): mine, MemberId(3): Statement(ids(2, 1))}
    assert not agreed(mine, more, ids(1, 3))
    assert agreed(mine, {MemberId(1): mine, MemberId(3): mine}, ids(1, 3))


def test_no_two_parts_of_a_world_both_go_on() -> None:
    for size in range(1, 7):
        world = ids(*range(10, 10 + size))
        for count in range(size + 1):
            for part in itertools.combinations(sorted(world), count):
                living = frozenset(part)
                assert not (may_go_on(world, living) and may_go_on(world, world - living))
        assert may_go_on(world, world)


def test_what_one_has_committed_is_held_by_all() -> None:
    statements = [Statement(ids(), {0: 4}), Statement(ids(), {0: 5, 9: 1}), Statement(ids())]
    assert [committed_anywhere(channel, statements) for channel in (0, 9, 1)] == [5, 1, 0]
