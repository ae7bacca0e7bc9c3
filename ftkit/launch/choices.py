"""Choices: names that a person types, each of which has to be one of some."""

import difflib
import re
from collections.abc import Callable, Collection
from typing import TypeVar

from ftkit.core.errors import UsageError

N = TypeVar("N", int, float)


def chosen(text: str, among: Collection[str], *, option: str) -> list[str]:
    """The names in `text`, each once, in the order given. UsageError for one that there is not."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in among:
            raise UsageError(f"{option}: {name!r} is none of {', '.join(among)}{near(name, among)}")
    return list(dict.fromkeys(names))


def near(name: str, among: Collection[str]) -> str:
    """The end of a message that refuses `name`: what may have been meant; "" where nothing is."""
    found = difflib.get_close_matches(name.lower(), among, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def refuse_half_url(text: str) -> None:
    """Raise UsageError for s3:/bucket: one slash of a URL's two, and so a folder named s3: here."""
    if re.match(r"[a-z][a-z0-9+.]+:/(?!/)", text):
        meant = text.replace(":/", "://", 1)
        raise UsageError(f"{text} is neither a path nor a URL; did you mean {meant}?")


def seconds_or_auto(text: object) -> float | str:
    """(--parity-every) A number of seconds, or "auto". UsageError for anything else."""
    return _or_auto(text, float, "--parity-every", "seconds")


def steps_or_auto(text: object) -> int | str:
    """(--checkpoint-every) A number of steps, or "auto". UsageError for anything else."""
    return _or_auto(text, int, "--checkpoint-every", "steps")


def _or_auto(text: object, kind: Callable[[str], N], option: str, unit: str) -> N | str:
    if text == "auto":
        return "auto"
    try:
        return kind(str(text))
    except ValueError as error:
        raise UsageError(
            f"{option}: {text!r} is neither a number of {unit} nor auto{near(str(text), ['auto'])}"
        ) from error
