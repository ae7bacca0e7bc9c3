"""A rank's clock: raised while ranks are away, given back, and left alone where that is refused."""

from pathlib import Path

from ftkit.core.trace import Trace, read_run
from ftkit.recovery.clocks import ClockRange
from ftkit.session.clock import Clock


class Governor:
    """A device that notes what it is told."""

    def __init__(self, *, allowed: bool = True) -> None:
        self.told: list[int | None] = []
        self._allowed = allowed

    def range(self) -> ClockRange:
        return ClockRange(now=1200, lowest=300, highest=1500)

    def lock(self, mhz: int) -> None:
        if not self._allowed:
            raise PermissionError("it takes root")
        self.told.append(mhz)

    def release(self) -> None:
        self.told.append(None)


def drive(folder: Path, governor: Governor, *sizes: int) -> list[str]:
    (folder / "events").mkdir()
    with Trace(folder / "events" / "rank.jsonl") as trace:
        clock = Clock(governor, trace, seats=4)
        for size in sizes:
            clock.entered(size)
        clock.close()
    return [e["action"] for e in read_run(folder) if e["kind"] == "clock-set"]


def test_it_is_raised_once_and_released_when_the_world_is_full(tmp_path: Path) -> None:
    governor = Governor()
    assert drive(tmp_path, governor, 4, 4, 3, 2, 4, 4) == ["raised", "released"]
    assert governor.told == [1500, None]


def test_it_is_released_at_the_end(tmp_path: Path) -> None:
    governor = Governor()
    drive(tmp_path, governor, 3)
    assert governor.told == [1500, None]


def test_a_device_that_refuses_is_asked_once(tmp_path: Path) -> None:
    governor = Governor(allowed=False)
    assert drive(tmp_path, governor, 3, 4, 3) == ["refused"]
    assert governor.told == []
