"""What the pages show can be typed: commands, options, drills, names and arguments exist.

Blocks that belong to a larger script are not run: they are parsed, and what they say of ftkit is
looked up. Whole scripts are run by test_examples.
"""

import ast
import inspect
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

import ftkit
from ftkit.core.fault_plan import Point
from ftkit.launch.cli import main
from ftkit.launch.drill_catalogue import CATALOGUE, NODE_CATALOGUE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(python|sh|bash)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
#: A command within a sentence, with nothing in it that stands for something else.
INLINE = re.compile(r"`(ftkit [a-z][^`…\[|<]*)`")
#: Needed by pages about them, and not installed everywhere.
FRAMEWORKS = {"transformers", "accelerate", "lightning", "ray", "pandas", "cloudpickle"}


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each block of code."""
    for indent, language, text in BLOCK.findall(page.read_text()):
        yield language, textwrap.indent(text, "", lambda _: True).replace(f"\n{indent}", "\n")


def usual() -> dict[str, Any]:
    """What pages call the things that a reader has: instances, by their classes."""
    from ftkit.collectives.overlap import TrafficGovernor
    from ftkit.session import Session
    from ftkit.session.step import Step

    return {"ftkit": ftkit, "session": Session, "step": Step, "governor": TrafficGovernor}


def wrong_in_python(text: str) -> list[str]:
    """Imports, attributes and arguments of ftkit that there are not, or an error of syntax."""
    try:
        tree = ast.parse(textwrap.dedent(text))
    except SyntaxError as error:
        return [f"{error}: {text}"]
    names, wrong = usual(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ftkit"):
            for alias in node.names:
                try:
                    names[alias.asname or alias.name] = imported(node.module or "", alias.name)
                except (ImportError, AttributeError) as error:
                    if not any(f in str(error) for f in FRAMEWORKS):
                        wrong.append(f"from {node.module} import {alias.name}: {error}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            owner = meant(node.value, names)
            if owner is not None and not has(owner, node.attr):
                wrong.append(f"{ast.unparse(node)}: there is no {node.attr}")
        if isinstance(node, ast.Call) and callable(called := meant(node.func, names)):
            wrong += [
                f"{ast.unparse(node)}: takes no {word.arg}"
                for word in node.keywords
                if word.arg and not takes(called, word.arg)
            ]
    return wrong


def imported(module: str, name: str) -> object:
    found = import_module(module)
    return getattr(found, name) if hasattr(found, name) else import_module(f"{module}.{name}")


def meant(node: ast.expr, names: dict[str, Any]) -> Any:
    """What of ftkit an expression is, or None where that cannot be told."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = meant(node.value, names)
        found = None if owner is None else getattr(owner, node.attr, None)
        return found if callable(found) or inspect.ismodule(found) else None
    return None


def has(owner: Any, name: str) -> bool:
    if hasattr(owner, name):
        return True
    # Attributes of instances, which only `__init__` and annotations tell of.
    return inspect.isclass(owner) and f"self.{name}" in inspect.getsource(owner)


def takes(function: Callable[..., Any], argument: str) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        return True
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return any_name or argument in parameters


def wrong_in_command(line: str, *, whole: bool = True) -> list[str]:
    """What of an `ftkit` command line there is not; a sentence may name the beginning of one."""
    try:
        words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)
    except ValueError as error:
        return [f"{line}: {error}"]
    command: click.Command = main
    context = click.Context(main, info_name="ftkit")
    words = words[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            return [f"{line}: there is no command {words[0]!r}"]
        command, words = found, words[1:]
    try:
        made = command.make_context("ftkit", list(words), parent=context)
    except click.exceptions.Exit:
        return []  # --help
    except click.NoSuchOption as error:
        return [f"{line}: {error.format_message()}"]
    except click.ClickException as error:
        return [f"{line}: {error.format_message()}"] if whole else []
    given = made.params
    wrong = []
    script = str(given.get("script") or "")
    if script.startswith("-") and script != "-m":
        wrong.append(f"{line}: there is no option {script!r}")
    fault, at = str(given.get("fault") or ""), str(given.get("at") or "")
    if (
        command.name == "run"
        and fault.islower()
        and fault not in {*CATALOGUE, *NODE_CATALOGUE, "all"}
    ):
        wrong.append(f"{line}: there is no drill {fault!r}")
    if at.islower() and at.partition(":")[0] not in {*Point, "checkpoint"}:
        wrong.append(f"{line}: there is no phase {at!r}")
    return wrong


def wrong_in_shell(text: str) -> list[str]:
    """What a block of shell says of ftkit, and of this tree, that is not so."""
    wrong = []
    for line in text.replace("\\\n", " ").splitlines():
        # Of `ray job submit ... -- ftkit run ...` and of a chain of commands, ftkit's.
        command = re.sub(r"^.*?\s--\s+(?=ftkit )", "", line.strip())
        command = re.split(r"\|\||&&|[|;&]", command)[0]
        if command.startswith("ftkit "):
            wrong += wrong_in_command(command)
        wrong += [
            f"{line}: there is no {path}"
            for path in re.findall(r"(?:^|\s)(?:\./)?((?:scripts|examples)/[\w./-]+)", line)
            if not (ROOT / path).exists()
        ]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_is_there(page: Path) -> None:
    wrong = []
    for language, text in blocks(page):
        wrong += wrong_in_python(text) if language == "python" else wrong_in_shell(text)
    for command in INLINE.findall(page.read_text()):
        wrong += wrong_in_command(" ".join(command.split()), whole=False)
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
