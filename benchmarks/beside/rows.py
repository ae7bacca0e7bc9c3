"""Rows: what many runs of a tool come to, beside plain DDP and beside its own undisturbed run; pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.beside.steplog import Batches, Recovery, median

#: Without these two there is nothing to compare.
BASE = ("plain DDP", "ftkit")

ROUNDING = "the same batches in each step on as many ranks, so sums in another order"

#: Two runs whose parameters are nearer to each other than this, by norm, did the same training;
#: sums in another order make about a hundredth of it.
SAME_TRAINING = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far two vectors of parameters are from each other."""

    same_bits: bool
    largest: float
    """The largest absolute difference."""
    relative: float
    """The norm of the difference over the norm of the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calm:
    """An undisturbed run."""

    step_s: float
    """Median."""
    mean_step_s: float
    """With the saves between steps."""
    rank_mib: float
    """Peak of its largest rank."""
    job_mib: float | None
    """Peak of all processes, shared pages counted once."""
    digest: str
    from_plain: Distance | None
    """Its parameters against plain DDP's; None for plain DDP itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A run with a fault."""

    victim: int
    step: int
    """In the middle of which it was struck."""
    recovery: Recovery
    batches: Batches
    finished: int
    """Ranks that came to the end."""
    ranks_agree: bool | None
    """Whether these ended in the same bits; None where fewer than two finished."""
    from_calm: Distance | None
    """Their parameters against the tool's undisturbed run; None where none finished."""
    digest: str
    why: str
    """Why it did not recover or finish, as far as can be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tool."""

    name: str
    how: str
    calm: Sequence[Calm] = ()
    struck: Sequence[Struck] = ()
    trouble: str = ""
    """Why runs are missing; empty if none is."""

    @property
    def recovered(self) -> list[Struck]:
        """The runs in which training went on."""
        return [s for s in self.struck if s.recovery.again_s is not None]

    @property
    def again_s(self) -> float | None:
        """Median time until a step was finished again, of those that recovered."""
        return median(s.recovery.again_s for s in self.struck)

    @property
    def ahead_s(self) -> float | None:
        """Median time until the struck step was finished, of those that came to it."""
        return median(s.recovery.ahead_s for s in self.struck)

    @property
    def step_s(self) -> float | None:
        return median(c.step_s for c in self.calm)

    @property
    def mean_step_s(self) -> float | None:
        return median(c.mean_step_s for c in self.calm)


HEADER = (
    "tool",
    "recovered",
    "a step again",
    "new steps",
    "steps repeated",
    "batches lost",
    "final parameters",
    "step",
    "with saves",
    "a rank",
    "all processes",
)


def cells(row: Row, plain: Row) -> tuple[str, ...]:
    """A row of the table, under HEADER."""
    some = row.recovered
    return (
        row.name,
        f"{len(some)} of {len(row.struck)}" if row.struck else "-",
        _seconds(row.again_s),
        _seconds(row.ahead_s),
        _spread([s.recovery.repeated for s in some]),
        _spread([s.batches.lost for s in some]),
        parameters(row),
        _ratio(row.step_s, plain.step_s),
        _ratio(row.mean_step_s, plain.mean_step_s),
        _mib(median(c.rank_mib for c in row.calm)),
        _mib(median(c.job_mib for c in row.calm)),
    )


def parameters(row: Row) -> str:
    """How the final parameters after a fault compare with those without; the worst run counts."""
    ended = [s for s in row.struck if s.from_calm is not None]
    if not ended:
        return "-"
    if any(s.ranks_agree is False for s in ended):
        return "ranks differ"
    worst = max((s.from_calm for s in ended if s.from_calm), key=lambda d: d.relative)
    if all(s.from_calm is not None and s.from_calm.same_bits for s in ended):
        return "same bits"
    return f"off by {worst.relative:.0e}"


def remarks(row: Row, *, ranks: int) -> list[str]:
    """What a reader of the row must know: settings, what went wrong, what differs and why."""
    said = [row.how] if row.how else []
    said += [row.trouble] if row.trouble else []
    said += unlike(row)
    for s in row.struck:
        where = f"rank {s.victim} in step {s.step}"
        if s.recovery.again_s is None:
            said.append(f"{where}: nobody trained on: {s.why}")
            continue
        if s.finished == 0 or s.recovery.ahead_s is None:
            said.append(f"{where}: trained on, and did not come to the end: {s.why}")
        if s.recovery.survivors_lost:
            said.append(f"{where}: {s.recovery.survivors_lost} more ranks were lost: {s.why}")
        if s.ranks_agree is False:
            said.append(f"{where}: the ranks that finished differ among themselves")
        if s.batches.doubled:
            said.append(f"{where}: {s.batches.doubled} batches count twice")
        if s.from_calm is not None and not s.from_calm.same_bits:
            said.append(f"{where}: {_difference(s, s.from_calm, ranks)}")
    return list(dict.fromkeys(said))


def _difference(s: Struck, far: Distance, ranks: int) -> str:
    causes = [f"{s.batches.lost} batches are in no step"] if s.batches.lost else []
    if s.finished < ranks:
        causes.append(f"{s.finished} of {ranks} ranks at the end, so sums in another order")
    return (
        f"parameters differ from the undisturbed run's by up to {far.largest:.1e} "
        f"({far.relative:.0e} of their norm): {'; '.join(causes) or ROUNDING}"
    )


def unlike(row: Row) -> list[str]:
    """In what way a tool's undisturbed runs are not the training that they should be."""
    found = [
        f"an undisturbed run is not plain DDP's training: parameters differ by "
        f"{c.from_plain.relative:.1e} of their norm"
        for c in row.calm
        if c.from_plain is not None and c.from_plain.relative > SAME_TRAINING
    ]
    if len({c.digest for c in row.calm}) > 1:
        found.append("undisturbed runs ended in different bits")
    return found


def problems(rows: Mapping[str, Row]) -> list[str]:
    """What makes the table worthless: no plain DDP to compare with, or ftkit not as it promises."""
    found = [f"{name}: {rows[name].trouble}" for name in BASE if rows[name].trouble]
    found += [f"{name}: {words}" for name in BASE for words in unlike(rows[name])]
    for s in rows["ftkit"].struck:
        where = f"ftkit, rank {s.victim} in step {s.step}"
        if s.recovery.again_s is None or s.from_calm is None:
            found.append(f"{where}: did not recover: {s.why}")
        elif not (s.from_calm.same_bits and s.ranks_agree is not False):
            found.append(f"{where}: ended in other bits than the undisturbed run")
    return found


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _spread(values: Sequence[int]) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low}..{high}"


def _ratio(ours: float | None, plain: float | None) -> str:
    return "-" if ours is None or plain is None else f"{ours / plain:.2f}x"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} MiB"
