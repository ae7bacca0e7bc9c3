"""The fork server: what it forks is what Python would have started, only sooner."""

import json
import os
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from ftkit.core import exit_codes
from ftkit.launch.fork_server import PID_BYTES, Program, receive, send, unfit
from ftkit.launch.forking import ForkServer, State
from ftkit.launch.ranks import Child

pytestmark = pytest.mark.multiproc
LIMIT_S = 60.0

REPORT = """
    import json, os, random, sys
    already = "torch" in sys.modules
    import numpy
    print(json.dumps({
        "name": __name__, "file": __file__, "argv": sys.argv, "path": sys.path[0],
        "cwd": os.getcwd(), "parent": os.getppid(), "group": os.getpgid(0) == os.getpid(),
        "variable": os.environ.get("VARIABLE"), "threads": len(os.listdir("/proc/self/task")),
        "drawn": [random.random(), numpy.random.random()],
        "torch": already,
    }))
"""


class Forks:
    """A fork server, and a folder for scripts and what they write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        changed = threading.Event()
        env = {k: v for k, v in os.environ.items() if k != "VARIABLE"} | {"OMP_NUM_THREADS": "1"}
        # Where a script would be run from, with a script that no import may run in its place.
        profile = folder / "profile.py"
        profile.write_text("raise SystemExit('not for import')")
        # Shells have what they run in the background ignore it, and children inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.server = ForkServer(env, cwd=str(folder), changed=changed.set)
        signal.signal(signal.SIGINT, before)
        assert self.server.state is State.STARTING
        assert changed.wait(LIMIT_S)
        profile.unlink()
        self.output = folder / "output"

    def start(self, script: str, *arguments: str, name: str = "script.py") -> Child:
        path = self.folder / name
        path.write_text(textwrap.dedent(script))
        command = (sys.executable, "-u", str(path), *arguments)
        return self.run(command)

    def run(self, command: tuple[str, ...]) -> Child:
        env = dict(os.environ) | {"VARIABLE": "of the rank"}
        with self.output.open("wb") as output:
            return self.server.start(command, env, str(self.folder), output)

    @property
    def said(self) -> str:
        return self.output.read_text()


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    made = Forks(tmp_path_factory.mktemp("forks"))
    assert made.server.state is State.READY
    yield made
    made.server.close()


def test_which_commands_can_be_forked() -> None:
    python = sys.executable
    assert Program.of((python, "-u", "train.py", "--lr", "1")) == Program(
        name="train.py", is_module=False, arguments=("--lr", "1")
    )
    assert Program.of((python, "-u", "-m", "a.b", "-x")) == Program(
        name="a.b", is_module=True, arguments=("-x",)
    )
    for other in [("sh", "-c", "x"), (python, "-u", "-c", "x"), (python, "x.py"), (python, "-u")]:
        assert Program.of(other) is None


def test_a_program_that_names_an_integration_has_it_imported(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from ftkit.integrations.huggingface import Trainer\n"
        "import ftkit.integrations.huggingface, ftkit.integrations.alone"
    )
    program = Program(name=str(script), is_module=False, arguments=())
    assert program.frameworks() == ["ftkit.integrations.alone", "ftkit.integrations.huggingface"]
    assert Program(name=str(tmp_path / "no"), is_module=False, arguments=()).frameworks() == []
    assert Program(name="tests", is_module=True, arguments=()).frameworks() == []


def test_a_thread_makes_a_process_unfit() -> None:
    hold = threading.Event()
    thread = threading.Thread(target=hold.wait)
    thread.start()
    assert "threads" in unfit()
    hold.set()
    thread.join()


def test_a_script_finds_what_python_would_give_it(forks: Forks) -> None:
    assert forks.start(REPORT, "one", "--two").wait() == 0
    found = json.loads(forks.said)
    path = str(forks.folder / "script.py")
    assert found["argv"] == [path, "one", "--two"]
    assert (found["name"], found["file"], found["path"]) == ("__main__", path, str(forks.folder))
    assert (found["cwd"], found["variable"]) == (str(forks.folder), "of the rank")
    assert found["parent"] == os.getpid()
    assert found["group"]
    assert found["threads"] == 1
    assert found["torch"]
    assert forks.start(REPORT).wait() == 0
    assert not set(json.loads(forks.said)["drawn"]) & set(found["drawn"])


def test_a_module_is_run_as_with_m(forks: Forks) -> None:
    (forks.folder / "package").mkdir()
    (forks.folder / "package" / "__init__.py").touch()
    (forks.folder / "package" / "tool.py").write_text("print(__name__, __spec__.name)")
    assert forks.run((sys.executable, "-u", "-m", "package.tool")).wait() == 0
    assert forks.said == "__main__ package.tool\n"


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("raise SystemExit(5)", 5, ""),
        ("import sys; sys.exit('the reason')", 1, "the reason"),
        ("def f():\n    raise ValueError('why')\nf()", 1, 'script.py", line 2, in f'),
        ("import os; os._exit(9)", 9, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit; atexit.register(print, 'at the end')", 0, "at the end"),
        ("this is no Python", 1, "SyntaxError"),
    ],
)
def test_an_end_is_told_as_of_any_child(forks: Forks, script: str, code: int, words: str) -> None:
    assert forks.start(script).wait() == code
    assert words in forks.said


def test_a_missing_script_is_told_by_the_rank(forks: Forks) -> None:
    assert forks.run((sys.executable, "-u", "nowhere.py")).wait() == 1
    assert "nowhere.py" in forks.said


def test_a_linked_script_imports_from_beside_the_file(forks: Forks) -> None:
    (forks.folder / "real").mkdir()
    (forks.folder / "real" / "beside.py").write_text("name = __name__")
    (forks.folder / "real" / "linked.py").write_text("import beside; print(beside.name)")
    (forks.folder / "link.py").symlink_to("real/linked.py")
    assert forks.run((sys.executable, "-u", "link.py")).wait() == 0
    assert forks.said == "beside\n"


def test_a_module_beside_the_script_wins_over_one_of_its_name(forks: Forks) -> None:
    (forks.folder / "own").mkdir()
    (forks.folder / "own" / "profile.py").write_text("def mine(): print('mine')")
    script = "import torch, sys; from profile import mine; mine(); print(sys.argv[1])"
    assert forks.start(script, "argument", name="own/script.py").wait() == 0
    assert forks.said == "mine\nargument\n"


def test_an_interrupt_reaches_the_script(forks: Forks) -> None:
    script = """
        import signal
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.raise_signal(signal.SIGINT)
    """
    assert forks.start(script).wait() == -signal.SIGINT
    assert "KeyboardInterrupt" in forks.said


def test_workers_that_are_spawned_find_the_script(forks: Forks) -> None:
    script = """
        import multiprocessing
        def work(x):
            return x + 1
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.map(work, [1, 2]))
    """
    (forks.folder / "spawns.py").write_text(textwrap.dedent(script))
    assert forks.run((sys.executable, "-u", "spawns.py")).wait() == 0
    assert forks.said == "[2, 3]\n"


def test_other_commands_are_started_as_ever(forks: Forks) -> None:
    child = forks.run((sys.executable, "-u", "-c", "import sys; print('torch' in sys.modules)"))
    assert child.wait() == 0
    assert forks.said == "False\n"


def test_when_the_fork_server_dies_ranks_go_on_and_are_started_without_it(tmp_path: Path) -> None:
    forks = Forks(tmp_path)
    waiting = forks.start("import time; time.sleep(60)", name="waiting.py")
    os.kill(forks.server.pid, signal.SIGKILL)
    child = forks.start("import sys; print('torch' in sys.modules)")
    assert child.wait() == 0
    assert forks.said == "False\n"
    assert forks.server.state is State.GONE
    os.kill(waiting.pid, signal.SIGTERM)
    assert waiting.wait() == -signal.SIGTERM
    forks.server.close()


def test_when_it_does_not_answer_ranks_are_started_without_it(
    forks: Forks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ftkit.launch.forking.ANSWER_S", 0.05)
    mute = Forks(tmp_path)
    os.kill(mute.server.pid, signal.SIGSTOP)
    child = mute.start(f"open('{tmp_path}/ran', 'a').write('once,')")
    assert child.wait() == 0
    assert mute.server.state is State.GONE
    assert (tmp_path / "ran").read_text() == "once,"


def test_a_rank_that_is_wanted_no_more_runs_nothing(forks: Forks) -> None:
    script = forks.folder / "unwanted.py"
    script.write_text(f"open('{forks.folder}/unwanted', 'w').close()")
    program = Program(name=str(script), is_module=False, arguments=())
    leash, theirs = socket.socketpair()
    with leash, theirs:
        order = {"program": asdict(program), "env": {}, "cwd": str(forks.folder)}
        send(forks.server._channel, order, [theirs.fileno()])
        pid = int.from_bytes(leash.recv(PID_BYTES), "big")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == exit_codes.AGENT_GONE
    assert not (forks.folder / "unwanted").exists()


def test_messages_are_whole_or_an_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        big = {"x": "y" * 300_000}  # more than the socket holds
        thread = threading.Thread(target=send, args=(ours, big))
        thread.start()
        assert receive(theirs) == (big, [])
        thread.join()
        ours.sendall((10).to_bytes(4, "big") + b"half")
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="after 4 of 10 bytes"):
            receive(theirs)
        assert receive(theirs) is None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ConnectionError, match="4294967295 bytes, more than"):
            receive(theirs)
