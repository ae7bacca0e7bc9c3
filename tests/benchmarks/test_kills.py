"""The series of kills: what is planned, what counts, and that it goes on where it stood."""

import itertools
import random
from pathlib import Path
from typing import Any

from benchmarks import kills
from benchmarks.kills import Done, judge, plan, report


def test_each_kill_strikes_the_member_that_has_lived_longest() -> None:
    faults = plan(random.Random(1), nproc=4, kills=40, gap=30)
    assert [f.member for f in faults] == list(range(40))
    assert [f.seat for f in faults] == [i % 4 for i in range(40)]
    steps = [f.step for f in faults]
    assert all(b - a >= 15 for a, b in itertools.pairwise(steps))
    assert len({f.byte for f in faults}) == 40
    assert {f.bucket for f in faults} == {0, 1, 2}


def event(mono: float, kind: str, **more: Any) -> dict[str, Any]:
    return {"t": mono, "mono": mono, "kind": kind, **more}


def job(*, params: str = "good", code: int = 0) -> list[dict[str, Any]]:
    """Rank 1 of 2 is killed; member 2 takes its seat."""
    return [
        event(1.0, "drill", fault="kill", phase="in-collective", seat=1, member=1, step=5),
        event(1.1, "exit", seat=1, member=1, code=None, signal=9),
        event(3.0, "final", seat=0, member=0, params="good", loss=None),
        event(3.0, "final", seat=1, member=2, params=params, loss=None),
        event(3.1, "exit", seat=0, member=0, code=code, signal=None),
        event(4.0, "end", outcome="completed", reason=""),
    ]


def test_a_job_counts_when_nobody_differs_and_nobody_else_left() -> None:
    good = judge(job(), "good", nproc=2)
    assert (good.kills, good.problems) == (1, [])
    other = judge(job(params="bad"), "good", nproc=2)
    assert "ended with ['bad', 'good'], not good" in other.problems[0]
    assert (
        "which nobody killed, left with code 1" in judge(job(code=1), "good", nproc=2).problems[0]
    )
    assert judge(job()[:4], "good", nproc=2).problems
    missing = judge([e for e in job() if e.get("member") != 2], "good", nproc=2)
    assert missing.problems


def test_a_series_goes_on_where_it_stood(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    seeds = list[int]()

    def one(job: object, options: object, seed: int, *_: object) -> Done:
        seeds.append(seed)
        return Done(seed=seed, kills=3, seconds=1, repairs_s=[0.1], problems=[])

    monkeypatch.setattr(kills, "_one", one)
    monkeypatch.setattr(kills, "_undisturbed", lambda *_: "params")
    state = str(tmp_path / "state")
    assert kills.main(["--kills", "5", "--state", state]) == 0
    assert kills.main(["--kills", "10", "--state", state]) == 0
    assert seeds == [0, 1, 2, 3]
    assert "kills in mid-collective" in capsys.readouterr().out
    bad = Done(seed=7, kills=1, seconds=1, repairs_s=[], problems=["other bits"])
    assert report([bad], "params", {}).problems == ["seed 7: other bits"]
