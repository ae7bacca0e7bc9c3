"""Numbers: gradients that are not finite or far off, and what the second look at them says.

What each rank adds to the sum is on its ballot as a norm. Where one looks wrong the vote does not
pass, and the step is played again, once, with the same samples. What is wrong again is in the data
or the model (NUMERIC, with the slots and samples); what is not was corruption of that rank's
arithmetic or memory (SDC), and is gone with the attempt.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.nn.parallel import DistributedDataParallel

from ftkit.collectives.gradients import GradientReducer, norm_of
from ftkit.collectives.sharded import ShardedReducer
from ftkit.collectives.staged import StageReducer
from ftkit.core.errors import NotFinite
from ftkit.core.ids import Generation, MemberId, Slot
from ftkit.core.ids import Step as StepNumber
from ftkit.core.verdict import Fault
from ftkit.detection.spikes import Spikes
from ftkit.recovery.vote import Tally
from ftkit.session.corrupt import Corrupter
from ftkit.session.feed import Feed
from ftkit.session.findings import Findings
from ftkit.session.parts import Parts

#: Samples and parameters named at most, in what is said of them.
NAMED = 16


class OnNaN(StrEnum):
    """What follows when gradients are not finite, twice from the same samples."""

    REPORT = "report"
    """They are applied like any others: loss scaling, for one, looks at them itself."""
    SKIP = "skip"
    """The step counts, and its gradients are dropped before the optimizer sees them."""
    RAISE = "raise"
    """`NotFinite` is raised on every rank, and ends the job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Doubt:
    """Why a step is played again."""

    step: StepNumber
    generation: Generation
    norms: dict[MemberId, float]
    """Of all ranks in the first attempt."""
    suspects: tuple[MemberId, ...]


@dataclass(frozen=True, slots=True)
class _Bad:
    """Gradients of one slot in one bucket that are not finite."""

    slot: Slot
    bucket: int
    parameters: tuple[str, ...]


