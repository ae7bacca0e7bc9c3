"""Later: a command that is imported when it is called, and not to be listed in a help text."""

from importlib import import_module
from typing import Any

import click


class Later(click.Command):
    """Stands for the command of that name in a module."""

    def __init__(self, name: str, module: str, short_help: str) -> None:
        """Import nothing yet.

        Args:
          name: of the command, in the module too.
          module: which has it.
          short_help: the first line of its own.
        """
        super().__init__(name, short_help=short_help)
        self._module = module

    @property
    def command(self) -> click.Command:
        """What it stands for."""
        assert self.name is not None, "given"
        found: click.Command = getattr(import_module(self._module), self.name)
        return found

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The context of what it stands for, which is what runs then."""
        return self.command.make_context(info_name, args, parent, **extra)
