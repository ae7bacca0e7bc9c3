"""Stories: who stands where, and what the detector says."""

import json
import signal

import pytest

from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.detector import Detector
from ftkit.detection.observations import (
    Exited,
    ObserverLate,
    WorldChanged,
)
from ftkit.detection.row import Awaited, Phase
from tests.detection.scene import CONFIG, Scene, world

LIMIT = CONFIG.max_stall_s
TICKS = 2 * CONFIG.tick_s


def said(verdicts: list[Verdict]) -> list[tuple[Seat, Fault]]:
    return [(v.seat, v.fault) for v in verdicts]


@pytest.mark.parametrize(
    ("state", "busy", "fault"),
    [
        ("S", 0.0, Fault.HANG_BLOCKED),
        ("S", 0.02, Fault.HANG_BLOCKED),
        ("D", 0.0, Fault.HANG_BLOCKED),
        ("R", 1.0, Fault.HANG_BUSY),
        ("R", 0.2, Fault.HANG_BUSY),
        ("T", 0.0, Fault.STOPPED),
        ("t", 0.0, Fault.STOPPED),
    ],
)
@pytest.mark.parametrize("phase", [Phase.DATA, Phase.FORWARD, Phase.OPTIMIZER, Phase.CAPTURE])
def test_a_member_others_wait_for_is_named_with_its_kind(state, busy, fault, phase) -> None:
    scene = Scene(4)
    scene.set(2, phase=phase)
    scene.wait(0, 1, 3)
    scene.states[2], scene.busy[2] = state, busy
    assert LIMIT < scene.first(within=LIMIT + TICKS) <= LIMIT + TICKS
    verdicts = scene.tick()
    assert said(verdicts) == [(2, fault)]
    verdict = verdicts[0]
    assert verdict.evicts
    assert verdict.since_s == pytest.approx(1000.0)
    evidence = json.loads(json.dumps(dict(verdict.evidence)))
    assert evidence["phase"] == phase
    assert evidence["step"] == 10
    assert evidence["state"] == state
    assert [w["seat"] for w in evidence["waiters"]] == [0, 1, 3]
    assert {w["seq"] for w in evidence["waiters"]} == {51}
    assert evidence["waiters"][0]["op"] == "all_reduce"
    assert evidence["limit_s"] == LIMIT
    assert "3 members wait for it in all_reduce 51 of group 0" in verdict.reason
    assert "10.0 s" in verdict.reason


def test_the_verdict_is_said_again_while_it_holds_and_not_after() -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    assert said(scene.until(LIMIT + TICKS)) == [(2, Fault.HANG_BLOCKED)]
    assert said(scene.tick()) == [(2, Fault.HANG_BLOCKED)]
    scene.set(2, entered=51, pending_since=scene.clock.now())
    assert scene.tick() == []


def test_a_stopped_member_nobody_waits_for_is_not_judged() -> None:
    scene = Scene(2)
    scene.states[1] = "T"
    for _ in range(100):
        scene.set(0)
        assert scene.tick() == []


def test_the_stall_counts_from_the_first_waiter_not_from_the_last_progress() -> None:
    scene = Scene(3)
    scene.until(LIMIT * 0.9)  # seat 2 computes long; so do the others
    scene.wait(0)
    assert scene.until(LIMIT * 0.8) == []
    scene.wait(1)
    assert scene.first(within=LIMIT) == pytest.approx(LIMIT * 0.2, abs=TICKS)


def test_slow_but_moving_is_not_hung() -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    for _ in range(8):
        scene.set(2)
        assert scene.until(LIMIT * 0.9) == []


def test_an_allowance_is_not_counted() -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    scene.set(2, allowance=scene.clock.now() + 50)
    assert scene.first(within=50 + LIMIT + TICKS) > 50 + LIMIT


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.RECOVERY])
def test_phases_with_their_own_deadlines_are_left_alone(phase) -> None:
    scene = Scene(3)
    scene.set(2, phase=phase)
    scene.wait(0, 1)
    assert scene.until(LIMIT * 15) == []


@pytest.mark.parametrize("change", [{"phase": Phase.SETUP}, {"warm": False}])
def test_setup_and_the_first_step_have_a_longer_grace(change) -> None:
    scene = Scene(3)
    scene.set(2, **change)
    scene.wait(0, 1)
    grace = CONFIG.setup_stall_s
    assert grace < scene.first(within=grace + TICKS) <= grace + TICKS
    assert said(scene.tick()) == [(2, Fault.HANG_BLOCKED)]


