"""What the pages show can be typed: commands, options, drills, names and arguments exist.

Here nothing is run: it is parsed, and what it says of ftkit is looked up. Python is run by
test_python, cheap commands by test_commands, whole scripts by tests/test_examples.py.
"""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, blocks
from tests.docs.lookup import wrong_in_command, wrong_in_python, wrong_in_shell

#: A command within a sentence, with nothing in it that stands for something else.
INLINE = re.compile(r"`(ftkit [a-z][^`…\[|<]*)`")
MODULE = re.compile(r"python -m ([a-z][\w.]*\w)")
#: `text` is drawings and listings, `diff` is compared with the examples by tests/test_examples.py,
#: `yaml` is looked at by test_cluster.
LOOKED_AT = {"python", "sh", "bash", "console", "text", "diff", "yaml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_is_there(page: Path) -> None:
    wrong = []
    for language, text in blocks(page):
        if language == "python":
            wrong += wrong_in_python(text)
        elif language not in ("diff", "yaml"):
            wrong += wrong_in_shell(text)
    for command in INLINE.findall(page.read_text()):
        wrong += wrong_in_command(" ".join(command.split()), whole=False)
    wrong += [f"there is no module {m}" for m in MODULE.findall(page.read_text()) if not find(m)]
    assert wrong == []


def find(module: str) -> bool:
    """Whether `python -m` finds it, among what this tree has."""
    return module.split(".")[0] not in {"ftkit", "benchmarks"} or find_spec(module) is not None


def test_every_block_is_of_a_kind_that_a_test_looks_at() -> None:
    """A block without a language, or in a new one, would be passed over without a word."""
    unknown = {
        (page.stem, language)
        for page in PAGES
        for language, _ in blocks(page)
        if language not in LOOKED_AT and not language.startswith("{")
    }
    assert unknown == set()
    commands = [
        (page.stem, line)
        for page in PAGES
        for language, text in blocks(page)
        for line in text.splitlines()
        if language == "text" and line.startswith(("ftkit ", "$ ", "pip ", "python "))
    ]
    assert commands == [], "what can be typed is shell"


def test_shell_has_no_error_of_syntax() -> None:
    shell = [text for page in PAGES for _, text in blocks(page, "sh", "bash")]
    wrong = []
    for text in shell:
        done = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, text=True, check=False
        )
        wrong += [done.stderr] if done.returncode else []
    assert len(shell) > 20
    assert wrong == []


def test_blocks_are_found() -> None:
    found = {page.stem: [language for language, _ in blocks(page)] for page in PAGES}
    assert found["README"].count("sh") >= 5
    assert found["overlap"].count("python") >= 6
    assert found["quickstart"].count("python") >= 2


@pytest.mark.parametrize(
    "block",
    [
        "import ftkit\nsession = ftkit.initialize()",
        "session.protekt(model=model)",
        "for step in session.steps(dataset, slot=8):\n    pass",
        "with step:\n    step.clip_grad_norm(1.0)",
        "from ftkit.checkpoint import FtkitReader",
        "from ftkit.no_such_room import anything",
        "from ftkit.collectives.overlap import ContextParallel\nContextParallel(lenght=8)",
        "with step\n    pass",
    ],
)
def test_python_that_is_wrong_is_noticed(block: str) -> None:
    assert wrong_in_python(block)


@pytest.mark.parametrize(
    "block",
    [
        "ftkit run --nprc 3 train.py",
        "ftkit rnu train.py",
        "ftkit drill run kil",
        "ftkit drill run kill --at nowhere",
        "ftkit ckpt ls --jsn",
        "ray job submit -- ftkit run --engin ray train.py",
        "ftkit run \\\n  --nope train.py",
        "./scripts/dmo",
        "ftkit run examples/no_such.py",
    ],
)
def test_shell_that_is_wrong_is_noticed(block: str) -> None:
    assert wrong_in_shell(block)
