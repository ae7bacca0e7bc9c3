"""Rounds with members as threads of one process, cut at every operation in turn.

Every phase moves the one parameter by exactly 1 and the outer step is a plain mean, so after
R rounds it must be -R: a round applied twice, or not at all, shows, whoever took part in it.
"""

# mypy: allow-untyped-calls

import threading
from typing import Any

import pytest
import torch

from ftkit.collectives.handle import failed
from ftkit.collectives.meeting import Note, settle
from ftkit.collectives.outer import Outer
from ftkit.collectives.rounds import Rounds
from ftkit.core.errors import GenerationAborted, JobStopped, ProtocolError, UsageError

from .worlds import make_group, world

LIMIT_S = 30


class Gone(Exception):
    """A member's thread ends here, as if it were killed."""


class Fleet:
    """Decides who is a member; edits all once all who live have asked for it."""

    def __init__(self, ids):
        self.cond = threading.Condition()
        self.generation = 1
        self.waiting = set()
        self.groups = {}
        self.at_ten, self.may_go_on = threading.Event(), threading.Event()
        """Members stop in their tenth round until a newcomer, who waits for that, has knocked."""
        for id_ in ids:
            self.groups[id_], _ = make_group(id_, "tcp")

    @property
    def world(self):
        return world(self.generation, {i: g.address for i, g in self.groups.items()})

    def repair(self, id_):
        with self.cond:
            before = self.generation
            self.waiting.add(id_)
            self._advance()
            while self.generation == before:
                assert self.cond.wait(LIMIT_S), f"member {id_} waits for {self.waiting}"
            decided = self.world
        self.groups[id_].edit(decided, timeout_s=LIMIT_S)

    def leave(self, id_):
        with self.cond:
            self.groups.pop(id_).close()
            self._advance()

    def enter(self, id_):
        """A newcomer: whoever trains is interrupted, and the next world has it too."""
        assert self.at_ten.wait(LIMIT_S)
        group, _ = make_group(id_, "tcp")
        with self.cond:
            others = list(self.groups.values())
            self.groups[id_] = group
        if others:
            others[0].abort(others[0].world.generation, "a newcomer")
        self.may_go_on.set()
        self.repair(id_)
        return group

    def _advance(self):
        if self.groups and self.waiting >= set(self.groups):
            self.generation += 1
            self.waiting.clear()
            self.cond.notify_all()

    def close(self):
        for group in self.groups.values():
            group.close()


class Cut:
    """A group whose `at`-th exchange, counted from 0, succeeds for others and fails here."""

    def __init__(self, group, at, dies):
        self._group, self._at, self._dies, self.count = group, at, dies, 0

    def __getattr__(self, name):
        return getattr(self._group, name)

    def exchange(self, payload):
        handle = self._group.exchange(payload)
        self.count += 1
        if self.count - 1 != self._at:
            return handle
        handle.wait(LIMIT_S)
        if self._dies:
            raise Gone
        self._group.abort(self._group.world.generation, "cut in half")
        return failed(GenerationAborted("cut in half"))


class Member(threading.Thread):
    """Trains until `until` rounds are done."""

    def __init__(self, fleet, id_, until, *, delay, codec=None, at=-1, dies=False, newcomer=False):
        super().__init__(daemon=True)
        self.fleet, self.id_, self.until, self.delay, self.codec = fleet, id_, until, delay, codec
        self.at, self.dies, self.newcomer = at, dies, newcomer
        self.param = torch.full((300,), float(10 * id_))  # rank 0's counts
        self.error = None
        self.rounds: Any = None
        self.outer: Any = None
        self.start()

    def run(self):
        try:
            if self.newcomer:
                self.fleet.enter(self.id_)
            else:
                self.fleet.groups[self.id_].edit(self.fleet.world, timeout_s=LIMIT_S)
            group: Any = Cut(self.fleet.groups[self.id_], self.at, self.dies)
            self.outer = Outer([self.param], lr=1.0, momentum=0.0)
            self.rounds = rounds = Rounds(
                self.outer,
                group,
                lambda: self.fleet.repair(self.id_),
                delay=self.delay,
                codec=self.codec,
                feedback=False,
            )
            rounds.join()
            self.outer.impose()
            while rounds.applied < self.until:
                self.param -= 1
                if rounds.applied == 10:
                    self.fleet.at_ten.set()
                    assert self.fleet.may_go_on.wait(LIMIT_S)
                rounds.advance(self.outer.drift())
                self.outer.impose()
            rounds.drain()
            self.outer.impose()
            group.barrier().wait(LIMIT_S)
        except Gone:
            self.fleet.leave(self.id_)
        except Exception as error:  # noqa: BLE001 - the test shows whatever it was
            self.error = error
            self.fleet.leave(self.id_)


def finish(fleet, members):
    """Join all; the states of those who lived to the end."""
    try:
        for member in members:
            member.join(LIMIT_S)
            assert not member.is_alive(), f"member {member.id_} hangs"
            if member.error is not None:
                raise member.error
        return [m.outer.params for m in members if m.id_ in fleet.groups]
    finally:
        fleet.close()