class Numbers:
    """Of one step loop; the training thread's."""

    def __init__(
        self,
        parts: Parts,
        feed: Feed,
        corrupter: Corrupter,
        *,
        on_nan: OnNaN,
        loss_scaling: bool = False,
    ) -> None:
        """Look at nothing yet: `follow` says at what.

        Args:
          parts: of this rank.
          feed: says which samples a slot holds.
          corrupter: falsifies some of them, in a drill.
          on_nan: what follows; the same on all ranks.
          loss_scaling: whether gradients that are not finite are an everyday matter.
        """
        self._parts = parts
        self._findings = Findings(parts)
        self._reducer: GradientReducer | ShardedReducer | StageReducer
        self._feed = feed
        self._corrupter = corrupter
        self._names: dict[int, str] = {}
        self._not_finite = False
        """Whether some rank's gradients are not, in the attempt that was counted last."""
        self._on_nan, self._loss_scaling = on_nan, loss_scaling
        self._doubt: _Doubt | None = None
        self._step = StepNumber(0)
        self._bad: list[_Bad] = []
        self._spikes = Spikes()
        self._settled = False
        """Whether the last step was doubtful on a second look: the next gets none, or a model
        that has become NaN would play every step twice."""
        self.again = False
        """Whether this attempt is one because of somebody's numbers."""
        self.norm = 0.0
        """Of what this rank adds in this attempt, a slot."""
        self.bad_bucket = -1
        """The first bucket in which it is not finite; -1 for none."""

    def follow(
        self, reducer: GradientReducer | ShardedReducer | StageReducer, names: dict[int, str]
    ) -> None:
        """Look at what this reducer takes from here on; `names` are its parameters', by `id`."""
        self._reducer, self._names = reducer, names

    @property
    def final(self) -> bool:
        """Whether this rank asks for no second look at this attempt."""
        return self.again or self._settled or self._overflown

    @property
    def _overflown(self) -> bool:
        """Whether what this rank adds was scaled too far, as far as can be told."""
        return self._loss_scaling and self.bad_bucket >= 0

    def begin(self, step: StepNumber, generation: Generation) -> None:
        """An attempt begins."""
        doubt = self._doubt
        self.again = doubt is not None and (doubt.step, doubt.generation) == (step, generation)
        if not self.again:
            # In another world this rank holds other slots: nothing could be compared.
            self._doubt = None
        self._step, self._bad = step, []
        self.norm, self.bad_bucket = 0.0, -1
        self._corrupter.begin(step)
        self._reducer.look_at = self._look if self.again or self._corrupter.armed else None

    def weigh(self, held: int) -> None:
        """All of this rank's gradients are under way: take their norm. `held`: its slots."""
        norms = self._reducer.norms
        self.bad_bucket = next((i for i, n in enumerate(norms) if not math.isfinite(n)), -1)
        self.norm = math.hypot(*norms) / max(held, 1)

    def doubted(self, result: Tally, step: StepNumber, generation: Generation) -> None:
        """The vote was refused for somebody's numbers: the next attempt looks closely."""
        members = [m.member for m in self._parts.group.world.members]
        self._doubt = _Doubt(
            step=step,
            generation=generation,
            norms=dict(zip(members, result.norms, strict=True)),
            suspects=tuple(members[rank] for rank in result.doubtful),
        )

    def differ(self, result: Tally) -> None:
        """The vote was refused because ranks hold different sums: say whose is wrong."""
        everybody = len(result.odd) == len(result.norms)
        if not self._findings.tells(() if everybody else result.odd):
            return
        for rank in result.odd[:1] if everybody else result.odd:
            self._findings.tell(
                Fault.SDC,
                rank,
                self._step,
                f"{result.reason}; the step is played again",
                evidence={"kind": "reduced-gradient", "ranks": list(result.odd)},
                confidence=1 / len(result.odd) if everybody else 1.0,
                peer=result.odd[1] if everybody else None,
            )

    def counted(self, result: Tally) -> None:
        """A vote that passes was counted: say what the second look found, if it was one.

        Raises:
          NotFinite: gradients are not finite, and that is what `OnNaN.RAISE` is for.
        """
        doubt, self._doubt = self._doubt, None
        self._settled = bool(result.doubtful)
        if doubt is not None and self.again:
            members = [m.member for m in self._parts.group.world.members]
            accused = [rank for rank, member in enumerate(members) if member in doubt.suspects]
            for rank in accused:
                if rank not in result.doubtful and self._findings.tells(accused):
                    self._tell_corruption(rank, doubt.norms[members[rank]], result)
        if self._parts.group.rank in result.doubtful and not self._overflown:
            self._tell_numeric(result)
        bad = [rank for rank in result.doubtful if not math.isfinite(result.norms[rank])]
        self._not_finite = bool(bad)
        if bad and self._on_nan is OnNaN.RAISE:
            raise NotFinite(
                f"the gradients of rank {bad[0]} are not finite in bucket "
                f"{result.bad_buckets[bad[0]]} at step {self._step}, and were so again when the "
                "step was played a second time: the events say from which samples. Mend the data or the "
                "model, or go on without such steps with on_nan='skip'"
            )

    def drop(self) -> bool:
        """Whether this step's gradients are not finite and to be dropped; then they are.

        Judged by the sum, which is the same on every rank, also on one that saw no result of
        the vote.
        """
        if self._on_nan is not OnNaN.SKIP:
            return False
        if isinstance(self._reducer, (ShardedReducer, StageReducer)):
            # Each rank sees its own shards only; but whoever commits them saw the ballots.
            if self._not_finite:
                self._reducer.drop()
            return self._not_finite
        return self._reducer.drop_if_not_finite()

    def committed(self, result: Tally | None, step: StepNumber) -> None:
        """A step was committed; `result` is None when it was rolled forward."""
        if result is None or result.loss is None or not result.norms:
            return
        norm = math.sqrt(sum(n * n for n in result.norms) / len(result.norms))
        spike = self._spikes.update(step, result.loss, norm)
        if spike is None or not self._findings.tells(()):
            return
        rank = max(range(len(result.norms)), key=result.norms.__getitem__)
        self._findings.tell(
            Fault.NUMERIC,
            rank,
            step,
            f"the loss leapt to {spike.loss:.4g} at step {step}, from {spike.usual_loss:.4g} "
            f"({spike.loss_z:.0f} deviations), and the gradients with it ({spike.norm_z:.0f}); "
            f"rank {rank}'s are the largest",
            evidence={
                "kind": "loss-spike",
                "loss": spike.loss,
                "usual_loss": spike.usual_loss,
                "loss_z": round(spike.loss_z, 2),
                "norm_z": round(spike.norm_z, 2),
                "norms": list(result.norms),
            },
            confidence=0.7,
        )

    def _look(self, slot: int, bucket: int, values: torch.Tensor) -> None:
        """(reducer) The gradients of a slot in a bucket, on the thread of backward."""
        last = bucket + 1 == self._reducer.buckets
        self._corrupter.gradients(self._step, slot, bucket, values, last=last)
        if self.again and not math.isfinite(norm_of(values).item()):
            named = [
                self._names.get(id(parameter), "?")
                for parameter, part in self._reducer.parts_of(bucket, values)
                if not math.isfinite(norm_of(part).item())
            ]
            self._bad.append(_Bad(Slot(slot), bucket, tuple(named[:NAMED])))

    def _tell_corruption(self, rank: int, before: float, result: Tally) -> None:
        self._findings.tell(
            Fault.SDC,
            rank,
            self._step,
            f"rank {rank} added gradients of norm {before:.4g} at step {self._step}, and "
            f"{result.norms[rank]:.4g} from the same samples when the step was played again: "
            "its arithmetic or memory erred once",
            evidence={
                "kind": "gradient",
                "norm": before if math.isfinite(before) else str(before),
                "norm_again": result.norms[rank],
            },
            confidence=0.9,
        )

    def _tell_numeric(self, result: Tally) -> None:
        """This rank's own: it alone knows the samples."""
        rank, norm = self._parts.group.rank, self.norm
        slots = sorted({bad.slot for bad in self._bad})
        samples = {slot: self._feed.samples(self._step, slot)[:NAMED] for slot in slots}
        parameters = list(dict.fromkeys(name for bad in self._bad for name in bad.parameters))
        what = "are not finite" if not math.isfinite(norm) else f"have norm {norm:.4g}"
        of = f" of slots {slots} (samples {_first(samples.values())})" if slots else ""
        where = f" in bucket {self.bad_bucket}" if self.bad_bucket >= 0 else ""
        self._findings.tell(
            Fault.NUMERIC,
            rank,
            self._step,
            f"the gradients{of} of rank {rank} {what}{where} at step {self._step}, "
            + ("twice from the same samples" if self.again else "as at the step before"),
            evidence={
                "kind": "gradient",
                "bucket": self.bad_bucket,
                "slots": slots,
                "samples": {str(slot): list(ids) for slot, ids in samples.items()},
                "parameters": parameters[:NAMED],
                "norm": norm if math.isfinite(norm) else str(norm),
                "on_nan": self._on_nan.value,
            },
        )


def _first(lists: Iterable[list[int]]) -> str:
    every = [number for one in lists for number in one]
    return ", ".join(map(str, every[:8])) + (", ..." if len(every) > 8 else "")


def names_of(modules: Iterable[torch.nn.Module]) -> dict[int, str]:
    """The parameters' names, by `id`."""
    plain = [m.module if isinstance(m, DistributedDataParallel) else m for m in modules]
    return {id(p): name for module in plain for name, p in module.named_parameters()}
