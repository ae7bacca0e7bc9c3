"""The history of jobs and nodes: appended to by many, read by whoever comes later."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ftkit.core.errors import StoreError, UsageError
from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.core.verdict import Fault, Verdict
from ftkit.detection.offenders import DAY_S, OffenderConfig
from ftkit.detection.signals import NodeScored
from ftkit.launch.cli import main
from ftkit.launch.config import JobConfig
from ftkit.launch.history import History, attempts, check_history, fleet
from ftkit.launch.job_history import JobHistory
from ftkit.launch.titan import SLOTS, read_titan


def test_what_is_appended_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = str(tmp_path / "history.jsonl")
    assert History(path, "x").read() == []
    History(path, "later").append("job", at=2.0, chain="c", nodes=["a"])
    History(path, "first").append("fault", at=1.0, node="a", fault="sdc")
    assert [r["job"] for r in History(path, "").read()] == ["first", "later"]
    assert Path(path).stat().st_mode & 0o777 == 0o600


def test_two_jobs_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = str(tmp_path / "history.jsonl")

    def work(job: str) -> None:
        history = History(path, job)
        for i in range(50):
            history.append("fault", at=float(i), node="n" * 200, fault="exited")

    threads = [threading.Thread(target=work, args=(f"job-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(History(path, "").read()) == 200


def test_a_line_cut_short_costs_itself_only_and_nonsense_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history = History(str(path), "j")
    history.append("end", at=1.0, code=0, trained=True)
    with path.open("ab") as file:
        for value in (5, {"kind": "end"}, {"v": 1, "kind": "job", "at": 1, "nodes": [3]}):
            file.write(json.dumps(value).encode() + b"\n")
        for at in (b"NaN", b"1e300", b"-1", b"1" + b"0" * 400, b"4102444800"):  # the last: 2100
            file.write(b'{"v":1,"kind":"end","at":%s,"job":"j","code":0,"trained":true}\n' % at)
        file.write(b"[" * 60_000 + b"\n")  # nested deeper than the parser goes
        file.write(b"\xff\xfe\n" + b"[" * 100_000 + b"\n" + b'{"v":1,"kind":"fau')
    history.append("end", at=2.0, code=1, trained=False)
    assert [r["at"] for r in history.read()] == [1.0, 2.0]


def test_it_writes_to_no_link_folder_or_device(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine\n")
    link = tmp_path / "link"
    link.symlink_to(target)
    for place in (link, tmp_path, Path("/dev/null")):
        with pytest.raises(UsageError):
            check_history(str(place))
        with pytest.raises(StoreError):
            History(str(place), "j").append("end", at=1.0, code=0, trained=True)
    assert target.read_text() == "mine\n"
    with pytest.raises(UsageError, match="no folder"):
        check_history(str(tmp_path / "none" / "history"))
    check_history(str(tmp_path / "new"))
    check_history("")


def test_a_full_disk_is_an_error_with_its_reason() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with pytest.raises(StoreError, match="no regular file"):
        History("/dev/full", "j").append("end", at=1.0, code=0, trained=True)


def test_in_a_store_each_job_has_an_object_of_its_own() -> None:
    url = f"memory://history-{os.getpid()}"
    for job in ("one", "two"):
        history = History(url, job)
        history.append("job", at=1.0, chain="c", nodes=["a"])
        history.append("end", at=2.0, code=0, trained=True)
    assert sorted((r["job"], r["kind"]) for r in History(url, "").read()) == [
        ("one", "end"),
        ("one", "job"),
        ("two", "end"),
        ("two", "job"),
    ]


def test_a_job_without_an_end_has_failed_and_one_with_two_starts_is_one() -> None:
    records: list[dict[str, Any]] = [
        {"kind": "job", "job": "a", "at": 0.0, "chain": "c", "nodes": ["x"]},
        {"kind": "job", "job": "a", "at": 5.0, "chain": "c", "nodes": ["x"]},
        {"kind": "job", "job": "b", "at": 9.0, "chain": "c", "nodes": ["x"]},
        {"kind": "end", "job": "b", "at": 20.0, "code": 0, "trained": True},
    ]
    first, second = sorted(attempts(records), key=lambda a: a.started)
    assert (first.started, first.failed, first.trained) == (0.0, True, False)
    assert (second.started, second.failed, second.trained) == (9.0, False, True)


def verdict(fault: Fault, seat: int = 0, since_s: float = 0.0, **evidence: object) -> Verdict:
    return Verdict(
        fault=fault,
        member=MemberId(seat),
        seat=Seat(seat),
        reason="",
        since_s=since_s,
        evidence=evidence,
    )


def job_history(path: Path) -> tuple[JobHistory, list[NodeScored], list[str]]:
    scored, told = list[NodeScored](), list[str]()
    config = JobConfig(job="j", command=("x",), history=str(path))
    history = JobHistory(config, scored=scored.append, tell=lambda kind, **_: told.append(kind))
    return history, scored, told


def test_a_job_leaves_its_faults_of_nodes_and_its_end(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history, scored, told = job_history(path)
    history.begin({NodeId(0): "alpha", NodeId(1): "beta"})
    until(lambda: len(scored) == 2)
    assert [(s.name, s.faults) for s in scored] == [("alpha", 0), ("beta", 0)]
    # Judged at once: where its rank starts anew may depend on it.
    (first,) = history.verdict(verdict(Fault.SDC), NodeId(1))
    (second,) = history.verdict(
        verdict(Fault.EXITED, since_s=60.0, signal=11, code=None), NodeId(1)
    )
    assert [(s.name, s.faults) for s in (first, second)] == [("beta", 1), ("beta", 2)]
    assert not history.verdict(verdict(Fault.EXITED, signal=None, code=1), NodeId(0))
    assert not history.verdict(verdict(Fault.NUMERIC), NodeId(0))
    assert not history.verdict(verdict(Fault.SDC), None)
    assert not history.verdict(verdict(Fault.SLOW_IO, others=[0]), NodeId(1))
    history.end(code=0, trained=True)
    records = History(str(path), "").read()
    assert [(r["kind"], r.get("node"), r.get("fault")) for r in records] == [
        ("job", None, None),
        ("fault", "beta", "sdc"),
        ("fault", "beta", "exited"),
        ("end", None, None),
    ]
    assert told == ["history"]
    assert fleet(records, OffenderConfig()).nodes == {"alpha": 0, "beta": 2}


def test_one_event_of_a_node_is_one_fault_and_what_ftkit_kills_is_none(tmp_path: Path) -> None:
    history, scored, _ = job_history(tmp_path / "history.jsonl")
    history.begin({NodeId(0): "alpha", NodeId(1): "beta"})
    until(lambda: len(scored) == 2)
    # A hang, for which ftkit kills the rank and starts all others anew.
    assert history.verdict(verdict(Fault.HANG_BLOCKED, 0, 100.0), NodeId(0))
    for seat, node in ((0, 0), (1, 0), (2, 1)):
        killed = verdict(Fault.EXITED, seat, 140.0, signal=9, code=None, ours=True)
        assert history.verdict(killed, NodeId(node)) == []
    # A node that goes with all of its eight ranks.
    for seat in range(8, 16):
        history.verdict(verdict(Fault.NODE_LOST, seat, 200.0 + seat / 100), NodeId(1))
    history.end(code=0, trained=True)
    known = fleet(History(str(tmp_path / "history.jsonl"), "").read(), OffenderConfig())
    assert known.nodes == {"alpha": 1, "beta": 1}


def test_a_history_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path: Path) -> None:
    history, scored, told = job_history(tmp_path / "none" / "history")
    history.begin({NodeId(0): "alpha"})
    history.verdict(verdict(Fault.SDC), NodeId(0))
    history.end(code=1, trained=False)
    assert told == ["history", "history-failed"]
    assert [s.name for s in scored] == ["alpha"]


def test_what_fails_while_the_history_is_read_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    bad_node(path, name="beta", faults=2)
    gate = threading.Event()
    scored = list[NodeScored]()
    config = JobConfig(job="j", command=("x",), history=str(path))

    def tell(*_: object, **__: object) -> None:
        gate.wait(10)

    history = JobHistory(config, scored=scored.append, tell=tell)
    history.begin({NodeId(0): "alpha", NodeId(1): "beta"})
    assert history.verdict(verdict(Fault.SDC), NodeId(1)) == []
    gate.set()
    history.end(code=0, trained=True)
    assert [(s.name, s.faults) for s in scored] == [("alpha", 0), ("beta", 3)]


def until(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait for it."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def bad_node(path: Path, *, name: str = "beta", faults: int = 8) -> None:
    """A history in which one of thirty nodes fails every other day."""
    history, now = History(str(path), "old"), time.time()
    nodes = [f"n{i}" for i in range(29)]
    history.append("job", at=now - 60 * DAY_S, chain="c", nodes=[*nodes, name])
    for i in range(faults):
        history.append("fault", at=now - (20 - 2 * i) * DAY_S, node=name, fault="node-lost")
    history.append("end", at=now, code=0, trained=True)


def test_the_doctor_says_whom_to_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    bad_node(path)
    done = CliRunner().invoke(main, ["doctor", "offenders", "--history", str(path), "--json"])
    told = json.loads(done.output)
    assert (done.exit_code, told["leave_out"]) == (1, ["beta"])
    assert told["nodes"][0]["faults"] == 8
    assert told["retries"]["chains"] == 0
    shown = CliRunner().invoke(main, ["doctor", "offenders", "--history", str(path)])
    assert "leave out: beta" in shown.output


def test_the_doctor_refuses_what_is_no_history(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["doctor", "offenders", "--history", str(tmp_path / "none")])
    assert done.exit_code == 64
    assert "holds no history" in done.output


TITAN = """SN,location,insert,remove,duration,out,event
1,c1,2014-01-01 00:00:00,2014-02-01 00:00:00,1,FALSE,
2,c1,2014-01-01 00:00:00,2014-03-01 00:00:00,1,FALSE,OTB
3,c2,2014-01-01 00:00:00,2014-03-02 00:00:00,1,FALSE,DBE
"""


def test_titans_history_is_read_with_its_whole_fleet(tmp_path: Path) -> None:
    path = tmp_path / "titan.csv"
    path.write_text(TITAN)
    faults, slots = read_titan(path)
    assert [node for _, node in faults] == ["c1", "c2"]
    assert faults[1][0] - faults[0][0] == DAY_S
    assert len(slots) == len(set(slots)) == SLOTS
    replay = ["detect", "replay", "--format", "titan", str(path)]
    told = json.loads(CliRunner().invoke(main, [*replay, "--json"]).output)
    assert (told["faults"], told["avoided"], told["left_out"], told["nodes"]) == (2, 0, [], SLOTS)
    shown = CliRunner().invoke(main, replay).output
    assert "2 failures of 18688 slots: 0 avoided (0.00%), 0 slots quarantined" in shown
    path.write_text(TITAN.replace("2014-03-01", "2014-13-01"))
    with pytest.raises(UsageError, match="line 3"):
        read_titan(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="has the columns"):
        read_titan(path)


@pytest.mark.parametrize(
    ("where", "words"),
    [("", "is a folder; give the file"), ("s3:/b", "did you mean s3://b?")],
)
def test_offenders_of_what_can_be_no_history(where: str, words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["doctor", "offenders", "--history", where or str(tmp_path)])
    assert done.exit_code == 64, done.output
    assert words in done.stderr
