"""scrub: read every checkpoint whole and say which are bad. Removes nothing."""

from collections.abc import Callable
from dataclasses import dataclass

from ftkit.checkpoint.persist.checkpoint import load, steps
from ftkit.checkpoint.persist.store import Store
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubbed:
    """What `scrub` found of one step."""

    step: Step
    state: str
    """"good", "damaged", "partial" (never committed) or "unread" (of a newer format)."""
    nbytes: int = 0
    """Bytes read and found good."""
    why: str = ""
    """What is wrong, naming file and chunk; empty when nothing is."""


def scrub(store: Store, progress: Callable[[int], None] = lambda _: None) -> tuple[Scrubbed, ...]:
    """Verify every checkpoint below a root. Blocks: it reads them all.

    Args:
      store: the root.
      progress: told the bytes of each range when it has been checked.

    Returns:
      One for each step that has a folder, ascending. A checkpoint that `gc` removes meanwhile
      is left out.

    Raises:
      StoreError: the store failed.
    """
    found = list[Scrubbed]()
    for step in steps(store):
        try:
            count = load(store, step).verify(progress)
            found.append(Scrubbed(step=step, state="good", nbytes=count))
        except FileNotFoundError:
            if step in steps(store):
                why = "never committed: being written, or its writer died"
                found.append(Scrubbed(step=step, state="partial", why=why))
        except IntegrityError as error:
            if step in steps(store):
                found.append(Scrubbed(step=step, state="damaged", why=str(error)))
        except UsageError as error:
            found.append(Scrubbed(step=step, state="unread", why=str(error)))
    return tuple(found)
