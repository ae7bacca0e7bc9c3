"""What of a run's events is worth a line to a person who watches, and that line. Pure."""

from collections.abc import Mapping
from typing import Any

#: Kinds of events that change something, or say that something is not as it should be.
TOLD = frozenset(
    {
        "drill", "healed", "verdict", "suspicion", "verdict-over", "exit", "halt", "decision",
        "resume", "restore", "drain", "drained", "blind", "sighted", "diverged", "repaired",
        "approximate", "averaged", "taken-over", "rebuild", "rebuild-failed", "scrub", "parity-failed",
        "snapshot-failed",
        "checkpoint", "checkpoint-failed", "checkpoint-unread", "history-failed", "metrics-failed",
        "checkpoint-interval", "parity-interval", "rebalance", "self-check", "preflight", "probed", "end",
    }
)  # fmt: skip

#: Fields that say what a line is about, in the order of reading; the first ones without a name.
_PLAIN = ("fault", "action", "outcome", "phase", "tensor", "said", "reason", "error")
_NAMED = ("step", "generation", "node", "code", "signal", "seconds", "what")


def sentence(event: Mapping[str, Any]) -> str:
    """The event in one line, without its kind and its time."""
    seat = event.get("seat", event.get("damaged"))
    parts = [f"rank {seat}"] if isinstance(seat, int) else []
    parts += [str(event[name]) for name in _PLAIN if event.get(name)]
    parts += [
        f"{name} {_short(event[name])}" for name in _NAMED if event.get(name) not in (None, "")
    ]
    return ", ".join(parts)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
