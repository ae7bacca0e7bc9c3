"""How the result of a node's checks looks on a terminal."""

from rich.console import Console
from rich.markup import escape

from ftkit.detection.node_health import Health, NodeResult

_COLOURS = {Health.OK: "green", Health.WARNING: "yellow", Health.FAILED: "bold red"}


def show(found: NodeResult) -> None:
    """Print a line for each check, and what it means for a job."""
    console = Console(highlight=False)
    console.print(f"node {escape(found.node)}")
    for check in found.checks:
        colour = _COLOURS.get(check.health, "dim")
        console.print(
            f"  [{colour}]{check.health.value:8}[/] {check.name:8} {escape(check.note)}",
            soft_wrap=True,
        )
    if found.failed:
        console.print("[bold red]this node should carry no job until that is mended[/]")