def test_several_culprits_are_all_named() -> None:
    scene = Scene(4)
    scene.wait(0, 3)
    scene.states[2] = "T"
    assert said(scene.until(LIMIT + TICKS)) == [(1, Fault.HANG_BLOCKED), (2, Fault.STOPPED)]


def test_who_waits_for_someone_behind_him_is_a_victim() -> None:
    # Seat 0, a broadcast's root, went on to 52; seat 1 still waits in 51, which seat 2 never
    # entered.
    scene = Scene(3)
    scene.wait(0, entered=52)
    scene.wait(1, entered=51, op="broadcast")
    assert said(scene.until(LIMIT + TICKS)) == [(2, Fault.HANG_BLOCKED)]


def test_a_member_left_behind_in_an_older_collective_is_the_culprit() -> None:
    scene = Scene(3)
    scene.wait(0, 1, entered=52)
    scene.wait(2, entered=51)
    scene.states[2] = "T"
    assert said(scene.until(LIMIT + TICKS)) == [(2, Fault.STOPPED)]


def test_waiting_in_a_group_of_its_own_is_no_guilt() -> None:
    scene = Scene(3)
    scene.wait(0, group=1, entered=7)
    scene.wait(1, group=2, entered=900)
    assert said(scene.until(LIMIT + TICKS)) == [(2, Fault.HANG_BLOCKED)]


def test_who_already_left_the_collective_is_not_waited_for() -> None:
    scene = Scene(2)
    scene.wait(0, entered=51)
    scene.set(1, entered=51)  # the root of a broadcast: left, and computes
    assert scene.until(LIMIT * 4) == []


def test_a_vote_that_no_collective_tells_of() -> None:
    scene = Scene(3)
    scene.set(0, phase=Phase.VOTE)
    scene.set(1, phase=Phase.VOTE)
    scene.set(2, phase=Phase.FORWARD)
    verdicts = scene.until(LIMIT + TICKS)
    assert said(verdicts) == [(2, Fault.HANG_BLOCKED)]
    assert "in the vote of step 10" in verdicts[0].reason


def test_everybody_in_the_same_collective_is_communication() -> None:
    scene = Scene(3)
    scene.wait(0, 1, 2)
    verdicts = scene.until(LIMIT + TICKS)
    assert said(verdicts) == [(s, Fault.HANG_COMM) for s in range(3)]
    assert not any(v.evicts for v in verdicts)


