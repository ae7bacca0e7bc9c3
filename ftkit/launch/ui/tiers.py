"""TierView: how new the copies are that a run keeps in memory, as parity and on disk. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Steps of which it is remembered who sealed their snapshot: ranks are a few apart at most.
_STEPS_KEPT = 16
#: What is said of a tier that failed, by the kind of event.
_FAILED = {
    "snapshot-failed": "memory",
    "parity-failed": "parity",
    "rebuild-failed": "parity",
    "checkpoint-failed": "disk",
}


@dataclass(slots=True, kw_only=True)
class Tier:
    """One tier as it was last heard of. Owned and changed by `TierView` alone."""

    name: str
    step: int | None = None
    """The newest step that counts there."""
    at: float | None = None
    """Unix time at which it began to count."""
    size: int | None = None
    """Bytes of that step."""
    took_s: float | None = None
    """From the order to the end; of memory: what training was held up for on the slowest rank."""
    detail: str = ""
    wrong: str = ""
    """Why the last attempt failed; empty after one that did not."""

    def to_json(self) -> dict[str, object]:
        return {
            "tier": self.name,
            "step": self.step,
            "t": self.at,
            "bytes": self.size,
            "seconds": self.took_s,
            "detail": self.detail,
            "wrong": self.wrong,
        }


@dataclass(slots=True)
class TierView:
    """The tiers from the nearest to the farthest. Feed it events; read `tiers`."""

    tiers: dict[str, Tier] = field(
        default_factory=lambda: {n: Tier(name=n) for n in ("memory", "parity", "disk")}
    )
    _sealed: dict[int, dict[int, tuple[int, float]]] = field(default_factory=dict)
    """Step -> seat -> (bytes, seconds that its training was held up)."""

    def feed(self, event: Mapping[str, Any]) -> None:
        """Take one event. Raises KeyError, TypeError or ValueError when it lacks a field."""
        kind = event["kind"]
        if kind in _FAILED:
            self.tiers[_FAILED[kind]].wrong = str(event.get("reason") or event.get("error"))
            return
        match kind:
            case "snapshot":
                self._snapshot(event)
            case "parity":
                self._newest(
                    self.tiers["parity"],
                    event,
                    size=int(event["bytes"]),
                    took_s=float(event["seconds"]),
                    detail=f"computed by {event['engine']}",
                )
            case "checkpoint":
                self._newest(
                    self.tiers["disk"],
                    event,
                    size=int(event["stored_bytes"]),
                    took_s=float(event["seconds"]),
                    detail=str(event["url"]),
                )

    def _snapshot(self, event: Mapping[str, Any]) -> None:
        step, seat = int(event["step"]), int(event["seat"])
        held_up = float(event["begin_s"]) + float(event["gate_s"])
        self._sealed.setdefault(step, {})[seat] = int(event["bytes"]), held_up
        for old in sorted(self._sealed)[:-_STEPS_KEPT]:
            del self._sealed[old]
        shares = self._sealed.get(step, {})
        self._newest(
            self.tiers["memory"],
            event,
            size=sum(size for size, _ in shares.values()),
            took_s=max((spent for _, spent in shares.values()), default=0.0),
            detail=f"sealed by {len(shares)} rank{'s' if len(shares) != 1 else ''}",
        )

    @staticmethod
    def _newest(
        tier: Tier, event: Mapping[str, Any], *, size: int, took_s: float, detail: str
    ) -> None:
        tier.wrong = ""
        # Files are read one after another: what is older than what is known changes nothing.
        if tier.at is not None and float(event["t"]) < tier.at:
            return
        tier.step, tier.at, tier.size = int(event["step"]), float(event["t"]), size
        tier.took_s, tier.detail = took_s, detail
