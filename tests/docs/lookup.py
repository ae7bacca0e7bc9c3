"""What a piece of code says of ftkit that is not so: names, arguments, commands, options, paths."""

import ast
import inspect
import re
import shlex
import textwrap
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

import ftkit
from ftkit.core.fault_plan import Point
from ftkit.launch.cli import main
from ftkit.launch.drill_catalogue import CATALOGUE, NODE_CATALOGUE
from tests.docs.blocks import ROOT

#: Needed by pages about them, and not installed everywhere.
FRAMEWORKS = {"transformers", "accelerate", "lightning", "ray", "pandas", "cloudpickle"}


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
        command = re.sub(r"^.*?\s--\s+(?=ftkit )", "", line.strip().removeprefix("$ "))
        command = re.split(r"\|\||&&|[|;&]", command)[0]
        if command.startswith("ftkit "):
            wrong += wrong_in_command(command)
        wrong += [
            f"{line}: there is no {path}"
            for path in re.findall(r"(?:^|\s)(?:\./)?((?:scripts|examples)/[\w./-]+)", line)
            if not (ROOT / path).exists()
        ]
    return wrong
