"""Modules: whether `python -m NAME` would find one, found out without importing anything."""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path

from ftkit.core.errors import UsageError
from ftkit.launch.choices import near


def check_module(name: str) -> None:
    """Refuse a module that no rank will find, before any is started.

    A package that sets its own `__path__` is given the benefit of the doubt.

    Raises:
      UsageError: there is no such module, or it is a package that cannot be run.
    """
    if (name.endswith(".py") or "/" in name) and Path(name).is_file():
        raise UsageError(f"-m {name}: that is a file, not a module's name; leave -m out")
    # What a rank's Python puts first, whatever this process was started by.
    where: list[str] | None = [*([] if sys.flags.safe_path else [os.getcwd()]), *sys.path]
    done: list[str] = []
    for part in name.split("."):
        spec = _find(part, where, outermost=not done)
        if spec is None:
            raise UsageError(
                f"there is no module {name!r}: {'.'.join(done) or 'the path of Python'} has no "
                f"{part!r}; it was looked for from {os.getcwd()} on"
                f"{near(part, _beside(where or ()))}"
            )
        done.append(part)
        if _sets_its_path(spec):
            return
        where = spec.submodule_search_locations and list(spec.submodule_search_locations)
    if where is not None and _find("__main__", where, outermost=False) is None:
        raise UsageError(
            f"-m {name}: it is a package without a __main__ that could be run; name one of its "
            f"modules: {', '.join(_beside(where)) or 'there are none'}"
        )


def _find(part: str, where: list[str] | None, *, outermost: bool) -> ModuleSpec | None:
    """The module of this name in the folders `where`; outermost ones are asked of every finder.

    By its last name alone: of a dotted one without an `__init__` the parent would have to be imported.
    """
    if where is None:
        return None  # a module, not a package
    spec = importlib.machinery.PathFinder.find_spec(part, where)
    if spec is None and outermost and part.isidentifier():
        spec = importlib.util.find_spec(part)  # built in, frozen, or an editable installation's
    return spec


def _sets_its_path(spec: ModuleSpec) -> bool:
    if spec.submodule_search_locations is None or not spec.has_location:
        return False
    try:
        return b"__path__" in Path(spec.origin or "").read_bytes()
    except OSError:
        return True


def _beside(where: Iterable[str]) -> list[str]:
    """Names of modules in these folders."""
    found: set[str] = set()
    for folder in map(Path, where):
        found |= {p.stem for p in folder.glob("*.py")}
        found |= {p.parent.name for p in folder.glob("*/__init__.py")}
    return sorted(found - {"__init__"})
