"""Verify: do all ranks hold the same protected state, and if not, whose tensor is wrong?

The vote of every step compares gradients, so a bit that flips in a parameter or in an
optimizer's moment afterwards is not seen by it. This looks at the state itself. Only what every
rank holds whole takes part: the shards of a sharded model differ by design.
"""

from dataclasses import dataclass

from ftkit.collectives.shared_state import SharedState, StateReport
from ftkit.core.errors import GenerationAborted, IntegrityError, StateRefused
from ftkit.core.ids import Seat
from ftkit.core.verdict import Fault
from ftkit.session.findings import Findings
from ftkit.session.parts import Parts
from ftkit.session.snapshots import Snapshots


@dataclass(frozen=True, slots=True)
class Damage:
    """One tensor of one rank that is not what the others hold."""

    rank: int
    seat: Seat
    tensor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The same on every rank."""

    step: int
    damaged: tuple[Damage, ...] = ()
    """In order of ranks; what it was before a repair."""
    undecided: tuple[str, ...] = ()
    """Tensors of which no version has a majority: nobody can say whose are wrong."""
    repaired: bool = False
    """Whether all that was damaged is whole again."""
    refusal: str = ""
    """Why nothing could be repaired, whether or not that was asked for."""
    unknown: str = ""
    """Why nothing can be said: the world ended meanwhile. Ask again after the next step."""

    @property
    def equal(self) -> bool:
        """Whether all ranks are known to have held the same."""
        return not (self.damaged or self.undecided or self.refusal or self.unknown)


def verify(
    parts: Parts,
    snapshots: Snapshots,
    *,
    step: int,
    repair: bool,
    steady: bool = False,
    must: bool = True,
) -> Verification:
    """Compare, and with `repair` fetch what is damaged from those who have it. Blocks.

    Args:
      parts: of this rank.
      snapshots: knows the protected tensors.
      step: the step whose state they hold.
      repair: whether to.
      steady: leave out what may change outside the optimizer's step.
      must: whether a repair that was asked for and cannot be done is an error.

    Raises:
      IntegrityError: this rank's repair was cut short or failed. Its state is a mixture, so it
        must end; what replaces it restores from the others.
      StateRefused: a repair was asked for and there is no majority to repair from. Nothing was
        changed.
    """
    snapshots.gate()  # a capture may still read what a repair would write
    shared = SharedState(parts.group, snapshots.replicated(steady=steady))
    world = parts.group.world
    try:
        report = shared.compare(revision=step)
    except GenerationAborted as error:
        return Verification(step=step, unknown=str(error))
    seats = [member.seat for member in world.members]
    damaged = tuple(Damage(d.rank, seats[d.rank], d.tensor) for d in report.differences)
    for one in damaged:
        parts.trace.event(
            "diverged", step=step, generation=world.generation, damaged=one.seat, tensor=one.tensor
        )
    _tell(parts, report, step)
    repaired = False
    if repair and not report.equal:
        if not report.refusal:
            repaired = _repaired(shared, report, step, parts)
        elif must:
            raise StateRefused(report.refusal)
    return Verification(
        step=step,
        damaged=damaged,
        undecided=report.undecided,
        repaired=repaired,
        refusal=report.refusal,
    )


def _tell(parts: Parts, report: StateReport, step: int) -> None:
    """Tell the coordinator whose tensors are wrong."""
    by_rank: dict[int, list[str]] = {}
    for one in report.differences:
        by_rank.setdefault(one.rank, []).append(one.tensor)
    findings = Findings(parts)
    if not findings.tells(by_rank):
        return
    for rank, tensors in by_rank.items():
        more = f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else ""
        findings.tell(
            Fault.SDC,
            rank,
            step,
            f"rank {rank} holds other bits of {tensors[0]}{more} than the other "
            f"{parts.group.size - len(by_rank)} ranks after step {step}",
            evidence={"kind": "replica", "tensors": tensors[:16], "count": len(tensors)},
        )


def _repaired(shared: SharedState, report: StateReport, step: int, parts: Parts) -> bool:
    mine = {d.tensor for d in report.differences if d.rank == parts.group.rank}
    try:
        done = shared.sync(step)
    except GenerationAborted as error:
        # The others hold what they held, and go on. They cannot be asked again for what is
        # still missing here: some of them may know that all was well, and be a step further.
        if mine:
            raise IntegrityError(
                f"the repair of {', '.join(sorted(mine))} was cut short ({error}); this rank "
                "ends, and its replacement restores the state from the others"
            ) from error
        return False
    parts.trace.event("repaired", step=step, bytes=done.received_bytes)
    return True
