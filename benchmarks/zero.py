"""A job whose optimizer state is cut over four ranks loses one: what is read before it goes on.

Every block of state is held by two ranks (`ftkit.ZeroOptimizer`), so those left own what is lost. The
same model cut contiguously (FSDP2) loses the same rank beside it. ::

    moved        bytes of state that survivors read from other ranks' arenas, from the loss until the
                 optimizer's next step; counted where they are read
    repair_s     from SIGKILL until the last of the three survivors had committed its next step
    stand-ins    bytes read beside training until every block was held twice again, and until when

Every job must end with the parameters of the undisturbed one.

    python -m benchmarks.zero [--quick] [--json] [--save]
"""

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.elastic import COPIES, LOSS_SIZES, RANKS, STEPS, Loss, fault, read_loss
from benchmarks.figures import Figure, Report, as_samples, finish, parser, say
from benchmarks.jobs import Event, Job, JobFailed, params_of, scratch
from ftkit.launch.workload.gpt import GPT
from ftkit.launch.workload.train import parse
from ftkit.recovery.virtual_blocks import contiguous_shrink

#: A moment of AdamW's, of which there are two, is as large as the parameters.
MOMENTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """One rank lost from a job whose state is held twice."""

    moved: int
    promoted: int
    """Bytes of state that got another owner, where they lay."""
    again: int
    """Bytes of parameters handed round once more, where the loss had cut that short."""
    repair_s: float
    standins_bytes: int
    standins_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    options = _options(argv)
    rng = random.Random(options.seed)
    model = tuple(options.model.split())
    more = (*LOSS_SIZES, "--clip", "1.0")
    problems = list[str]()
    with scratch("zero") as folder:
        blocks = Job(nproc=RANKS, steps=STEPS, model=(*model, *more, "--zero"))
        cut = Job(nproc=RANKS, steps=STEPS, model=(*model, *more, "--sharded"))
        params = params_of(blocks.run(folder / "reference"))
        shards = params_of(cut.run(folder / "reference-cut"))
        promotions, losses = list[Promotion](), list[Loss]()
        for run in range(options.runs):
            struck = fault(rng)
            events = blocks.run(folder / f"zero-{run}", faults=[struck])
            promotions.append(read_promotion(events))
            others = cut.run(folder / f"cut-{run}", faults=[struck])
            losses.append(read_loss(others))
            say(f"loss {run}: {promotions[-1]}; contiguous {losses[-1].shrink_bytes} bytes")
            if params_of(events) != params or params_of(others) != shards:
                problems.append(f"run {run} ended with other parameters than the undisturbed one")
    count = sum(p.numel() for p in GPT(parse(model).model, seed=0).parameters())
    made = report(promotions, losses, 4 * count, sorted(params), problems, vars(options))
    return finish(made, options)


def report(
    promotions: Sequence[Promotion],
    losses: Sequence[Loss],
    parameters: int,
    params: Sequence[str],
    problems: Sequence[str],
    options: dict[str, object],
) -> Report:
    """The figures; pure. `parameters`: bytes of all of them."""
    state = MOMENTS * parameters
    moved = statistics.median(x.shrink_bytes for x in losses)
    figures = [
        Figure(
            name="state read before the next step",
            value=max(x.moved for x in promotions),
            unit="bytes",
            at_most=0,
            against=f"contiguous: {moved:.4g}, {moved / (COPIES * parameters):.0%} of the state; "
            f"{contiguous_shrink(RANKS, RANKS - 1):.0%} computed",
        ),
        Figure(
            name="state that got another owner / state",
            value=statistics.median(x.promoted for x in promotions) / state,
            unit="",
        ),
        Figure(
            name="repair_s p50",
            value=statistics.median(x.repair_s for x in promotions),
            unit="s",
            against=f"contiguous: {statistics.median(x.repair_s for x in losses):.3g} s",
        ),
        Figure(
            name="stand-ins made anew / state",
            value=statistics.median(x.standins_bytes for x in promotions) / state,
            unit="",
            against="beside training",
        ),
        Figure(
            name="until every block has one p50",
            value=statistics.median(x.standins_s for x in promotions),
            unit="s",
        ),
    ]
    return Report(
        name="zero",
        figures=figures,
        computed={"parameters": " ".join(params)},
        problems=list(problems),
        notes=[
            "contiguous shards are of parameters too, so their bytes are a share of three copies",
            "steps are held up by 0.2 s while a seat is empty",
        ],
        options=options,
        samples={"promotions": as_samples(promotions), "contiguous": as_samples(losses)},
    )


def read_promotion(events: Sequence[Event]) -> Promotion:
    """What the events of a job with one loss tell; pure. JobFailed when they do not."""
    struck = next((e for e in events if e["kind"] == "drill"), None)
    if struck is None:
        raise JobFailed("the fault did not strike")
    at, lost = float(struck["mono"]), int(struck["member"])
    taken = [e for e in events if e["kind"] == "promote" and e["mono"] > at]
    if not taken:
        raise JobFailed("nobody took over what was lost")
    smaller = min(int(e["generation"]) for e in taken)
    survivors = {int(e["member"]) for e in taken}
    first = dict[int, float]()
    for e in events:
        if e["kind"] == "commit" and e["generation"] == smaller and e["member"] != lost:
            first.setdefault(int(e["member"]), float(e["mono"]))
    last = dict[int, Event]()
    for e in events:
        if e["kind"] == "replicated" and e["mono"] > at and int(e["member"]) in survivors:
            last.setdefault(int(e["member"]), e)
    whole = list(last.values())
    if not first or not whole:
        raise JobFailed("the survivors did not go on until every block had a stand-in")
    loaded = [
        int(e["bytes"])
        for e in events
        if e["kind"] == "restore" and int(e["member"]) in survivors and e["mono"] > at
    ]
    return Promotion(
        moved=sum(int(e["moved"]) for e in taken) + sum(loaded),
        promoted=sum(int(e["bytes"]) for e in taken),
        again=sum(int(e["again"]) for e in taken),
        repair_s=max(first.values()) - at,
        standins_bytes=sum(int(e["bytes"]) for e in whole),
        standins_s=max(float(e["seconds"]) for e in whole),
    )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--runs", type=int, help="losses of each (7; quick: 2)")
    made.add_argument("--model", default="--params 4m", help="options of the bundled job")
    made.add_argument("--seed", type=int, default=0, help="decides where ranks are killed")
    options = made.parse_args(argv)
    options.runs = options.runs or (2 if options.quick else 7)
    return options


if __name__ == "__main__":
    sys.exit(main())
