"""The bundled training job: its model, its text, and the script against a session of one."""

import json
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.utils.data import default_collate

from ftkit.core.errors import UsageError
from ftkit.launch.workload import text, train
from ftkit.launch.workload.gpt import GPT, PRESETS, GPTConfig, next_byte_loss, parameters_digest
from ftkit.launch.workload.text import ByteWindows, load_text
from tests.launch.session_of_one import SessionOfOne

SMALL = GPTConfig(width=16, depth=1, heads=2, context=8)


# ---- the model


def test_the_same_seed_gives_the_same_bits_whatever_the_global_random_state() -> None:
    torch.manual_seed(1)
    first = GPT(SMALL, seed=7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = GPT(SMALL, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert parameters_digest(first) == parameters_digest(second)
    assert parameters_digest(GPT(SMALL, seed=8)) != parameters_digest(first)


def test_the_digest_sees_one_flipped_bit_and_the_sign_of_zero() -> None:
    model = GPT(SMALL, seed=0)
    digest = parameters_digest(model)
    with torch.no_grad():
        bias = model.get_parameter("blocks.0.feed_in.bias")
        assert float(bias[0]) == 0.0
        bias[0] = -0.0
    assert parameters_digest(model) != digest


def test_no_position_sees_the_bytes_after_it() -> None:
    model = GPT(SMALL, seed=0).eval()
    tokens = torch.arange(8)[None]
    changed = tokens.clone()
    changed[0, 5] = 200
    with torch.no_grad():
        same = (model(tokens) == model(changed)).all(dim=2)[0].tolist()
    assert same == [True] * 5 + [False] * 3


@pytest.mark.parametrize(("name", "millions"), [("4m", 4), ("25m", 25)])
def test_a_preset_has_the_size_it_is_named_for(name: str, millions: int) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in GPT(PRESETS[name], seed=0).parameters())
    assert 0.95 <= count / (millions * 1e6) <= 1.05


def test_two_runs_of_the_same_steps_end_in_the_same_bits() -> None:
    def run() -> str:
        model = GPT(SMALL, seed=0)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False, fused=False)
        windows = ByteWindows(bytes(range(256)) * 2, context=8)
        for i in range(3):
            x, y = default_collate([windows[i], windows[i + 1]])
            next_byte_loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return parameters_digest(model)

    assert run() == run()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"width": 10, "heads": 4}, "multiple of 4"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"dropout": 1.0}, "probability below 1"),
    ],
)
def test_an_impossible_shape_is_refused(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTConfig(**bad)


def test_more_positions_than_context_are_refused() -> None:
    with pytest.raises(ValueError, match="9 positions, the model's context is 8"):
        GPT(SMALL, seed=0)(torch.zeros(1, 9, dtype=torch.int64))


# ---- the text


def test_the_windows_predict_every_byte_but_the_first_once() -> None:
    windows = ByteWindows(bytes(range(21)), context=5)
    assert len(windows) == 4
    assert [t for w in (windows[i] for i in range(4)) for t in w.y.tolist()] == list(range(1, 21))
    assert windows[0].x.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        windows[4]


def test_windows_collate_to_named_batches() -> None:
    windows = ByteWindows(bytes(range(21)), context=5)
    batch = default_collate([windows[0], windows[1]])
    assert type(batch).__name__ == "Window"
    assert batch.x.shape == (2, 5)


def test_the_standard_library_is_found_without_its_tests() -> None:
    assert load_text(None, bytes_max=100_000) == load_text(None, bytes_max=200_000)[:100_000]
    root = Path(sysconfig.get_paths()["stdlib"])
    names = {p.relative_to(root).as_posix() for p in text._library_files(root)}
    assert "argparse.py" in names
    assert not [n for n in names if n.startswith("test/") or "site-packages" in n]


def test_a_folder_is_read_in_order_and_without_binary_and_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"second ")
    (tmp_path / "a.txt").write_bytes(b"first ")
    (tmp_path / "sub" / "c.txt").write_bytes(b"third")
    (tmp_path / "a.bin").write_bytes(b"\0\1\2")
    (tmp_path / ".hidden").write_bytes(b"no")
    assert load_text(tmp_path, bytes_max=1000) == b"first second third"
    assert load_text(tmp_path, bytes_max=8) == b"first se"


def test_missing_empty_and_short_texts_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"--data .*nowhere: no such file"):
        load_text(tmp_path / "nowhere", bytes_max=10)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UsageError, match="no text in it"):
        load_text(tmp_path / "empty", bytes_max=10)
    with pytest.raises(UsageError, match=r"story has 8 bytes, one window .* needs 9"):
        ByteWindows(b"12345678", context=8, origin="story")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UsageError, match="without sources"):
        load_text(None, bytes_max=10)


# ---- the script


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[SessionOfOne]:
    one = SessionOfOne()
    module = types.ModuleType("ftkit.session")
    module.init = lambda: one  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ftkit.session", module)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield one
    dist.destroy_process_group()


ARGS = [
    "--width",
    "16",
    "--depth",
    "1",
    "--heads",
    "2",
    "--context",
    "16",
    "--data-bytes",
    "50000",
    "--lr",
    "0.01",
]


def test_the_job_learns_and_tells_its_result(
    session: SessionOfOne, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*ARGS, "--steps", "12"]) == 0
    ((kind, final),) = session.events
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert kind == "final"
    assert line == {"steps": 12, "loss": final["loss"], "params": final["params"]}
    assert isinstance(final["loss"], float)
    assert final["loss"] < 5.4  # ln 256 = 5.55 is knowing nothing
    assert len(str(final["params"])) == 64
    assert set(session.protected) == {"model", "optimizer"}


def test_the_job_is_reproducible_and_the_seed_matters(session: SessionOfOne) -> None:
    for seed in ("0", "0", "1"):
        train.main([*ARGS, "--steps", "2", "--seed", seed])
    first, again, other = (fields["params"] for _, fields in session.events)
    assert first == again != other


def test_a_missing_text_ends_the_job_before_it_joins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("ftkit.session")
    module.init = lambda: pytest.fail("joined")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ftkit.session", module)
    assert train.main(["--data", "/nowhere/at/all"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--slots", "0"], "--slots must be at least 1, got 0"),
        (["--width", "10"], "multiple of 4"),
        (["--lr", "nan"], "--lr must be above 0"),
        (["--params", "9m"], "invalid choice"),
    ],
)
def test_a_senseless_command_line_is_refused(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train.parse(args)
    assert exit_info.value.code == 2
    assert words in capsys.readouterr().err


def test_a_preset_may_be_changed_in_one_respect() -> None:
    options = train.parse(["--params", "4m", "--context", "32"])
    assert (options.model.width, options.model.context) == (256, 32)
