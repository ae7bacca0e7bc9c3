"""All tools in turns, undisturbed and struck: what `ftkit bench peers` does."""

import hashlib
import json
import random
import shutil
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.beside import page
from benchmarks.beside.environments import interpreter
from benchmarks.beside.rows import Calm, Distance, Row, Struck, problems, remarks
from benchmarks.beside.run import Played, play
from benchmarks.beside.steplog import batches, intervals, recovery, strike_of
from benchmarks.beside.task import SIGNALS, Task
from benchmarks.beside.tools import DDP, FTKIT, PEERS, Tool
from benchmarks.figures import RESULTS, Figure, Report, machine, save, say, versions
from benchmarks.jobs import scratch
from benchmarks.peers import NoPeer, peers_folder
from ftkit.launch.whole_file import write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What was asked for."""

    only: Sequence[str]
    """Peers, by `Tool.peer`; all when empty."""
    runs: int
    fault: str
    nproc: int
    steps: int
    rows: int
    save_every: int
    stall_s: float
    limit_s: float
    seed: int


@dataclass(slots=True)
class Found:
    """What was seen of one tool so far."""

    tool: Tool
    python: Path | None = None
    trouble: list[str] = field(default_factory=list)
    calm: list[Calm] = field(default_factory=list)
    struck: list[Struck] = field(default_factory=list)
    reference: Tensor | None = None
    """The parameters of its first undisturbed run."""

    def row(self) -> Row:
        return Row(
            name=self.tool.name,
            how=self.tool.how,
            calm=self.calm,
            struck=self.struck,
            trouble="; ".join(dict.fromkeys(self.trouble)),
        )


def run(settings: Settings, *, out: Path, keep: bool, as_json: bool) -> int:
    """Measure, print the table, write the page. Returns the exit code: 1 with problems.

    Args:
      settings: what to measure.
      out: the page to write.
      keep: whether the result is kept in benchmarks/results too.
      as_json: whether one JSON object is printed, and not the table.
    """
    with scratch("peers") as folder:
        found = measure(settings, folder, say)
    rows = {one.tool.name: one.row() for one in found}
    made = report(rows, settings)
    document = made.to_json()
    facts = f"{machine()}; " + ", ".join(f"{name} {v}" for name, v in versions().items())
    write_whole(
        out,
        page.render(
            rows,
            fault=SIGNALS[settings.fault].name,
            ranks=settings.nproc,
            facts=facts,
        ),
    )
    if as_json:
        print(json.dumps(document | {"page": str(out)}), flush=True)
    else:
        troubles = [f"PROBLEM: {words}" for words in made.problems]
        lines = [page.markdown(rows), "", page.LEGEND, *made.notes, *troubles, f"wrote {out}"]
        print("\n".join(lines), flush=True)
    if keep and not made.problems:
        save(document, RESULTS)
    return 1 if made.problems else 0


def measure(settings: Settings, folder: Path, tell: Callable[[str], None]) -> list[Found]:
    """Set up the environments and play all runs, tool after tool in turns. Blocks."""
    peers = [tool for tool in PEERS if not settings.only or tool.peer in settings.only]
    found = [Found(tool) for tool in (DDP, FTKIT, *peers)]
    for one in found:
        try:
            one.python = (
                interpreter(one.tool.environment, peers_folder(), tell)
                if one.tool.environment
                else Path(sys.executable)
            )
        except NoPeer as error:
            one.trouble.append(str(error))
            tell(f"{one.tool.name}: {error}")
    rng = random.Random(settings.seed)
    total = settings.runs * sum(2 if one.tool.disturbed else 1 for one in found if one.python)
    number = 0
    for turn in range(settings.runs):
        # Every rank has its turn, the last first: rank 0 is more than a rank to some tools.
        victim = (settings.nproc - 1 - turn) % settings.nproc
        strike = settings.steps // 2 + 1 + rng.randrange(settings.save_every)
        strike = min(strike, settings.steps - 1)
        # Forth and back, so that a drift of the machine favours nobody. Plain DDP comes first:
        # the others' parameters are compared with its.
        order = [found[0], *(found[1:] if turn % 2 == 0 else found[:0:-1])]
        for one in order:
            for disturbed in (False, True) if one.tool.disturbed else (False,):
                if one.python is None:
                    continue
                number += 1
                task = Task(
                    folder=str(folder / f"run-{number}"),
                    steps=settings.steps,
                    slots=settings.nproc,
                    rows=settings.rows,
                    save_every=settings.save_every if one.tool.saves else 0,
                    stall_s=settings.stall_s,
                    fault=settings.fault if disturbed else "",
                    victim=victim,
                    strike=strike,
                )
                tell(f"[{number}/{total}] {one.tool.name}: {_try(one, task, found[0], settings)}")
    return found


def _try(one: Found, task: Task, plain: Found, settings: Settings) -> str:
    """One run, noted; what it came to, in a line. Its files are gone afterwards."""
    assert one.python is not None, "measure() has looked"
    folder = Path(task.folder)
    folder.mkdir()
    try:
        played = play(one.tool, task, one.python, limit_s=settings.limit_s)
    except OSError as error:
        one.trouble.append(f"could not be run: {error}")
        return one.trouble[-1]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return note(one, task, played, plain.reference, settings.limit_s)


def note(one: Found, task: Task, played: Played, plain: Tensor | None, limit_s: float) -> str:
    """Add a run to what was found of its tool; what it came to, in a line."""
    ended = (
        f"no step was finished for {limit_s:g} s" if played.standstill else "all its ranks ended"
    )
    why = f"{ended}; {played.said}" if played.said else ended
    if not task.fault:
        if len(played.finals) < task.slots:
            one.trouble.append(
                f"undisturbed, {len(played.finals)} of {task.slots} ranks came to the end: {why}"
            )
            return one.trouble[-1]
        if not intervals(played.logs):
            one.trouble.append("undisturbed, it started anew so often that no step could be timed")
            return one.trouble[-1]
        one.calm.append(calm(played, plain))
        if one.reference is None:
            one.reference = played.finals[0]
        return f"undisturbed, {one.calm[-1].step_s * 1e3:.1f} ms a step"
    strike = strike_of(played.logs)
    if strike is None:
        one.trouble.append(f"never came to step {task.strike}, where it was to be struck: {why}")
        return one.trouble[-1]
    one.struck.append(struck(played, task, one.reference, why))
    again = one.struck[-1].recovery.again_s
    where = f"{task.fault} rank {task.victim} in step {strike['step']}"
    return f"{where}, " + (
        f"never: {why}" if again is None else f"a step again after {again:.2f} s"
    )


def calm(played: Played, plain: Tensor | None) -> Calm:
    """What an undisturbed run that ended well says; `plain` is plain DDP's result."""
    between = intervals(played.logs)
    last = [
        e["peak_mib"] for events in played.logs.values() for e in events if e["kind"] == "final"
    ]
    return Calm(
        step_s=statistics.median(between),
        mean_step_s=statistics.fmean(between),
        rank_mib=max(last),
        job_mib=played.job_mib,
        digest=digest(played.finals[0]),
        from_plain=None if plain is None else distance(played.finals[0], plain),
    )


