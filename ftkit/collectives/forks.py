"""Forks: what a process that was forked from a rank does with the rank's groups. It lets go of them.

A rank forks, knowingly or not: the workers of a DataLoader, for one, are forked. A child holds
copies of all descriptors, and a connection ends with its last copy. A rank that is killed would
live on for its peers until its workers have noticed and ended, which takes seconds.
"""

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """What holds descriptors, threads and locks that mean nothing in a child."""

    def let_go(self) -> None:
        """(in a child, right after the fork) Close descriptors, touch no lock, wake nobody."""


_all: "weakref.WeakSet[Forked]" = weakref.WeakSet()


def watch(held: Forked) -> None:
    """Have children let go of `held`, for as long as it is used by anybody."""
    _all.add(held)


def _let_go() -> None:
    for held in list(_all):
        held.let_go()
    _all.clear()


os.register_at_fork(after_in_child=_let_go)
