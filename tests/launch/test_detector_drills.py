"""Drills of detectors and of checkpoints that rot: what is struck, and what the judges want to hear."""

import random
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import MemberId
from ftkit.detection.status import BOARD, StatusBoard
from ftkit.launch import detector_drills, rot_drills
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_catalogue import CATALOGUE
from ftkit.launch.drill_plan import choose
from tests.launch.test_store_drills import PASSED

Event = dict[str, Any]


def at(mono: float, kind: str, **fields: Any) -> Event:
    return {"mono": mono, "kind": kind, **fields}


BLINDED = [
    at(1.0, "drill", fault="detector-faults"),
    at(2.0, "commit", step=7),
    at(3.0, "blind", what="members", members=[1]),
    at(4.0, "commit", step=8),
    at(5.0, "sighted", what="members", members=[]),
]


def judged(events: list[Event], **more: Any) -> Outcome:
    return detector_drills.judge(PASSED, events, **{"place": "row", "seat": 1, **more})


def test_blind_detectors_that_say_so_while_training_goes_on_pass() -> None:
    outcome = judged(BLINDED)
    assert outcome.outcome is Answer.PASS
    assert (outcome.evidence["blind_s"], outcome.evidence["steps_meanwhile"]) == (2.0, 2)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        (BLINDED[:2], "nobody said that nothing is known"),
        (BLINDED[:4], "never said to be over"),
        ([e for e in BLINDED if e["kind"] != "commit"], "nobody trained"),
        ([*BLINDED, at(6.0, "halt", reason="why")], "a halt: why"),
        (
            [*BLINDED, at(6.0, "verdict", fault="stopped", seat=0, reason="why")],
            "seat 0 was accused",
        ),
    ],
)
def test_every_rule_of_blindness_fails_the_drill(events: list[Event], words: str) -> None:
    outcome = judged(events)
    assert outcome.outcome is Answer.FAIL
    assert any(words in p for p in outcome.evidence["problems"])  # type: ignore[attr-defined]


def test_who_is_not_seen_must_be_the_right_one() -> None:
    assert judged(BLINDED, seat=0).outcome is Answer.FAIL
    assert judged(BLINDED, place="coordinator").outcome is Answer.FAIL
    assert judged([]).outcome is Answer.UNKNOWN
    flapping = at(6.0, "verdict", fault="flapping", seat=1, reason="")
    assert judged([*BLINDED, flapping]).outcome is Answer.PASS


def test_a_falsified_row_is_no_row_and_twice_is_as_before(tmp_path: Path) -> None:
    board = StatusBoard.create(tmp_path / BOARD, seats=1)
    board.attach(0, MemberId(3))
    before = board.read(0)
    detector_drills._falsify(tmp_path / BOARD)
    with pytest.raises(IntegrityError):
        board.read(0)
    detector_drills._falsify(tmp_path / BOARD)
    assert board.read(0) == before
    board.close()


def test_a_seed_picks_the_quick_ones_and_the_rest_by_name() -> None:
    picked = {choose("detector-faults", None, seed=s, nproc=3, steps=200).where for s in range(20)}
    assert picked == {"agent", "row"}
    assert choose("detector-faults", "coordinator", seed=0, nproc=3, steps=200).faults() == []
    with pytest.raises(UsageError, match="strikes at agent, row, coordinator"):
        choose("detector-faults", "forward", seed=0, nproc=3, steps=200)


ROT = [
    at(1.0, "checkpoint", step=20),
    at(2.0, "checkpoint", step=40),
    at(3.0, "drill", fault="bit-flip", step=40, seat=0, member=0),
    at(4.0, "checkpoint-skipped", step=40, reason="it is damaged: crc"),
    at(5.0, "decision", action="form", step=20),
]


def test_a_rotten_checkpoint_is_named_and_the_one_before_is_used() -> None:
    outcome = rot_drills.judge(PASSED, ROT)
    assert outcome.outcome is Answer.PASS
    assert (outcome.evidence["rotten"], outcome.evidence["used"]) == (40, 20)


@pytest.mark.parametrize(
    ("events", "answer"),
    [
        ([], Answer.UNKNOWN),
        (ROT[:3] + ROT[4:], Answer.FAIL),
        ([*ROT[:4], at(5.0, "decision", action="form", step=0)], Answer.FAIL),
        ([*ROT[:4], at(5.0, "decision", action="form", step=40)], Answer.FAIL),
        ([*ROT, at(4.5, "checkpoint-skipped", step=20, reason="it is damaged: crc")], Answer.FAIL),
    ],
)
def test_another_step_or_silence_fails_it(events: list[Event], answer: Answer) -> None:
    assert rot_drills.judge(PASSED, events).outcome is answer


def test_one_bit_of_a_tensor_flips(tmp_path: Path) -> None:
    tensors = tmp_path / "tensors" / "a"
    tensors.mkdir(parents=True)
    (tmp_path / "commit.json").write_bytes(b"{}")
    (tensors / "zarr.json").write_bytes(b"{}")
    (tensors / "c.0").write_bytes(bytes(64))
    assert rot_drills.flip(tmp_path, random.Random(0)) == tensors / "c.0"
    assert sum(b.bit_count() for b in (tensors / "c.0").read_bytes()) == 1
    assert (tensors / "zarr.json").read_bytes() == b"{}"


def test_the_drills_that_the_documents_name_are_there() -> None:
    wanted = (
        "oom segfault gil-hang deadlock desync slow-rank slow-link slow-nic slow-disk data-stall"
    )
    wanted += (
        " gc-stall bit-flip nan loss-spike leak disk-full clock-skew flapping offender two-at-once"
    )
    wanted += " clean detector-faults"
    assert set(wanted.split()) <= set(CATALOGUE)
