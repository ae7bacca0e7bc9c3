"""Processes whose lifeline was let go of are looked at in turn, and given up aloud."""

import ctypes
import logging

import pytest

from ftkit.core import lifeline_watch
from ftkit.core.lifeline_watch import LifelineWatch, OnExit, _Watched


def let_go(pid: int, on_exit: OnExit) -> _Watched:
    return _Watched(pid, 0, ctypes.c_uint32(0), 0, on_exit)


def test_one_that_takes_its_time_keeps_nobody_waiting_and_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow, quick, told = 1, 2, list[tuple[int, int | None]]()
    monkeypatch.setattr(lifeline_watch, "exiting", lambda pid: pid == quick)
    monkeypatch.setattr(lifeline_watch, "exit_code", lambda pid: -9)
    watch = LifelineWatch()
    ending = [
        let_go(slow, lambda code: told.append((slow, code))),
        let_go(quick, lambda code: told.append((quick, code))),
    ]
    ending = [one for one in ending if watch._still_ends(one)]
    assert told == [(quick, -9)]
    assert [one.pid for one in ending] == [slow]
    rounds = 1
    with caplog.at_level(logging.DEBUG, logger=lifeline_watch.logger.name):
        while ending:
            ending = [one for one in ending if watch._still_ends(one)]
            rounds += 1
    assert rounds == lifeline_watch._LOOKS
    assert told == [(quick, -9)]
    assert "process 1 let go of its lifeline and still runs" in caplog.text


def test_one_that_is_forgotten_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifeline_watch, "exiting", lambda pid: True)
    told = list[int | None]()
    one = let_go(1, told.append)
    one.forgotten = True
    assert not LifelineWatch()._still_ends(one)
    assert told == []