@pytest.mark.parametrize(("waiting", "size"), [(True, 2000), (False, 400)])
def test_what_is_told_of_a_job_that_stands_still_grows_with_it_and_not_with_its_square(
    waiting, size
) -> None:
    def told(size: int) -> int:
        scene = Scene(size)
        if waiting:
            scene.wait(*range(size))
            everyone = tuple(MemberId(100 + i) for i in range(min(size, 40)))
            scene.awaited = {
                i: Awaited(group=0, seq=51, at_ns=1, members=everyone) for i in range(size)
            }
        verdicts: list[Verdict] = []
        while not verdicts:
            assert scene.clock.now() < 1000.0 + 6 * LIMIT
            verdicts = scene.tick(1.0)
        assert len(verdicts) == size
        return sum(len(json.dumps(dict(v.evidence))) for v in verdicts)

    assert told(size) < 12 * told(size // 10)


def test_stopped_inside_the_collective_everybody_is_in() -> None:
    scene = Scene(3)
    scene.wait(0, 1, 2)
    scene.states[1] = "T"
    assert said(scene.until(LIMIT + TICKS)) == [(1, Fault.STOPPED)]


def test_a_heartbeat_that_alone_stands_still_inside_the_collective() -> None:
    scene = Scene(3)
    scene.wait(0, 1, 2)
    scene.beating[1], scene.busy[1] = False, 1.0
    assert said(scene.until(LIMIT + TICKS)) == [(1, Fault.HANG_BUSY)]


@pytest.mark.parametrize("waiting", [True, False])
def test_all_stopped_together_are_not_evicted(waiting) -> None:
    scene = Scene(3)
    if waiting:
        scene.wait(0, 1, 2)
    scene.states = dict.fromkeys(range(3), "T")
    verdicts = scene.until(LIMIT * 6)
    assert {v.fault for v in verdicts} == {Fault.HANG_COMM if waiting else Fault.STALL}


def test_when_everybody_accuses_everybody_nobody_is_evicted() -> None:
    # Seat 0 votes on step 11 and waits for seat 1, which is in a collective of step 10 that seat
    # 0 never entered.
    scene = Scene(2)
    scene.set(0, phase=Phase.VOTE, step=11)
    scene.wait(1, step=10)
    assert said(scene.until(LIMIT + TICKS)) == [(0, Fault.HANG_COMM), (1, Fault.HANG_COMM)]


def test_different_ops_at_the_same_place_are_a_desync() -> None:
    scene = Scene(3)
    scene.wait(0, 2)
    scene.wait(1, op="broadcast")
    verdicts = scene.until(LIMIT + TICKS)
    assert said(verdicts) == [(1, Fault.DESYNC)]
    assert "broadcast 51" in verdicts[0].reason
    assert "all_reduce" in verdicts[0].reason


def test_a_tie_of_ops_names_both_sides() -> None:
    scene = Scene(2)
    scene.wait(0)
    scene.wait(1, op="broadcast")
    assert said(scene.until(LIMIT + TICKS)) == [(0, Fault.DESYNC), (1, Fault.DESYNC)]


def test_done_while_others_wait_is_a_desync() -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    scene.set(2, phase=Phase.DONE)
    verdicts = scene.until(LIMIT + TICKS)
    assert said(verdicts) == [(2, Fault.DESYNC)]
    assert "ended its training" in verdicts[0].reason


@pytest.mark.parametrize("size", [1, 3])
def test_nothing_moves_and_nobody_waits(size) -> None:
    scene = Scene(size)
    assert scene.until(5 * LIMIT - TICKS) == []
    assert said(scene.until(2 * TICKS)) == [(s, Fault.STALL) for s in range(size)]


def test_all_done_is_no_stall() -> None:
    scene = Scene(2)
    for seat in range(2):
        scene.set(seat, phase=Phase.DONE)
    assert scene.until(20 * LIMIT) == []


# Gone ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "killed_by", "text"),
    [(1, None, "code 1"), (None, signal.SIGKILL, "signal 9"), (None, None, "nobody can know")],
)
def test_an_exit_is_said_at_once_and_excuses_those_that_wait(code, killed_by, text) -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    scene.tick()
    scene.detector.ingest(
        Exited(member=MemberId(102), seat=Seat(2), code=code, signal=killed_by, at=1000.2)
    )
    for _ in range(100):
        verdicts = scene.tick()
        assert said(verdicts) == [(2, Fault.EXITED)]
        assert text in verdicts[0].reason
        assert verdicts[0].evidence["phase"] == Phase.FORWARD


def test_a_clean_exit_is_nobodys_fault() -> None:
    scene = Scene(2)
    scene.set(1, phase=Phase.DONE)
    scene.tick()
    scene.detector.ingest(Exited(member=MemberId(101), seat=Seat(1), code=0, signal=None, at=1))
    scene.set(0)
    assert scene.tick() == []


def test_an_exit_known_before_its_world_is_not_forgotten() -> None:
    detector = Detector(CONFIG)
    detector.ingest(Exited(member=MemberId(101), seat=Seat(1), code=3, signal=None, at=1))
    assert detector.tick(2.0) == []
    detector.ingest(WorldChanged(world=world(2), at=2.0))
    assert said(detector.tick(2.1)) == [(1, Fault.EXITED)]


# Who may be judged, and on what --------------------------------------------------------------


def test_blind_is_not_healthy() -> None:
    scene = Scene(3)
    scene.tick()
    assert scene.detector.blind == {}
    scene.hidden = {1}
    scene.set(0)
    scene.until(CONFIG.blind_after_s + TICKS)
    assert set(scene.detector.blind) == {101}
    assert scene.detector.blind[MemberId(101)] > CONFIG.blind_after_s


def test_old_rows_accuse_nobody() -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    scene.until(LIMIT * 0.9)
    scene.hidden = {0, 1, 2}
    assert scene.until(LIMIT * 3) == []


@pytest.mark.parametrize("generation", [0, 2])
def test_rows_of_another_generation_are_ignored(generation) -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    scene.set(2, generation=generation)
    assert scene.until(LIMIT * 3) == []
    assert set(scene.detector.blind) == {102}


