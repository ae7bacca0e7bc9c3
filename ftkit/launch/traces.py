"""Traces: recorded jobs as the signals that a live one would have sent.

Formats: ``bytedance`` (one row an operation, parquet), ``alibaba`` (one row a worker and moment,
CSV) and ``jsonl`` (our own signals, one a line). Rows may come in any order, ranks and steps may
be missing; durations that are none (not finite, not above zero) are passed over.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from ftkit.core.errors import ProtocolError, UsageError
from ftkit.core.ids import Generation, MemberId, Seat, Step
from ftkit.detection.cusum import median
from ftkit.detection.peers import log_or_none
from ftkit.detection.signals import StepSeen, from_json

#: Columns without which an operation says nothing.
_BYTEDANCE: Final = ("step", "optype", "duration")
_COMPUTE: Final = {"forward-compute": "forward", "backward-compute": "backward"}
#: Operations on the device that wait for nobody.
_OWN: Final = {"optimizer": "optimizer", "optimizer-clip-main-grad": "optimizer"}


def read_trace(path: Path, format_: str) -> list[StepSeen]:
    """The steps of a recorded job, in order.

    Args:
      path: a file.
      format_: a name of `FORMATS`.

    Raises:
      UsageError: it cannot be read, or is not of that format.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file")
    try:
        steps = FORMATS[format_](path)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as {format_}: {error}") from error
    if not steps:
        raise UsageError(f"{path} holds no step that could be judged")
    return sorted(steps, key=lambda s: (s.generation, s.step, s.seat))


def _bytedance(path: Path) -> list[StepSeen]:
    """Operations by rank and step; compared is the mean computation of a micro-batch."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(str(error)) from error
    missing = [c for c in _BYTEDANCE if c not in table.column_names]
    if missing:
        raise ValueError(f"columns {', '.join(missing)} are missing")
    if not {"rank", "dp_rank", "stage"} & set(table.column_names):
        raise ValueError("no column says whose an operation is: rank, or dp_rank and stage")

    def numbers_of(name: str) -> list[float | None]:
        try:
            return list(table.column(name).cast(pyarrow.float64()).to_pylist())
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
            raise ValueError(f"column {name} holds no numbers: {error}") from error

    def whole_of(name: str) -> list[int | None]:
        return [int(n) if n is not None and math.isfinite(n) else None for n in numbers_of(name)]

    has, none = set(table.column_names), [None] * table.num_rows
    steps, durations_s = whole_of("step"), numbers_of("duration")
    starts = numbers_of("start_ts") if "start_ts" in has else none
    dps, stages = (whole_of(name) if name in has else none for name in ("dp_rank", "stage"))
    if "rank" in has:
        ranks = whole_of("rank")
    else:
        pairs = [(dp or 0, stage or 0) for dp, stage in zip(dps, stages, strict=True)]
        numbers = {pair: i for i, pair in enumerate(sorted(set(pairs)))}
        ranks = [numbers[pair] for pair in pairs]

    durations: dict[tuple[int, int], dict[str, list[float]]] = {}
    ends: dict[int, float] = {}
    places: dict[int, tuple[int, int]] = {}
    optypes = table.column("optype").to_pylist()
    rows = zip(ranks, steps, optypes, durations_s, starts, dps, stages, strict=True)
    for rank, step, op, duration, start, dp, stage in rows:
        if rank is None or step is None or duration is None or not _is_duration(duration):
            continue
        durations.setdefault((step, rank), defaultdict(list))[str(op)].append(duration)
        before = places.get(rank, (0, 0))
        places[rank] = (before[0] if dp is None else dp, before[1] if stage is None else stage)
        if start is not None and math.isfinite(start):
            ends[step] = max(ends.get(step, 0.0), start + duration)

    # A row that was lost makes nobody faster: micro-batches are counted for a stage as a whole.
    slots: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (step, rank), ops in durations.items():
        slots[step, places[rank][1]].append(max(len(ops.get(op, ())) for op in _COMPUTE))
    found: list[StepSeen] = []
    clock: dict[int, float] = {}
    now = 0.0
    for step in sorted(ends.keys() | {s for s, _ in durations}):
        now += ends.get(step, 1.0)
        clock[step] = now
    for (step, rank), ops in durations.items():
        dp, stage = places[rank]
        batches = max(1, round(median(slots[step, stage])))
        seconds: dict[str, float] = {}
        for op, phase in _COMPUTE.items():
            if ops.get(op):
                seconds[phase] = batches * sum(ops[op]) / len(ops[op])
        if len(seconds) < len(_COMPUTE):
            continue  # half a step compares with nothing
        for op, phase in _OWN.items():
            seconds[phase] = seconds.get(phase, 0.0) + sum(ops.get(op, ()))
        gc = sum(ops.get("gc", ()))
        seconds["forward"] += gc
        known = {*_COMPUTE, *_OWN, "gc"}
        found.append(
            StepSeen(
                member=MemberId(rank),
                seat=Seat(rank),
                generation=Generation(1),
                step=Step(step),
                at=clock[step],
                seconds=seconds,
                waited_s=sum(sum(spent) for op, spent in ops.items() if op not in known),
                gc_s=gc,
                slots=batches,
                role=f"pp={stage}",
                place=f"dp={dp} pp={stage}",
            )
        )
    return found


def _alibaba(path: Path) -> list[StepSeen]:
    """Mini-batch times by worker and moment; workers with the same share of a GPU are peers."""
    found: list[StepSeen] = []
    for row in _rows(path, ("worker", "time", "batch_time_norm")):
        value = float(row["batch_time_norm"] or "nan")
        if not _is_duration(value):
            continue
        worker, moment = int(float(row["worker"])), float(row["time"])
        found.append(
            StepSeen(
                member=MemberId(worker),
                seat=Seat(worker),
                generation=Generation(1),
                step=Step(int(moment)),
                at=moment,
                seconds={"forward": value},
                slots=1,
                role=f"gpu={row['gpu']}" if row.get("gpu") else "",
                place=f"worker={worker}",
            )
        )
    return found


def _jsonl(path: Path) -> list[StepSeen]:
    """Signals as ranks send them; those of other kinds are passed over."""
    found: list[StepSeen] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if isinstance(value, Mapping) and value.get("kind") != StepSeen.KIND:
                    continue
                signal = from_json(value)
            except (ValueError, ProtocolError) as error:
                raise ValueError(f"line {number}: {error}") from error
            assert isinstance(signal, StepSeen), "of this kind"
            found.append(signal)
    return found


def _rows(path: Path, needed: tuple[str, ...]) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [c for c in needed if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"columns {', '.join(missing)} are missing")
        yield from reader


def _is_duration(value: float) -> bool:
    return log_or_none(value) is not None


FORMATS: Final[Mapping[str, Callable[[Path], list[StepSeen]]]] = {
    "bytedance": _bytedance,
    "alibaba": _alibaba,
    "jsonl": _jsonl,
}
