"""Ray Train: what runs in ranks, what they report, and a backend that is told of the end.

A real run, with a rank and a worker killed, is in `test_ray_train_run.py`.
"""

import inspect
import json
import pickle
import socket
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.integrations import ray_train
from ftkit.launch.ray_train_rank import REPORT_BYTES_MAX, REPORTS, hand_over, newest, take_over
from ftkit.recovery.plan import Stop


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A worker's end of the reports of this process, which is the rank that speaks."""
    monkeypatch.setenv("FTKIT_SHM_DIR", str(tmp_path))
    monkeypatch.setattr(ray_train, "_speaks", lambda: True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / REPORTS))
        sock.settimeout(0.05)
        yield sock


@pytest.fixture(scope="module")
def backend() -> Any:
    """`ftkit.launch.ray_train_backend`, where Ray Train can be imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        return pytest.importorskip(
            "ftkit.launch.ray_train_backend",
            reason="ray.train is not installed: ftkit[raytrain]",
            exc_type=ImportError,
        )


def test_ranks_wait_for_their_function(tmp_path: Path) -> None:
    late = threading.Timer(0.1, hand_over, (tmp_path, pickle.dumps(dict)))
    late.start()
    assert take_over(tmp_path, 30.0)() == {}
    late.join()


def test_ranks_that_get_no_function_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"wrap train_loop_per_worker in .*in_ranks"):
        take_over(tmp_path, 0.0)


def test_of_reports_that_wait_the_newest_is_passed_on(listener: socket.socket) -> None:
    for step in (1, 2, 3):
        ray_train.report({"step": step})
    data = newest(listener)
    assert data is not None
    assert json.loads(data) == {"step": 3}
    assert newest(listener) is None


def test_a_worker_that_does_not_listen_holds_nobody_up(
    listener: socket.socket, tmp_path: Path
) -> None:
    for step in range(2000):  # more than a socket's buffer takes
        ray_train.report({"step": step, "text": "x" * 200})
    (tmp_path / REPORTS).unlink()
    ray_train.report({"step": 1})


def test_what_cannot_be_reported_is_refused(listener: socket.socket) -> None:
    with pytest.raises(UsageError, match="metrics are numbers and text"):
        ray_train.report({"loss": object()})
    with pytest.raises(UsageError, match=f"at most {REPORT_BYTES_MAX}"):
        ray_train.report({"text": "x" * REPORT_BYTES_MAX})


def test_outside_a_job_a_report_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTKIT_SHM_DIR", raising=False)
    ray_train.report({"loss": 1.0})


def test_a_script_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no script .*train\.py"):
        ray_train.in_ranks(str(tmp_path / "train.py"))


def test_a_function_takes_its_arguments_from_the_config() -> None:
    with pytest.raises(UsageError, match="train_loop_config"):
        ray_train.in_ranks(print, "--lr")


def with_config(config: dict[str, float]) -> None: ...
def with_default(config: dict[str, float] | None = None) -> None: ...
def without() -> None: ...


@pytest.mark.parametrize(("train", "takes"), [(with_config, 1), (with_default, 0), (without, 0)])
def test_a_function_gets_the_config_as_from_ray_train(
    train: Callable[..., None], takes: int
) -> None:
    assert len(inspect.signature(ray_train.in_ranks(train)).parameters) == takes


def test_a_script_runs_as_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, beside_the_script; from pathlib import Path\n"
        "assert __name__ == '__main__'; Path(sys.argv[1]).write_text(beside_the_script.word)\n"
    )
    (tmp_path / "beside_the_script.py").write_text("word = 'beside it'\n")
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.argv", ["pytest"])
    ray_train._run_script(str(script), (str(tmp_path / "out"),))
    assert (tmp_path / "out").read_text() == "beside it"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "nccl"}, "no backend, init_method or timeout_s"),
        ({"nproc": 0}, "count from 1"),
        ({"parity": "two"}, "k\\+m"),
        ({"parity_every": 5}, "needs --parity"),
        ({"checkpoint_every": 5}, "needs a --checkpoint-dir"),
        ({"max_stall_s": 0.0}, "max-stall"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_in_the_driver(
    backend: Any, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        backend.FtkitConfig(**settings)


def test_a_config_makes_a_job_of_its_workers(backend: Any, tmp_path: Path) -> None:
    made = backend.FtkitConfig(
        nproc=2, spares=1, parity="1+1", parity_every="auto", run_dir=str(tmp_path)
    )
    config = pickle.loads(pickle.dumps(made))
    one, other = config.job(nodes=3), config.job(nodes=2)
    assert (one.nodes, one.nproc, one.spares, one.parity) == (3, 2, 1, "1+1")
    assert one.parity_every == "auto"
    assert one.job != other.job
    assert Path(one.run_dir) == tmp_path / one.job
    with pytest.raises(UsageError, match="parity"):
        config.job(nodes=1)


class Group:
    """Of workers, who are only told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def execute_async(self, *call: object) -> list[object]:
        self.told.append(call)
        return [object()]


