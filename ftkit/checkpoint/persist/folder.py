"""Folder: the names of a checkpoint's parts, which are part of the format."""

import re

from ftkit.core.ids import Step

MANIFEST = "manifest.parquet"
STATE = "state.json"
COMMIT = "commit.json"

#: Files in the root that begin so were being written when their writer died.
PART = ".part-"

_STEP = re.compile(r"step-(0|[1-9][0-9]{0,17})")


def step_folder(step: Step) -> str:
    """Where a step's checkpoint lies below the root."""
    if step < 0:
        raise ValueError(f"step {step} is negative")
    return f"step-{step}"


def step_of(name: str) -> Step | None:
    """The step a folder's name says; None for what ftkit did not name."""
    found = _STEP.fullmatch(name)
    return Step(int(found[1])) if found else None
