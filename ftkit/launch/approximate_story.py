"""What of a run's state was approximated, in sentences for people (pure)."""

from collections.abc import Iterable, Mapping
from typing import Any


def approximate_story(events: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each time that a job went on with other values than it had lost."""
    return [told(e) for e in events if e.get("kind") == "approximate" and "reason" in e]


def told(event: Mapping[str, Any]) -> str:
    """What one such event says."""
    return (
        f"From step {event.get('step')} on the result is approximate ({event.get('way')}): "
        f"{event.get('reason')}."
    )
