"""DrillRecord: one drill, or one interval without one, as a line of the history."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from ftkit.core.errors import ProtocolError, StoreError
from ftkit.launch.history import append_line, json_lines, read_tail

VERSION = 1


class Survival(StrEnum):
    """What came of it."""

    SURVIVED = "survived"
    """The world is whole again, nobody else was lost, and no sample was lost or counted twice."""
    FAILED = "failed"
    UNKNOWN = "unknown"
    """It was struck, and what came of it could not be seen to the end."""
    SKIPPED = "skipped"
    """Nothing was struck: the guards forbade it until the interval was over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrikeFigures:
    """What a strike cost. Times are seconds; None is not known, or does not apply."""

    step: int = 0
    """The newest that was committed before the strike."""
    step_s: float | None = None
    """The median step before it."""
    detect_s: float | None = None
    """From the strike to the first word against its target, or the first halt."""
    next_step_s: float | None = None
    """To the moment when every survivor had committed its next step."""
    whole_s: float | None = None
    """To the moment when as many ranks as before had committed a step, a new one."""
    lost_s: float | None = None
    """Training time that it cost, until then: time that passed, less the steps that it brought."""
    steps_replayed: int | None = None
    """Committed steps that somebody had to play again."""
    steps_lost: int | None = None
    """Committed steps that were undone and not played again."""
    slots_lost: int | None = None
    """Slots of the global batch that no committed attempt held."""
    slots_doubled: int | None = None
    """Those that one held twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrillRecord(StrikeFigures):
    """See the module."""

    at: float
    """Unix time of the strike; of a skipped interval its end."""
    job: str
    fault: str
    outcome: Survival
    reason: str = ""
    """Why it is not survived."""
    node: str = ""
    """What the machine that was struck is called in every job."""
    seats: tuple[int, ...] = ()
    """Who was struck."""
    world: int = 0
    """Ranks of the full world."""
    nodes: int = 0
    engine: str = ""
    others_lost: int = 0
    """Ranks that left with an error, or were judged, and had not been struck."""
    seed: int = 0
    interval: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def struck(self) -> bool:
        return self.outcome is not Survival.SKIPPED

    @property
    def survived(self) -> bool:
        return self.outcome is Survival.SURVIVED

    def to_json(self) -> dict[str, object]:
        return {"v": VERSION, "kind": "drill"} | asdict(self) | {"seats": list(self.seats)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "DrillRecord":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            if value["v"] != VERSION or value["kind"] != "drill":
                raise ValueError("another kind of record")
            given = {f.name: value[f.name] for f in fields(cls) if f.name in value}
            for name in _NUMBERS:
                _check_number(name, given.get(name))
            for name in ("job", "fault", "reason", "node", "engine"):
                if not isinstance(given.get(name, ""), str):
                    raise TypeError(f"{name} is no text")
            return cls(
                **given
                | {
                    "outcome": Survival(given["outcome"]),
                    "seats": tuple(int(s) for s in given.get("seats", ())),
                    "versions": {str(n): str(v) for n, v in given.get("versions", {}).items()},
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ProtocolError(f"not a drill's record: {error!r}") from error


_NUMBERS = (
    *("at", "world", "nodes", "step", "step_s", "detect_s", "next_step_s", "whole_s", "lost_s"),
    *("steps_replayed", "steps_lost", "slots_lost", "slots_doubled", "others_lost"),
)


def _check_number(name: str, value: object) -> None:
    if value is None and name != "at":
        return
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not math.isfinite(float(value)) or float(value) < 0:  # type: ignore[arg-type]
        raise ValueError(f"{name} is {value!r}")


def without_figures(words: str) -> str:
    """A sentence with # for its figures, so that those of one kind are equal."""
    return re.sub(r"\d+(\.\d+)?", "#", words)


def append(path: Path, record: DrillRecord) -> None:
    """Add a line, whole and on the disk, or say why not. Raises StoreError."""
    line = json.dumps(record.to_json(), separators=(",", ":"), allow_nan=False).encode() + b"\n"
    try:
        append_line(path, line)
    except OSError as error:
        raise StoreError(f"the history {path} cannot be written: {error}") from error


def read(path: Path) -> tuple[list[DrillRecord], int]:
    """(all records in order of time, lines that are none). No file is an empty history.

    A line may be torn where a disk was full or a machine lost its power: only that one is passed over.

    Raises:
      StoreError: it cannot be read.
    """
    try:
        block = read_tail(path)
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise StoreError(f"the history {path} cannot be read: {error}") from error
    records, strange = [], 0
    for value in json_lines(block):
        try:
            records.append(DrillRecord.from_json(value or {}))
        except ProtocolError:
            strange += 1
    return sorted(records, key=lambda r: r.at), strange
