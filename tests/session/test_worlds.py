"""What a rank's row says while it waits for a world, enters it, and goes on in it."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftkit.core.clock import MonotonicClock
from ftkit.core.errors import JobStopped
from ftkit.core.ids import Generation, MemberId, Step
from ftkit.detection.recorder import Recorder
from ftkit.detection.row import Phase
from ftkit.detection.status import StatusBoard
from ftkit.recovery.plan import Mode, Stop
from ftkit.session.worlds import Worlds

from .test_membership import HALT, Rank, plan, running, waiting, world

FIRST, SECOND = world(1, 0, 1, 2), world(2, 0, 2)


class Training:
    """A rank at step 5 of world 1, whose group and snapshots only note what is asked of them."""

    def __init__(self, folder: Path) -> None:
        self.board = StatusBoard.create(folder / "board", seats=1)
        self.recorder = Recorder(self.board.attach(0, MemberId(0)), MonotonicClock())
        self.rank = Rank(0, folder)
        self.membership = self.rank.membership
        self.phases = dict[str, Phase]()
        note = lambda name: lambda *_, **__: self.phases.update({name: self.shown})
        parts: Any = SimpleNamespace(
            membership=self.membership,
            recorder=self.recorder,
            injector=SimpleNamespace(at=lambda *_: None),
            group=SimpleNamespace(edit=note("edit")),
            stall_s=1.0,
        )
        self.parts, self.worlds = parts, Worlds(parts)
        self.membership.ready(stepping=False)
        self.membership.take_plan(running(1, FIRST, 0))
        self.membership.entered(FIRST, Step(5))
        self.worlds.begin_stepping(tuple, SimpleNamespace(begin=note("begin")))  # type: ignore[arg-type]
        self.recorder.adopt(Generation(1))
        self.recorder.step(Step(6))
        self.recorder.phase(Phase.FORWARD)

    @property
    def shown(self) -> Phase:
        row = self.board.read(0)
        assert row is not None
        return row.phase

    def close(self) -> None:
        self.recorder.close()
        self.board.close()
        self.rank.trace.close()


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    one = Training(tmp_path)
    yield one
    one.close()


def test_who_is_in_a_world_that_goes_on_says_nothing_new(training: Training) -> None:
    training.worlds.settle()
    assert training.shown is Phase.FORWARD


@pytest.mark.parametrize(("in_step", "after"), [(False, Phase.BETWEEN), (True, Phase.OPTIMIZER)])
def test_it_stands_still_until_a_world_is_given_and_then_is_like_any_other(
    training: Training, in_step: bool, after: Phase
) -> None:
    training.membership.take_plan(HALT)
    thread = threading.Thread(target=lambda: training.worlds.settle(in_step=in_step), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while training.shown is not Phase.RECOVERY:
        assert thread.is_alive()
        assert time.monotonic() < deadline, "the row says nothing of the wait"
    assert not training.phases, "it waits for the coordinator's word"
    training.membership.take_plan(running(3, SECOND, 5, members=(0, 11, 2)))
    thread.join(10)
    assert not thread.is_alive()
    assert training.phases["edit"] is Phase.RECOVERY
    assert ("begin" in training.phases) is not in_step, "a step is captured at its end"
    assert training.shown is after
    assert training.membership.active


def test_who_waits_before_its_step_loop_is_not_in_recovery(training: Training) -> None:
    worlds = Worlds(training.parts)
    training.recorder.phase(Phase.STARTING)
    training.membership.take_plan(HALT)
    shown: list[Phase] = []

    def end() -> None:
        shown.append(training.shown)
        stop = Stop(code=1, reason="enough")
        training.membership.take_plan(plan(3, mode=Mode.ENDED, stop=stop, halted=Generation(1)))

    with pytest.raises(JobStopped, match="enough"):
        waiting(worlds.settle, end)
    assert shown == [Phase.STARTING]
