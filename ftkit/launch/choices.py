"""Choices: an option's list with commas, of which each has to be one of some."""

import difflib
from collections.abc import Collection

from ftkit.core.errors import UsageError


def chosen(text: str, among: Collection[str], *, option: str) -> list[str]:
    """The names in `text`, each once, in the order given. UsageError for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in among:
            near = difflib.get_close_matches(name, among, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"{option}: {name!r} is none of {', '.join(among)}{hint}")
    return list(dict.fromkeys(names))
