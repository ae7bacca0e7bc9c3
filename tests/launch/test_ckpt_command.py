"""`ftkit ckpt`: what it prints, what it exits with, what it refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.core.ids import Step
from ftkit.launch.cli import main
from tests.checkpoint.persist.stories import flip, save


@pytest.fixture
def root(tmp_path):
    """Three checkpoints, with a loss each."""
    store = LocalStore(tmp_path / "root")
    for step, loss in [(1, 3.0), (2, 1.0), (3, 2.0)]:
        save(store, step, metrics={"loss": loss})
    return tmp_path / "root"


def damage(root: Path, step: int) -> Path:
    checkpoint = open_checkpoint(LocalStore(root), Step(step))
    file = root / f"step-{step}" / checkpoint.chunks["model/weight"][0].file
    file.write_bytes(flip(file.read_bytes(), 5))
    return file


def ftkit(*arguments, code=0):
    """(stdout, stderr) of `ftkit ckpt` with these arguments."""
    done = CliRunner().invoke(main, ["ckpt", *map(str, arguments)])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def as_json(*arguments, code=0):
    return json.loads(ftkit(*arguments, "--json", code=code)[0])


def test_ls_tells_good_from_damaged_and_partial(root):
    (root / "step-2" / "manifest.parquet").write_bytes(b"")
    (root / "step-3" / "commit.json").unlink()
    found = as_json("ls", "-d", root)["checkpoints"]
    assert [(c["step"], c["state"]) for c in found] == [
        (1, "good"), (2, "damaged"), (3, "partial"),
    ]  # fmt: skip
    assert found[0]["metrics"] == {"loss": 3.0}
    on_disk = sum(f.stat().st_size for f in (root / "step-1").rglob("*") if f.is_file())
    commit = (root / "step-1" / "commit.json").stat().st_size
    assert found[0]["bytes"] == on_disk - commit
    out, _ = ftkit("ls", "-d", root)
    assert "manifest.parquet" in out
    assert abs(found[0]["written_at"] - time.time()) < 600
    assert time.strftime("%Y-%m-") in out


def test_show_names_every_tensor(root):
    found = as_json("show", 2, "-d", root)
    assert found["step"] == 2
    assert {t["name"]: (t["dtype"], t["shape"]) for t in found["tensors"]} == {
        "model/weight": ("float32", [23, 11]),
        "model/half": ("bfloat16", [40, 60]),
        "model/uneven": ("int64", [17, 3]),
        "optimizer/step": ("float32", []),
        "nothing": ("float32", [0, 4]),
    }
    assert as_json("show", "-d", root)["step"] == 3
    assert as_json("show", root / "step-1")["step"] == 1
    out, _ = ftkit("show", 2, "-d", root)
    assert "model/uneven" in out
    assert "[17, 3]" in out


def test_verify_names_file_and_chunk_and_exits_with_1(root):
    assert as_json("verify", "-d", root) | {"bytes": 0} == {"good": True, "step": 3, "bytes": 0}
    file = damage(root, 3)
    assert as_json("verify", 2, "-d", root)["good"]
    found = as_json("verify", 3, "-d", root, code=1)
    assert not found["good"]
    assert str(file) in found["why"]
    out, err = ftkit("verify", 3, "-d", root, code=1)
    assert out == ""
    assert "'model/weight'" in err
    assert str(file) in err


def test_verify_of_the_newest_does_not_pass_over_a_damaged_one(root):
    (root / "step-3" / "manifest.parquet").write_bytes(b"")
    assert not as_json("verify", root, code=1)["good"]
    assert as_json("show", root)["step"] == 2, "what a job would go on from"


def test_a_folder_may_be_named_without_an_option(root, tmp_path):
    assert [c["step"] for c in as_json("ls", root)["checkpoints"]] == [1, 2, 3]
    assert as_json("show", root)["step"] == 3
    assert as_json("diff", root, f"{root}/step-3")["changed"] == []
    assert len(as_json("scrub", root)["checkpoints"]) == 3
    assert as_json("gc", root, "--keep", "last:1")["removed"] == [1, 2]
    (tmp_path / "empty").mkdir()
    for command in ("ls", "scrub"):
        assert ftkit(command, tmp_path / "empty")[0] == f"no checkpoints in {tmp_path}/empty\n"


def test_scrub_reads_all_and_removes_nothing(root):
    assert "damaged" not in ftkit("scrub", "-d", root)[0]
    file = damage(root, 2)
    before = sorted(root.rglob("*"))
    found = as_json("scrub", "-d", root, code=1)["checkpoints"]
    assert [(c["step"], c["state"]) for c in found] == [(1, "good"), (2, "damaged"), (3, "good")]
    assert str(file) in found[1]["why"]
    assert sorted(root.rglob("*")) == before


def test_diff_says_what_changed(root):
    found = as_json("diff", 1, 2, "-d", root, code=1)
    assert "model/weight" in found["changed"]
    assert found["same"] == ["nothing"]
    assert as_json("diff", 1, root / "step-1", "-d", root)["changed"] == []
    out, _ = ftkit("diff", 1, 2, "-d", root, code=1)
    assert "changed: model/weight" in out


def test_gc_keeps_what_policies_want_and_the_newest(root):
    for words in ("last:0", "newest:3", "best:", "every:x", "best:loss:1:2", "last"):
        _, err = ftkit("gc", "--keep", words, "-d", root, code=64)
        assert words in err
    found = as_json("gc", "--keep", "best:loss", "-d", root)
    assert (found["kept"], found["removed"]) == ([2, 3], [1])
    assert sorted(p.name for p in root.glob("step-*")) == ["step-2", "step-3"]
    assert as_json("gc", "--keep", "every:2,last:1", "-d", root)["kept"] == [2, 3]
    assert as_json("gc", "--keep", "best:loss:1:max", "-d", root)["kept"] == [3]
    out, _ = ftkit("gc", "--keep", "last:1", "-d", root)
    assert "kept: 3" in out
    damage(root, 3)
    out, _ = ftkit("gc", "--keep", "last:1", "-d", root, code=1)
    assert "damaged: step 3" in out


def test_convert_there_and_back(tmp_path):
    torch.save({"model": {"w": torch.arange(6.0)}, "n": 2}, tmp_path / "a.pt")
    out, err = ftkit("convert", tmp_path / "a.pt", tmp_path / "r" / "step-5", "--to", "ftkit")
    assert (out, err) == ("1 tensors, 24 B: torch to ftkit\n", "")
    found = as_json(
        "convert", tmp_path / "r", tmp_path / "m.pt", "--to", "torch", "--part", "model"
    )
    assert found == {"source": "ftkit", "target": "torch", "tensors": 1, "nbytes": 24}
    assert torch.equal(torch.load(tmp_path / "m.pt")["w"], torch.arange(6.0))
    _, err = ftkit("convert", tmp_path / "r", tmp_path / "m.pt", "--to", "torch", code=64)
    assert "exists" in err
    file = next((tmp_path / "r").rglob("c.0"))
    file.write_bytes(flip(file.read_bytes(), 5))
    _, err = ftkit("convert", tmp_path / "r", tmp_path / "n.pt", "--to", "torch", code=1)
    assert str(file) in err
    assert not (tmp_path / "n.pt").exists()


def test_what_is_not_there_is_said(tmp_path, root):
    for arguments, words in [
        (("ls", "-d", tmp_path / "nowhere"), "no folder"),
        (("show", 9, "-d", root), "step 9 has no checkpoint"),
        (("show", "nine", "-d", root), "is no step"),
        (("verify", "-d", tmp_path), "no checkpoint in"),
    ]:
        _, err = ftkit(*arguments, code=64)
        assert words in err


def test_an_interrupt_has_its_own_exit_code(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ftkit.checkpoint.ecosystem.safetensors.write", interrupted)
    _, err = ftkit(
        "convert", tmp_path / "a.pt", tmp_path / "b.safetensors", "--to", "safetensors", code=130
    )
    assert "nothing was left" in err
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt"}


@pytest.mark.multiproc
def test_as_a_process(root):
    damage(root, 3)
    done = subprocess.run(
        [sys.executable, "-m", "ftkit.launch.cli", "ckpt", "scrub", "--json", "-d", root],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ""
    states = [c["state"] for c in json.loads(done.stdout)["checkpoints"]]
    assert states == ["good", "good", "damaged"]


@pytest.mark.parametrize(
    "command",
    [["ls"], ["scrub"], ["gc", "--keep", "last:1"], ["show"], ["verify"], ["show", "1", "-d"],
     ["convert", "--to", "torch", "x"], ["diff", "s3:/bucket"]],
)  # fmt: skip
def test_a_url_with_one_slash_is_taken_for_no_folder(command, tmp_path):
    _, err = ftkit(*command, "s3:/bucket", code=64)
    assert "did you mean s3://bucket?" in err


def test_a_file_where_checkpoints_should_be_is_called_one(tmp_path):
    (tmp_path / "file").touch()
    _, err = ftkit("ls", tmp_path / "file", code=64)
    assert "that is a file" in err
