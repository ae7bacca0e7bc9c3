"""Address: which root and step a checkpoint's name means (pure)."""

import os

from ftkit.checkpoint.persist.folder import step_folder, step_of
from ftkit.core.errors import UsageError
from ftkit.core.ids import Step

Path = str | os.PathLike[str]


def split(name: Path) -> tuple[str, Step | None]:
    """The root, and the step if one is named: "runs/a/step-7" is step 7 of "runs/a"."""
    text = os.fspath(name)
    head, slash, last = text.rstrip("/").rpartition("/")
    step = step_of(last)
    return (text, None) if step is None else (head or slash or ".", step)


def resolve(
    root: Path | None, step: int | None, checkpoint_id: Path | None
) -> tuple[str, Step | None]:
    """What the caller of DCP means, by our arguments and by DCP's.

    Args:
      root: where checkpoints lie; None when `checkpoint_id` says it.
      step: which, if known.
      checkpoint_id: "<root>/step-7", "step-7" or "7" below `root`, or only a root.

    Raises:
      UsageError: they contradict each other, or no root is named.
    """
    chosen = None if root is None else os.fspath(root)
    number = None if step is None else Step(step)
    if number is not None:
        step_folder(number)  # ValueError when it is negative
    if checkpoint_id is not None:
        text = os.fspath(checkpoint_id)
        if chosen is not None and text.isdecimal():
            return chosen, Step(int(text))
        named, found = split(text)
        if found is not None and named == "." and chosen is not None and "/" not in text:
            named = chosen
        if chosen is not None and named.rstrip("/") != chosen.rstrip("/"):
            raise UsageError(
                f"checkpoint_id {text!r} is not below {chosen!r}: give a step ('step-7' or '7'), "
                "or leave the root to checkpoint_id"
            )
        # DCP's argument is that of this very call, the constructor's may be of an earlier one.
        return named, number if found is None else found
    if chosen is None:
        raise UsageError("no root is named: give one to the constructor, or a checkpoint_id")
    return chosen, number