# Exchanges of a member: the first meeting, then one vote a round; after a cut a meeting more.
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("dies", [False, True], ids=["aborts", "dies"])
@pytest.mark.parametrize("at", range(4))
def test_a_vote_or_meeting_cut_in_half_is_counted_once(delay, dies, at):
    fleet = Fleet([0, 1, 2])
    members = [
        Member(fleet, i, 4, delay=delay, at=at if i == 1 else -1, dies=dies and i == 1)
        for i in range(3)
    ]
    states = finish(fleet, members)
    assert len(states) == (2 if dies else 3)
    for state in states:
        assert state.eq(-4.0 - delay).all()  # the last round under way is finished too


@pytest.mark.parametrize("delay", [0, 1])
def test_two_members_cut_at_different_times(delay):
    fleet = Fleet([0, 1, 2])
    cuts = {0: 5, 1: 2, 2: 3}
    states = finish(fleet, [Member(fleet, i, 6, delay=delay, at=cuts[i]) for i in range(3)])
    assert len(states) == 3
    for state in states:
        assert state.eq(-6.0 - delay).all()


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_newcomer_has_the_state_bit_for_bit_and_disturbs_no_round(delay, codec):
    fleet = Fleet([0, 1])
    members = [Member(fleet, i, 20, delay=delay, codec=codec) for i in range(2)]
    members.append(Member(fleet, 7, 20, delay=delay, codec=codec, newcomer=True))
    first, *others = finish(fleet, members)
    assert len(others) == 2
    for state in others:
        assert torch.equal(state, first)
    torch.testing.assert_close(first, torch.full_like(first, -20.0 - delay))
    assert members[2].rounds.applied == 20 + delay


def test_when_all_who_held_the_state_are_gone_the_newcomers_say_so():
    group, _ = make_group(5, "tcp")
    with group:
        outer = Outer([torch.zeros(3)], lr=1.0, momentum=0.0)
        rounds = Rounds(outer, group, lambda: None, delay=0, codec=None, feedback=False)
        rounds._seen = 12  # learned at a meeting whose other members died before handing over
        with pytest.raises(JobStopped, match="round 12 is lost"):
            rounds.join()


def test_members_that_differ_in_settings_are_told():
    fleet = Fleet([0, 1])
    members = [Member(fleet, i, 1, delay=i) for i in range(2)]
    for member in members:
        member.join(LIMIT_S)
    fleet.close()
    assert [type(m.error) for m in members] == [UsageError] * 2
    assert "differ in" in str(members[0].error)


def test_misuse_is_named():
    group, _ = make_group(0, "tcp")
    with group:
        outer = Outer([torch.zeros(3)], lr=1.0, momentum=0.0)
        with pytest.raises(ValueError, match="needs a codec"):
            Rounds(outer, group, lambda: None, delay=0, codec=None, feedback=True)
        rounds = Rounds(outer, group, lambda: None, delay=0, codec=None, feedback=False)
        with pytest.raises(UsageError, match="call join"):
            rounds.advance(torch.zeros(3))
        rounds.join()
        group.abort(group.world.generation, "drill")
        with pytest.raises(UsageError, match=r"repair\(\) returned"):
            rounds.advance(torch.zeros(3))


def note(applied, applied_in=1, held_in=-1, *, drifts=1, seen=0, counted=3):
    end = max(applied, 0) + drifts
    return Note(applied, applied_in, held_in, end, max(seen, applied, 0), counted, 77)


def test_at_the_beginning_all_take_what_rank_0_has():
    settled = settle([note(-1, drifts=0)] * 3)
    assert settled.sources == {1: 0, 2: 0}
    assert (settled.best.applied, settled.end, settled.forward) == (0, 0, frozenset())


def test_who_holds_the_sum_of_a_passed_vote_rolls_forward_and_others_take_the_state():
    settled = settle([note(5), note(6, 4), note(5, 1, held_in=4), note(-1, drifts=0), note(6, 4)])
    assert settled.forward == {2}
    assert settled.sources == {0: 1, 3: 4}, "spread over those who are furthest"
    assert settled.end == 7


def test_a_sum_of_another_attempt_at_the_same_round_is_not_applied():
    # Rank 1 was put out after it had its sum in generation 3; the round was made in 4.
    settled = settle([note(6, 4), note(5, 1, held_in=3)])
    assert settled.forward == frozenset()
    assert settled.sources == {1: 0}


def test_a_round_applied_alone_and_made_again_by_the_others_is_theirs():
    settled = settle([note(6, 3), note(6, 4), note(6, 4)])
    assert settled.sources == {0: 1}
    assert settled.best.applied_in == 4


def test_a_sum_whose_vote_nobody_saw_pass_is_dropped():
    settled = settle([note(5, 2, held_in=3), note(5, 2), note(5, 2, held_in=3)])
    assert settled.forward == frozenset()
    assert not settled.sources


def test_a_round_that_was_seen_and_is_held_by_nobody_stops_the_job():
    with pytest.raises(JobStopped, match="round 9 is lost"):
        settle([note(-1, seen=9, drifts=0), note(-1, drifts=0)])


def test_a_note_of_another_length_is_refused():
    assert Note.read(note(5).pack()) == note(5)
    with pytest.raises(ProtocolError, match="3 bytes"):
        Note.read(b"abc")
