"""The snippets of docs/ecosystem.md run as they stand, one after another."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.multiproc
def test_every_snippet_runs(tmp_path):
    text = (ROOT / "docs" / "ecosystem.md").read_text()
    snippets = re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in snippets] == ["python", "python", "sh"]
    python = "\n".join(code for kind, code in snippets if kind == "python")
    (tmp_path / "snippets.py").write_text(python)
    command = f'ftkit() {{ {sys.executable} -m ftkit.launch.cli "$@"; }}\nset -e\n'
    shell = command + next(code for kind, code in snippets if kind == "sh")
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments in ([sys.executable, "snippets.py"], ["bash", "-c", shell]):
        done = subprocess.run(
            arguments, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "checkpoints").glob("step-*")} == {"step-200"}
    assert (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "again.pt").exists()
