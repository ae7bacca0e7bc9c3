"""How a process ended, and whether it ran out of memory."""

import signal
from pathlib import Path

import pytest

from ftkit.core.ids import MemberId, Seat
from ftkit.detection import obituary, wording
from ftkit.detection.exits import out_of_memory
from ftkit.detection.observations import Exited

KILLS = "the kernel's OOM killer struck once in its control group"


@pytest.mark.parametrize(
    ("code", "killed_by", "ours", "kills", "said", "oom"),
    [
        (None, 9, False, KILLS, "", True),
        (137, None, False, KILLS, "", True),
        (None, 9, True, KILLS, "", False),  # evicted, while somebody else ran out of memory
        (None, 9, False, "", "", False),
        (None, 11, False, KILLS, "", False),
        (1, None, False, KILLS, "ValueError: no", False),
        (1, None, False, "", "MemoryError", True),
        (1, None, False, "", "Traceback ...\nOutOfMemoryError: CUDA out of memory. Tried", True),
        (None, 6, False, "", "terminate called after throwing\n  what():  std::bad_alloc", True),
        (1, None, False, "", "MemoryError: survived\na\nb\nc\nValueError: this one", False),
        (0, None, False, "", "MemoryError", False),
    ],
)
def test_out_of_memory_is_told_apart(code, killed_by, ours, kills, said, oom) -> None:
    found = out_of_memory(code=code, killed_by=killed_by, ours=ours, kills=kills, said=said)
    assert bool(found) is oom
    assert found in ("", KILLS) or "last words" in found


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (signal.SIGSEGV, "signal 11 (SIGSEGV: it touched memory"),
        (signal.SIGABRT, "signal 6 (SIGABRT: it gave up"),
        (signal.SIGUSR1, "signal 10 (SIGUSR1)"),
        (99, "signal 99"),
    ],
)
def test_a_signal_is_told_with_its_meaning(number, text) -> None:
    told = Exited(member=MemberId(1), seat=Seat(0), code=None, signal=number, at=0.0)
    assert text in wording.exit_reason(told)


def test_an_obituary_is_read_by_who_did_not_see_the_death(tmp_path: Path) -> None:
    obituary.leave(tmp_path, MemberId(3), MemoryError("x" * 5000))
    found = obituary.read(tmp_path, MemberId(3))
    assert found is not None
    assert found.error == "MemoryError"
    assert len(found.text) == obituary.TEXT_MAX
    assert obituary.read(tmp_path, MemberId(4)) is None
    obituary.path(tmp_path, MemberId(4)).write_text("[1]")
    assert obituary.read(tmp_path, MemberId(4)) is None
    obituary.leave(tmp_path / "gone", MemberId(3), ValueError())  # must not raise


def test_an_error_that_cannot_say_what_it_is_does_no_harm(tmp_path: Path) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    obituary.leave(tmp_path, MemberId(3), Mute())
    assert obituary.read(tmp_path, MemberId(3)) is None