def test_a_new_world_starts_with_a_clean_slate() -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    assert scene.until(LIMIT + TICKS)
    scene.detector.ingest(WorldChanged(world=world(2, generation=2), at=scene.clock.now()))
    assert scene.tick() == []
    # An older world that comes late changes nothing.
    scene.detector.ingest(WorldChanged(world=world(3), at=scene.clock.now()))
    assert scene.tick() == []


@pytest.mark.parametrize("reported", [True, False])
def test_a_late_observer_stretches_the_limit(reported) -> None:
    scene = Scene(3)
    scene.wait(0, 1)
    scene.until(LIMIT * 0.5)
    pause = LIMIT * 3
    if reported:
        scene.detector.ingest(ObserverLate(by_s=pause))
        assert scene.tick(pause) == []
    else:
        assert scene.tick(pause) == []
    assert scene.until(LIMIT * 0.4) == []
    assert scene.first(within=LIMIT * 0.2)


def test_agents_that_are_always_a_little_late_do_not_keep_a_hang_from_being_named() -> None:
    scene = Scene(3)
    wait_from = scene.clock.now() + 120
    while scene.clock.now() < wait_from + LIMIT * 1.5:
        if scene.clock.now() < wait_from:
            for seat in range(3):
                scene.set(seat)
        elif scene.rows[0].entered != 51:
            scene.wait(0, 1)
        scene.detector.ingest(ObserverLate(by_s=0.06, who=NodeId(0)))
        verdicts = scene.tick(0.25)
    assert said(verdicts) == [(2, Fault.HANG_BLOCKED)]


def test_the_limit_grows_with_the_slowest_step_but_not_with_the_first_ones() -> None:
    scene = Scene(2)
    step = 10
    for seconds in (9.0, 9.0, 9.0, 8.0, 2.0):
        step += 1
        for seat in range(2):
            scene.set(seat, step=step)
        scene.until(seconds)
    # 9, 9 are excluded (and what came before was seen from its middle); the third counts.
    assert scene.detector.limit_s == pytest.approx(2 * 9.0, abs=2 * TICKS)


def test_a_step_with_an_allowance_or_an_accusation_is_no_slow_step() -> None:
    scene = Scene(2)
    for step in range(11, 16):
        for seat in range(2):
            scene.set(seat, step=step)
        scene.until(1.0)
    for seat in range(2):
        scene.set(seat, step=16, allowance=scene.clock.now() + 40)
    scene.until(40)
    scene.set(0, step=17, entered=51, pending_since=scene.clock.now())
    scene.set(1, step=17)
    assert scene.until(30)
    for seat in range(2):
        scene.set(seat, step=18)
    scene.tick()
    assert scene.detector.limit_s == LIMIT


@pytest.mark.parametrize("told_by", ["kernel", "heartbeat"])
def test_one_stopped_in_the_middle_of_its_ballots_takes_nobody_with_it(told_by: str) -> None:
    """Seat 0 has got its ballot and gone on, seat 2 waits for it as seat 0 waits for seat 2."""
    scene = Scene(3)
    scene.wait(1, 2, entered=51, op="exchange")
    scene.states[1] = "T" if told_by == "kernel" else "S"
    scene.beating[1] = False
    scene.tick()
    scene.wait(0, entered=52, op="reduce_slots")
    seats = {seat for seat, _ in said(scene.until(LIMIT + 2))}
    assert seats == {1}


def test_two_stopped_in_one_place_are_both_named() -> None:
    scene = Scene(4)
    scene.wait(1, 2, 3, entered=51, op="exchange")
    for seat in (1, 2):
        scene.states[seat], scene.beating[seat] = "T", False
    scene.tick()
    scene.wait(0, entered=52, op="reduce_slots")
    assert said(scene.until(LIMIT + 2)) == [(1, Fault.STOPPED), (2, Fault.STOPPED)]


def test_long_compute_before_a_block_is_not_busy() -> None:
    scene = Scene(2)
    scene.busy[1] = 1.0
    scene.wait(0)
    scene.until(LIMIT * 0.3)
    scene.busy[1] = 0.0
    assert said(scene.until(LIMIT * 0.8)) == [(1, Fault.HANG_BLOCKED)]


def test_no_world_no_verdict() -> None:
    detector = Detector(CONFIG)
    assert detector.tick(1.0) == []
    assert detector.blind == {}
