"""What is read of the events of a job that lost a rank whose blocks were held twice."""

import pytest

from benchmarks.jobs import Event, JobFailed
from benchmarks.zero import Promotion, read_promotion

EVENTS: list[Event] = [
    {"kind": "commit", "mono": 0.9, "generation": 1, "member": 0, "step": 7},
    {"kind": "drill", "mono": 1.0, "member": 3},
    {"kind": "promote", "mono": 1.1, "generation": 2, "member": 0, "bytes": 30, "moved": 0, "again": 5},
    {"kind": "promote", "mono": 1.1, "generation": 2, "member": 1, "bytes": 10, "moved": 2, "again": 5},
    {"kind": "commit", "mono": 1.2, "generation": 2, "member": 0, "step": 8},
    {"kind": "commit", "mono": 1.3, "generation": 2, "member": 1, "step": 8},
    {"kind": "commit", "mono": 1.9, "generation": 2, "member": 0, "step": 9},
    {"kind": "replicated", "mono": 2.0, "generation": 2, "member": 0, "bytes": 7, "seconds": 0.8},
    {"kind": "replicated", "mono": 2.0, "generation": 2, "member": 1, "bytes": 8, "seconds": 0.9},
]  # fmt: skip


def test_what_survivors_read_counts_and_what_a_newcomer_reads_does_not() -> None:
    newcomer = {"kind": "restore", "mono": 3.0, "generation": 3, "member": 4, "bytes": 100}
    found = read_promotion([*EVENTS, newcomer])
    assert found == Promotion(
        moved=2, promoted=40, again=10, repair_s=1.3 - 1.0, standins_bytes=15, standins_s=0.9
    )
    loaded = {**newcomer, "member": 1}
    assert read_promotion([*EVENTS, loaded]).moved == 102


def test_a_job_that_says_too_little_counts_for_nothing() -> None:
    for missing in ("drill", "promote", "replicated"):
        with pytest.raises(JobFailed):
            read_promotion([e for e in EVENTS if e["kind"] != missing])
