"""What a drill of the disk is made of, and what its judge says of the disk."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.core.errors import UsageError
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.drill_catalogue import ANYWHERE, CATALOGUE
from ftkit.launch.drill_plan import choose
from ftkit.launch.faulty_store import StoreFaultKind
from ftkit.launch.store_drills import OnDisk, Witness, judge
from tests.checkpoint.persist.stories import save

PASSED = Outcome(
    outcome=Answer.PASS,
    fault="torn-write",
    phase="byte 5",
    seed=0,
    detect_s=0.1,
    repair_s=0.2,
    steps_lost=0,
    samples_lost=0,
    samples_doubled=0,
    survivor_exits=0,
    params_equal=True,
    verdict=None,
    evidence={"problems": [], "missing": []},
)
EVENTS: list[dict[str, Any]] = [
    {"kind": "checkpoint", "mono": 1.0, "step": 10},
    {"kind": "drill", "mono": 2.0, "fault": "torn-write"},
    {"kind": "checkpoint-failed", "mono": 2.1, "step": 20, "reason": "node 1: /d is full"},
    {"kind": "checkpoint", "mono": 3.0, "step": 30},
]
BOTH = OnDisk(good=(10, 30), damaged={})
ONE = OnDisk(good=(10,), damaged={})


@pytest.mark.parametrize("kind", list(StoreFaultKind))
def test_a_seed_picks_node_and_byte_and_always_the_same(kind: StoreFaultKind) -> None:
    assert kind in CATALOGUE
    drills = [choose(kind, None, seed=seed, nproc=3, steps=200) for seed in range(50)]
    assert drills == [choose(kind, None, seed=seed, nproc=3, steps=200) for seed in range(50)]
    faults = [d.store_fault for d in drills]
    assert {f.node for f in faults if f} == {0, 1, 2}
    assert len({f.byte for f in faults if f}) > 40
    assert all(d.faults() == [] and d.where == f"byte {d.byte}" for d in drills)


def test_an_agent_that_takes_all_ranks_along_is_no_drill() -> None:
    with pytest.raises(UsageError, match="--nproc 2 or more"):
        choose("torn-write", None, seed=0, nproc=1, steps=10)


def test_all_picks_what_any_job_takes() -> None:
    picked = {choose("all", None, seed=s, nproc=1, steps=10).fault for s in range(100)}
    assert picked == set(ANYWHERE)


def test_a_disk_with_whole_checkpoints_passes() -> None:
    outcome = judge(PASSED, EVENTS, ONE, BOTH)
    assert outcome.outcome is Answer.PASS
    assert outcome.evidence["checkpoints"] == [10, 30]
    assert outcome.evidence["checkpoints_after_fault"] == [10]
    assert outcome.evidence["failures"] == ["node 1: /d is full"]


@pytest.mark.parametrize(
    ("events", "at_fault", "at_end", "words"),
    [
        (EVENTS, OnDisk(good=(10,), damaged={20: "torn"}), BOTH, "step 20 is damaged after the"),
        (EVENTS, ONE, OnDisk(good=(10,), damaged={30: "bits"}), "step 30 is damaged at the end"),
        (EVENTS, OnDisk(good=(), damaged={}), BOTH, "steps [10] were committed before"),
        (EVENTS, ONE, OnDisk(good=(30,), damaged={}), "steps [10] were committed before"),
        ([EVENTS[0], EVENTS[1]], ONE, ONE, "was not reported"),
    ],
)
def test_every_rule_of_the_disk_fails_the_drill(
    events: list[dict[str, Any]], at_fault: OnDisk, at_end: OnDisk, words: str
) -> None:
    outcome = judge(PASSED, events, at_fault, at_end)
    assert outcome.outcome is Answer.FAIL
    problems = outcome.evidence["problems"]
    assert isinstance(problems, list)
    assert any(words in p for p in problems), problems


def test_what_was_not_looked_at_is_unknown_and_a_failure_stays_one() -> None:
    assert judge(PASSED, EVENTS, None, BOTH).outcome is Answer.UNKNOWN
    failed = Outcome(**{**_fields(PASSED), "outcome": Answer.FAIL})
    assert judge(failed, EVENTS, None, BOTH).outcome is Answer.FAIL


def test_a_full_disk_must_be_called_full() -> None:
    full = Outcome(**{**_fields(PASSED), "fault": "disk-full"})
    assert judge(full, EVENTS, ONE, BOTH).outcome is Answer.PASS
    vague = [EVENTS[0], EVENTS[1], {**EVENTS[2], "reason": "something failed"}]
    assert judge(full, vague, ONE, ONE).outcome is Answer.FAIL


def test_the_disk_is_read_to_the_last_byte(tmp_path: Path) -> None:
    for step in (1, 2):
        save(LocalStore(tmp_path), step)
    (tmp_path / "step-3" / "tensors").mkdir(parents=True)
    file = next(p for p in (tmp_path / "step-2/tensors").rglob("c*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    held = OnDisk.read(tmp_path)
    assert held.good == (1,)
    assert list(held.damaged) == [2]


def test_the_witness_looks_once_and_only_after_the_fault(tmp_path: Path) -> None:
    witness = Witness(tmp_path)
    save(LocalStore(witness.folder), 1)
    witness.poll()
    assert witness.seen is None
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "drill-store-1.jsonl").touch()
    witness.poll()
    save(LocalStore(witness.folder), 2)
    witness.poll()
    assert witness.seen == OnDisk(good=(1,), damaged={})


def _fields(outcome: Outcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in outcome.__slots__}


def slow_io(seat: int) -> dict[str, Any]:
    told = {"seat": seat, "reason": "slow", "evidence": {"path": "/d"}}
    return {"kind": "verdict", "mono": 5.0, "fault": "slow-io", **told}


@pytest.mark.parametrize(
    ("verdicts", "answer"),
    [
        ([slow_io(1)], Answer.PASS),
        ([], Answer.FAIL),
        ([slow_io(0)], Answer.FAIL),
        ([slow_io(1), slow_io(0)], Answer.FAIL),
    ],
)
def test_of_a_slow_disk_the_node_is_named_and_no_other(
    verdicts: list[dict[str, Any]], answer: Answer
) -> None:
    slow = replace(PASSED, fault="slow-disk")
    events = [EVENTS[0], {**EVENTS[1], "fault": "slow-disk"}, *verdicts]
    outcome = judge(slow, events, ONE, ONE, seat=1)
    assert outcome.outcome is answer
    if answer is Answer.PASS:
        assert outcome.evidence["named_s"] == 3.0
