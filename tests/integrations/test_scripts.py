"""The example scripts for frameworks run as they are, alone: each from its first line to its last."""

import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from ftkit.integrations import ray_train

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    pytest.mark.usefixtures("fresh"),
    pytest.mark.filterwarnings("ignore"),  # frameworks have opinions on how they are used
]


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture
def in_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Scripts write below the working directory, and read no arguments of pytest's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script"])
    return tmp_path


def play(name: str, run_name: str = "__main__") -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name=run_name)


def accuracy(told: str) -> float:
    found = re.search(r"accuracy (\d\.\d+)", told)
    assert found, told
    return float(found[1])


@needs("transformers", "accelerate")
def test_hugging_face(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play("hf_trainer")
    said = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"'eval_loss': '?([\d.]+)", said)]
    assert len(losses) == 2, said
    assert losses[1] < losses[0]
    assert (in_folder / "runs/hf/checkpoint-60").is_dir()


@needs("lightning")
def test_lightning(in_folder: Path) -> None:
    play("lightning_strategy")
    assert list((in_folder / "runs/lightning").rglob("*.ckpt"))


@needs("accelerate")
def test_accelerate(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play("accelerate_steps")
    assert accuracy(capsys.readouterr().out) > 0.85


@needs("ray", "pandas", "pydantic", "requests", "cloudpickle")
def test_ray_train_s_loop_and_its_trainer(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a cluster, which `test_ray_train_run` has: the loop in this process, the trainer unfitted."""
    script, reported = play("ray_train_ddp", "ray_train_ddp"), list[dict[str, Any]]()
    monkeypatch.setattr(ray_train, "report", reported.append)
    script["train"]({"lr": 1e-2, "steps": 150})
    assert [told["step"] for told in reported] == list(range(1, 151))
    assert accuracy(capsys.readouterr().out) > 0.85

    fitted = []
    monkeypatch.setattr(script["TorchTrainer"], "fit", lambda self: fitted.append(self))
    script["main"]()
    assert len(fitted) == 1
