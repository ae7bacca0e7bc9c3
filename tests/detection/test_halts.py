"""Stories: a rank is stopped between two worlds, where its row says nothing of the new one."""

from ftkit.core.ids import MemberId, Seat
from ftkit.core.verdict import Fault
from ftkit.detection.config import NAMED_FLOOR_S
from ftkit.detection.observations import ObserverLate, WorldChanged
from ftkit.detection.row import Phase
from tests.detection.scene import Scene, world


def entering() -> Scene:
    """Three ranks of generation 1, of which 2 begins; their rows still are of 1."""
    scene = Scene(3)
    scene.tick()
    scene.detector.ingest(WorldChanged(world=world(3, generation=2), at=scene.clock.now()))
    return scene


def test_one_that_is_stopped_on_its_way_into_a_world_is_named_and_nobody_has_to_go() -> None:
    scene = entering()
    for seat in (0, 1):
        scene.set(seat, phase=Phase.RECOVERY, generation=2)
    scene.states[2] = "T"

    delay = scene.first(within=2.0)

    assert delay <= NAMED_FLOOR_S + 3 * scene.config.tick_s
    (said,) = scene.tick()
    assert (said.fault, said.seat, said.suspected) == (Fault.STOPPED, Seat(2), True)
    assert "generation 2" in said.reason


def test_its_row_may_be_of_the_new_world_already() -> None:
    scene = entering()
    for seat in range(3):
        scene.set(seat, phase=Phase.RECOVERY, generation=2)
    scene.states[1] = "T"

    (said,) = scene.until(1.5)

    assert (said.fault, said.seat) == (Fault.STOPPED, Seat(1))


def test_one_that_goes_on_is_named_no_more() -> None:
    scene = entering()
    scene.states[2] = "T"
    assert scene.until(1.5)

    scene.states[2] = "S"

    assert scene.tick() == []


def test_a_short_stop_and_one_that_was_seen_late_say_nothing() -> None:
    scene = entering()
    scene.states[2] = "T"
    assert scene.until(NAMED_FLOOR_S - 0.2) == []
    scene.detector.ingest(ObserverLate(by_s=1.0))

    assert scene.until(0.8) == []


def test_a_look_from_long_ago_says_nothing() -> None:
    scene = entering()
    scene.states[2] = "T"
    assert scene.until(1.5)

    scene.hidden.add(2)

    assert scene.until(scene.config.blind_after_s + 0.5) == []


def test_who_has_left_the_world_is_forgotten() -> None:
    scene = entering()
    scene.states[2] = "T"
    scene.until(1.5)

    scene.detector.ingest(WorldChanged(world=world(2, generation=3), at=scene.clock.now()))

    assert all(v.member != MemberId(102) for v in scene.tick())
