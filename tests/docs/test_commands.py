"""Commands of the pages that are cheap are run as they stand, on files as a reader has them."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ftkit.checkpoint.standalone import save
from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.signals import StepSeen, to_json
from ftkit.launch import simulator_seeds
from ftkit.launch.cli import main
from ftkit.launch.history import History
from tests.docs.blocks import PAGES, blocks


def nothing() -> None:
    """Nothing needs to be there."""


def a_checkpoint() -> None:
    save("runs/ckpt", 100, model=torch.nn.Linear(2, 1))


def a_trace() -> None:
    """Two ranks, one of which takes half as long again."""
    steps = [
        StepSeen(
            member=MemberId(seat),
            seat=Seat(seat),
            generation=Generation(1),
            step=Step(step),
            at=0.2 * step,
            seconds={"forward": 0.1 + 0.05 * seat},
            slots=4,
        )
        for step in range(1, 60)
        for seat in range(2)
    ]
    Path("trace.jsonl").write_text("".join(json.dumps(to_json(step)) + "\n" for step in steps))


def a_history() -> None:
    History("history.jsonl", "a job").append("end", at=1.0, code=0, trained=True)


#: What is run, what has to be there, and what is then said.
RUN: dict[str, tuple[Callable[[], None], str]] = {
    "ftkit drill list": (nothing, "lose-nodes"),
    "ftkit ckpt ls runs/ckpt": (a_checkpoint, "100"),
    "ftkit detect replay trace.jsonl --format jsonl --effect 0.1": (a_trace, "2 ranks, 59 steps"),
    "ftkit doctor offenders --history history.jsonl --json": (a_history, '"leave_out"'),
    "python -m ftkit.launch.simulator --seed 17 -v": (nothing, "17"),
}


def shown() -> set[str]:
    """Every command line of every page, without its comment."""
    return {
        " ".join(line.removeprefix("$ ").partition(" #")[0].split())
        for page in PAGES
        for _, text in blocks(page, "sh", "console")
        for line in text.replace("\\\n", " ").splitlines()
    }


def test_what_is_run_is_on_a_page() -> None:
    assert RUN.keys() <= shown()


@pytest.mark.parametrize("line", RUN)
def test_a_command_does_what_the_page_says(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, said = RUN[line]
    monkeypatch.chdir(tmp_path)
    prepare()
    words = shlex.split(line)
    if words[0] == "python":
        assert simulator_seeds.main(words[3:]) == 0
        assert said in capsys.readouterr().out
        return
    done = CliRunner().invoke(main, words[1:])
    assert done.exit_code == 0, done.output
    assert said in done.output
