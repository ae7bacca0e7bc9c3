"""Titan: the public history of the GPUs of a machine that ran from 2014 to 2019, as faults of nodes.

Lifetimes of GPUs in their slots (Ostrouchov et al., SC 2020): a row that ends in an event is a
fault of its slot at the time of removal.
"""

import csv
from datetime import UTC, datetime
from pathlib import Path

from ftkit.core.errors import UsageError

#: Slots of the machine; those whose GPU never failed have no row with an event.
SLOTS = 18_688

#: A double-bit error, and a GPU that has fallen off the bus.
EVENTS = frozenset({"DBE", "OTB"})


def read_titan(path: Path) -> tuple[list[tuple[float, str]], list[str]]:
    """The faults, (Unix seconds, slot), and all slots of the machine.

    Slots without a row get names of their own, so that the fleet has its true size.

    Raises:
      UsageError: it cannot be read, or it is no such file; names the line.
    """
    faults, slots = list[tuple[float, str]](), dict[str, None]()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if not {"location", "remove", "event"} <= set(rows.fieldnames or ()):
                raise UsageError(
                    f"{path} has the columns {rows.fieldnames}; a history of Titan has location, "
                    "remove and event"
                )
            for row in rows:
                slots[row["location"]] = None
                if row["event"] in EVENTS:
                    at = datetime.fromisoformat(row["remove"]).replace(tzinfo=UTC)
                    faults.append((at.timestamp(), row["location"]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise UsageError(f"{path}, line {rows.line_num}: {error}") from error
    unseen = [f"unseen-{i}" for i in range(SLOTS - len(slots))]
    return sorted(faults), [*slots, *unseen]
