"""Completion: what the shell offers where a person types the name of a drill, a phase or a run.

Click makes the shells' scripts; these are asked by them at every press of the tab key, so each
imports what it needs when it is asked.
"""

import click
from click.shell_completion import CompletionItem

from ftkit.launch.run_folder import RUNS


def faults(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """The drills, with what each does."""
    from ftkit.launch.drill_catalogue import CATALOGUE, NODE_CATALOGUE

    every = CATALOGUE | NODE_CATALOGUE | {"all": "faults picked by the seed"}
    return [CompletionItem(str(n), help=what) for n, what in every.items() if n.startswith(begun)]


def phases(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """The phases of a step that a drill can strike at."""
    from ftkit.core.fault_plan import Point

    return [CompletionItem(p.value) for p in Point if p.startswith(begun)]


def runs(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """The runs under runs/ by their names, and folders."""
    found = sorted(p.parent.name for p in RUNS.glob("*/events"))
    named = [CompletionItem(name) for name in found if name.startswith(begun)]
    return [*named, CompletionItem(begun, type="dir")]


def scripts(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Files, whose names the shell completes itself."""
    return [CompletionItem(begun, type="file")]