def struck(played: Played, task: Task, reference: Tensor | None, why: str) -> Struck:
    """What a run with a fault says; `reference` is the tool's undisturbed result."""
    strike = strike_of(played.logs)
    assert strike is not None, "note() has looked"
    digests = {digest(final) for final in played.finals}
    far = [distance(final, reference) for final in played.finals] if reference is not None else []
    return Struck(
        victim=task.victim,
        step=int(strike["step"]),
        recovery=recovery(played.logs),
        batches=batches(played.logs, slots=task.slots),
        finished=len(played.finals),
        ranks_agree=len(digests) == 1 if len(played.finals) > 1 else None,
        from_calm=max(far, key=lambda d: d.relative, default=None),
        digest=" ".join(sorted(digests)),
        why=why,
    )


def distance(ours: Tensor, theirs: Tensor) -> Distance:
    """How far two flat float32 vectors of the same length are from each other."""
    off = ours.double() - theirs.double()
    return Distance(
        same_bits=torch.equal(ours.view(torch.int32), theirs.view(torch.int32)),
        largest=off.abs().max().item(),
        relative=(off.norm() / theirs.double().norm()).item(),
    )


def digest(vector: Tensor) -> str:
    """SHA-256 (hex) of a contiguous tensor's bytes."""
    return hashlib.sha256(vector.view(torch.uint8).numpy().data).hexdigest()


def notes_of(rows: Mapping[str, Row], settings: Settings) -> list[str]:
    """Every row's remarks, each with the row's name."""
    return [
        f"{row.name}: {words}"
        for row in rows.values()
        for words in remarks(row, ranks=settings.nproc)
    ]


def report(rows: Mapping[str, Row], settings: Settings) -> Report:
    """The figures as every benchmark has them; pure but for the versions."""
    ours, plain = rows[FTKIT.name], rows[DDP.name]
    figures = [Figure(name="plain DDP: median step", value=plain.step_s, unit="s")]
    for row in rows.values():
        if row is plain:
            continue
        shown = f"{len(row.recovered)} of {len(row.struck)} recovered"
        figures.append(
            Figure(
                name=f"{row.name}: {settings.fault} to the next finished step, p50",
                value=row.again_s,
                unit="s",
                against=row.trouble or shown,
            )
        )
        figures.append(
            Figure(
                name=f"{row.name}: median step / plain DDP",
                value=_over(row.step_s, plain.step_s),
                unit="x",
            )
        )
        if row is not ours:
            figures.append(
                Figure(
                    name=f"ftkit / {row.name}: to the next finished step",
                    value=_over(ours.again_s, row.again_s),
                    unit="x",
                )
            )
    return Report(
        name="peers",
        figures=figures,
        computed={
            f"parameters, {name}": " ".join(sorted({c.digest for c in row.calm}))
            for name, row in rows.items()
        },
        problems=problems(rows),
        notes=notes_of(rows, settings),
        options=asdict(settings),
        samples={name: asdict(row) for name, row in rows.items()},
    )


def _over(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs
