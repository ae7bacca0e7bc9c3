"""What the shell offers when the tab key is pressed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete, get_completion_class

from ftkit.core.fault_plan import Point
from ftkit.launch.cli import main
from ftkit.launch.drill_catalogue import CATALOGUE, NODE_CATALOGUE


def offered(*words: str) -> list[str]:
    """What is offered for the last of the words, which has been begun."""
    *before, begun = words
    asked = ShellComplete(main, {}, "ftkit", "_FTKIT_COMPLETE")
    return [item.value for item in asked.get_completions(before, begun)]


def test_commands_and_options() -> None:
    assert offered("dri") == ["drill"]
    assert set(offered("drill", "")) >= {"run", "list", "plan", "demo"}
    assert offered("run", "--npr") == ["--nproc", "--nproc-per-node"]
    assert offered("run", "--engine", "r") == ["ray"]


def test_every_drill_and_phase() -> None:
    assert set(offered("drill", "run", "")) == {*CATALOGUE, *NODE_CATALOGUE, "all"}
    assert offered("drill", "run", "lose-nodes") == ["lose-nodes"]
    assert offered("drill", "run", "kill", "--at", "") == list(Point)
    assert offered("drill", "run", "kill", "--at", "back") == ["backward"]


@pytest.mark.parametrize("command", [("status",), ("ui",), ("explain",), ("drill", "stop")])
def test_runs_by_name_or_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b17", "a3"):
        (tmp_path / "runs" / name / "events").mkdir(parents=True)
    (tmp_path / "runs" / "no-run").mkdir()
    assert offered(*command, "") == ["a3", "b17", ""]
    assert offered(*command, "b") == ["b17", "b"]


def test_the_script_is_a_file() -> None:
    asked = ShellComplete(main, {}, "ftkit", "_FTKIT_COMPLETE")
    (item,) = asked.get_completions(["run", "--nproc", "2"], "tra")
    assert (item.value, item.type) == ("tra", "file")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script_and_a_line_on_the_page(shell: str) -> None:
    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(main, {}, "ftkit", "_FTKIT_COMPLETE").source()
    assert f"_FTKIT_COMPLETE={shell}_complete" in script
    page = Path(__file__).parents[2] / "docs" / "installing.md"
    assert f"_FTKIT_COMPLETE={shell}_source ftkit" in page.read_text()


@pytest.mark.multiproc
def test_the_command_answers_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from ftkit.launch.cli import main; main(prog_name='ftkit')"],
        env=os.environ
        | {
            "_FTKIT_COMPLETE": "bash_complete",
            "COMP_WORDS": "ftkit drill run kil",
            "COMP_CWORD": "3",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "plain,kill" in done.stdout.splitlines()
