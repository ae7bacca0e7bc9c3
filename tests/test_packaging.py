"""What is built from this tree holds what a user needs, and works away from the tree."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import ftkit

ROOT = Path(__file__).parents[1]
#: Of the command line, with the entry point that the wheel declares; Ray is not installed.
FTKIT = """
import sys
from importlib.metadata import distributions
sys.modules["ray"] = None
(wheel,) = distributions(path=[sys.argv.pop(1)], name="ftkit")
(script,) = wheel.entry_points.select(group="console_scripts", name="ftkit")
command = script.load()
import ftkit
print(ftkit.__file__)
sys.argv[0] = "ftkit"
sys.exit(command())
"""

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.skipif(
        importlib.util.find_spec("hatchling") is None,
        reason="hatchling, which builds it, is missing",
    ),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def unpacked(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as an installation lays it out."""
    folder = tmp_path_factory.mktemp("unpacked")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def metadata(unpacked: Path) -> Message:
    (file,) = unpacked.glob("*.dist-info/METADATA")
    return Parser().parsestr(file.read_text())


def files(folder: Path) -> set[str]:
    """Paths below `folder` of all that is no bytecode."""
    return {
        str(f.relative_to(folder))
        for f in folder.rglob("*")
        if f.is_file() and "__pycache__" not in f.parts
    }


def test_the_wheel_is_the_package_and_all_that_lies_in_it(unpacked: Path) -> None:
    found = files(unpacked / "ftkit")
    assert found == files(ROOT / "ftkit")
    assert {"py.typed", *(f"launch/ui/static/{n}" for n in ("index.html", "ui.css", "ui.js"))} <= (
        found
    )
    assert {p.name.partition("-")[0] for p in unpacked.iterdir()} == {"ftkit"}


def test_the_source_archive_builds_tests_and_documents(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    assert {f"ftkit/{n}" for n in files(ROOT / "ftkit")} <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "scripts/test"} <= names
    assert {"docs/index.md", "examples/ddp_minimal.py", "tests/test_packaging.py"} <= names
    assert not {n for n in names if "__pycache__" in n or n.startswith((".git/", ".venv/"))}


def test_the_core_is_light_and_extras_have_their_names(metadata: Message) -> None:
    assert metadata["Version"] == ftkit.__version__
    extras = set(metadata.get_all("Provides-Extra", []))
    assert {"ray", "ui", "huggingface", "lightning", "accelerate", "raytrain", "otel"} <= extras
    core = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert any(r.startswith("torch") for r in core)
    assert not [r for r in core if r.startswith(("ray", "transformers", "lightning", "pandas"))]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "Fault tolerance for distributed PyTorch training"),
        (["run", "--engine", "ray", "train.py"], 64, "pip install 'ftkit[ray]'"),
    ],
)
def test_the_command_works_from_the_wheel_without_ray(
    unpacked: Path, tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    (tmp_path / "train.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", FTKIT, str(unpacked), *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert Path(done.stdout.splitlines()[0]).is_relative_to(unpacked)
    assert says in done.stdout + done.stderr
    assert [f.name for f in tmp_path.iterdir()] == ["train.py"]


def test_ctrl_c_while_it_still_imports_ends_it_in_words() -> None:
    script = """
import sys
class Pressed:
    def find_spec(self, name, *_):
        if name == "ftkit.launch.cli":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Pressed())
from ftkit.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "ftkit: interrupted\n")


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ftkit", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ftkit.__version__ in done.stdout
