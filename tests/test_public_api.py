"""What a user may rely on: the public names, and how little an import brings in."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import ftkit

#: Heavy: a second or more each, and none of an agent's business.
HEAVY = {"torch", "ray", "zarr", "pyarrow"}


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json\nprint(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_public_names() -> None:
    assert sorted(ftkit.__all__) == [
        "FtkitError", "JobFault", "Session", "UsageError", "ZeroOptimizer", "init",
    ]  # fmt: skip
    assert set(ftkit._WHERE) == set(ftkit.__all__)
    for name in ftkit.__all__:
        assert getattr(ftkit, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ftkit.nonsense
    assert ftkit.__version__


def test_importing_ftkit_and_its_errors_brings_in_nothing_heavy() -> None:
    assert not imported_by("import ftkit; ftkit.UsageError") & (HEAVY | {"numpy"})


@pytest.mark.parametrize(
    "module",
    [
        "ftkit.launch.agent",
        "ftkit.launch.coordinator",
        "ftkit.launch.processes",
        "ftkit.launch.drills",
        "ftkit.launch.live",
        "ftkit.launch.report",
    ],
)
def test_processes_beside_the_ranks_import_no_torch(module: str) -> None:
    assert not imported_by(f"import {module}") & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["drill", "list"],
        ["ckpt", "--help"],
        ["ckpt", "ls", "--help"],
    ],
)
def test_the_command_line_answers_without_torch(arguments: list[str]) -> None:
    code = (
        "from ftkit.launch.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code"
    )
    found = imported_by(code)
    assert "click" in found
    assert not found & HEAVY


def test_importing_the_checkpoint_room_brings_in_no_torch() -> None:
    code = "import ftkit.checkpoint as c; print(sorted(c.__all__)); import ftkit.core.errors"
    assert not imported_by(code) & HEAVY
    assert "torch" in imported_by("from ftkit.checkpoint import FtkitStorageWriter")
    code = (
        "import torch, sys, ftkit.checkpoint\n"
        "assert 'torch.distributed.checkpoint' not in sys.modules\n"
        "try:\n    ftkit.checkpoint.nonsense\nexcept AttributeError:\n    pass"
    )
    imported_by(code)


@pytest.mark.parametrize("module", ["ftkit", "ftkit.checkpoint", "ftkit.collectives.overlap"])
def test_the_reference_has_every_public_name(module: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    told = set(re.findall(r"^\.\. auto\w+:: (?:ftkit\.[a-z_.]+\.)?(\w+)$", page, re.MULTILINE))
    assert set(import_module(module).__all__) <= told