def test_a_worker_that_comes_after_the_end_is_told(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend.ray, "wait", lambda calls, **_: (calls, []))
    group = Group()
    run = backend.JobRun(backend.FtkitConfig().job(nodes=1), group)
    run._stop = Stop(code=3, reason="seat 0 exited with 3")
    run.replace(group)
    assert group.told == [(backend.ray_train_worker.job_over, 3, "seat 0 exited with 3")]


@pytest.mark.parametrize(
    ("storages", "seen", "kept"),
    [
        (["here", "here"], [True, True], True),
        (["here", "here"], [True, False], False),  # of the same name on each machine
        (["here", ""], [True, True], False),
        (["", ""], [True, True], False),  # an object store
        (["not there", "not there"], [True, True], False),
    ],
)
def test_checkpoints_go_to_ray_trains_storage_where_all_workers_see_it(
    backend: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    storages: list[str],
    seen: list[bool],
    kept: bool,
) -> None:
    class Workers(Group):
        def execute(self, function: object, mark: str) -> list[bool]:
            assert Path(mark).is_file()
            return seen

    (tmp_path / "here").mkdir()
    run = backend.JobRun(backend.FtkitConfig().job(nodes=2), Workers())
    found = run._in_storage({name and str(tmp_path / name) for name in storages})
    assert found == (str(tmp_path / "here" / "ftkit") if kept else "")
    assert ("begins at step 0" in caplog.text) is not kept
    assert not list(tmp_path.glob("here/ftkit/.*"))


def test_a_worker_without_an_agent_says_why(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = backend.ray_train_worker
    monkeypatch.setattr(worker, "_here", worker._Here())
    with pytest.raises(UsageError, match="torch_config=FtkitConfig"):
        worker.train_in_ranks(without)
    worker.job_over(3, "seat 0 exited with 3")
    with pytest.raises(worker.JobFailed, match=r"seat 0 exited with 3 \(exit code 3\)"):
        worker.train_in_ranks(without)


def test_a_worker_that_comes_after_a_good_end_ends_well(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = backend.ray_train_worker
    monkeypatch.setattr(worker, "_here", worker._Here())
    worker.job_over(0, "every rank finished")
    worker.train_in_ranks(without)


def test_workers_on_machines_that_ray_takes_away_are_told(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worker(Group):
        def __init__(self, machine: str) -> None:
            super().__init__()
            self.metadata = types.SimpleNamespace(node_id=machine)

    stays, goes = Worker("a"), Worker("b")
    group = types.SimpleNamespace(get_workers=lambda: [stays, goes])
    run = backend.JobRun(backend.FtkitConfig().job(nodes=2), group)
    run._pass_on_notices()
    monkeypatch.setattr(backend, "draining_nodes", lambda: frozenset({"b", "another"}))
    run._pass_on_notices()
    assert (stays.told, goes.told) == ([], [(backend.ray_train_worker.drain_agent,)])


def test_a_worker_whose_ranks_left_stays_until_the_job_ends(
    backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it would be a failure, of which Ray Train allows none by default."""
    worker, drains = backend.ray_train_worker, list[str]()
    agent = types.SimpleNamespace(drain=lambda: drains.append("drain"), stop=lambda: None)
    monkeypatch.setattr(worker, "_here", worker._Here(agent=agent))
    monkeypatch.setattr(worker, "_train", lambda *_: None)  # the agent ended, and the job did not
    worker.drain_agent()
    worker.drain_agent()  # said again as long as it is so
    assert drains == ["drain"]
    ended = list[str]()
    waits = threading.Thread(target=lambda: ended.append(str(worker.train_in_ranks(without))))
    waits.start()
    waits.join(0.2)
    assert ended == []
    worker.job_over(0, "every rank finished")
    waits.join(30.0)
    assert ended == ["None"]
