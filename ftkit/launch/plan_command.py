"""`ftkit plan`: what would be done about a loss, and what every way would cost."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import click

from ftkit.core.errors import UsageError
from ftkit.core.trace import read_run, told_by
from ftkit.launch.choices import near
from ftkit.launch.report_view import RunView
from ftkit.launch.run_costs import run_costs
from ftkit.recovery.costs import Costs
from ftkit.recovery.failure_rate import FailureRate
from ftkit.recovery.growth import Growth, growth
from ftkit.recovery.intervals import Interval, tier_intervals
from ftkit.recovery.policy import Choice, Loss, choose
from ftkit.recovery.virtual_blocks import Placed, placements

#: With more ranks their blocks, which are as many as their pairs, are not counted out.
PLACED_MAX = 256

#: Costs that `--cost` takes: all but those with an option of their own.
COSTS = sorted(
    f.name for f in fields(Costs) if f.name not in ("world", "step_s", "slots", "measured")
)


def gather(
    run_dir: Path | None,
    *,
    world: int | None,
    step_s: float | None,
    slots: int | None,
    given: Iterable[str],
    mtbf_h: float | None,
) -> tuple[Costs, FailureRate, Mapping[str, str]]:
    """The costs to plan with, those of a run where one is given, and what intervals that has chosen.

    Args:
      run_dir: a run to measure; None for none.
      world: ranks of the job.
      step_s: a step's time at the full world.
      slots: of the global batch.
      given: NAME=VALUE of `COSTS`.
      mtbf_h: hours between failures of one rank.

    Raises:
      UsageError: a cost is unknown, no number, or cannot be.
    """
    costs, rate, view = Costs(world=world or 2), FailureRate(), RunView()
    if run_dir is not None:
        events = list(read_run(run_dir))
        with told_by(run_dir):
            costs, rate = run_costs(events)
            for event in events:
                view.feed(event)
    values: dict[str, object] = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in COSTS:
            raise UsageError(
                f"--cost {text}: there is no cost {name!r}; there are {', '.join(COSTS)}"
                f"{near(name, COSTS)}"
            )
        try:
            values[name] = float(number)
        except ValueError as error:
            raise UsageError(f"--cost {text}: {number!r} is no number") from error
    try:
        costs = replace(costs, world=world or costs.world, slots=slots)
        if step_s is not None:
            values["step_s"] = {**costs.step_s, costs.world: step_s}
        costs = costs.with_measured(**values)
        if mtbf_h is not None:
            rate = FailureRate(prior_mtbf_s=mtbf_h * 3600)
    except (ValueError, OverflowError) as error:
        raise UsageError(str(error)) from error
    return costs, rate, view.chosen


def show(
    loss: Loss, costs: Costs, rate: FailureRate, chosen: Mapping[str, str], *, as_json: bool
) -> None:
    """Print the choice, whether to grow back afterwards, and the intervals."""
    try:
        choice, copies = choose(loss, costs), tier_intervals(costs, rate)
    except OverflowError as error:
        raise UsageError(f"costs so far apart cannot be weighed: {error}") from error
    back = None
    if loss.survivors and loss.lost:
        back = growth(
            loss.survivors,
            loss.lost,
            costs,
            failures_per_s=rate.per_s,
            remaining_s=loss.remaining_s,
        )
    placed = placements(loss.world) if 2 <= loss.world <= PLACED_MAX and loss.lost == 1 else ()
    if as_json:
        click.echo(
            json.dumps(
                {
                    "choice": choice.to_json(),
                    "growth": back.to_json() if back else None,
                    "intervals": [_interval_json(i) for i in copies],
                    "chosen": chosen,
                    "placements": [p.to_json() for p in placed],
                    "mtbf_s": rate.mtbf_s(costs.world),
                    "costs": costs.to_json(),
                }
            )
        )
        return
    said = (f"The job itself chose {what} {often}." for what, often in chosen.items())
    for line in (*_lines(choice, back, copies, costs, rate), *said, *_placed(placed, costs)):
        click.echo(line)


def _lines(
    choice: Choice, back: Growth | None, copies: list[Interval], costs: Costs, rate: FailureRate
) -> Iterable[str]:
    yield f"{choice.reason[0].upper()}{choice.reason[1:]}."
    if choice.to_json()["approximate"]:
        yield "This changes the result of the training."
    yield ""
    for price in choice.table:
        if price.barred:
            yield f"  {price.option:17} {'-':>10}  {price.barred}"
        else:
            terms = ", ".join(f"{k} {v:.3g}" for k, v in price.terms.items() if v)
            yield f"  {price.option:17} {price.lost_s:>8.3g} s  {terms}"
    yield ""
    if back:
        yield f"Growing back: {'yes' if back.grow else 'no'}; {back.reason}."
    yield f"One failure in {rate.mtbf_s(costs.world) / 3600:.3g} h is expected of {costs.world} ranks."
    for each in copies:
        often = f"every {each.steps} steps" if each.steps else "never"
        yield f"A {each.name} {often} ({each.waste:.2%} of the time): {each.reason}."
    assumed = [n for n in COSTS if n not in costs.measured]
    if "step_s" not in costs.measured:
        assumed = ["step_s", *assumed]
    if assumed:
        yield f"Assumed, not measured: {', '.join(assumed)}."


def _placed(placed: Sequence[Placed], costs: Costs) -> Iterable[str]:
    """What moves by how shards are placed, the one that moves less first."""
    if not placed:
        return
    whole = costs.lost_bytes * costs.world

    def much(share: float) -> str:
        return f"{share:.1%} of the state" + (f" ({share * whole:.3g} bytes)" if whole else "")

    yield "If the state is sharded over these ranks, the loss of one moves, at most:"
    for each in placed:
        told = f"{much(each.before)}, {much(each.before_rank)} to one rank"
        told = told if each.before else "nothing"
        later = f"; then {much(each.replicas)}, for new replicas" if each.replicas else ""
        yield f"  {each.name:11} {told} before training goes on{later}"
    yield (
        f"{placed[0].name.capitalize()} move fewer bytes first. FSDP2 places contiguously, and so does ftkit "
        "for it; blocks are for optimizer state that is cut by itself (ftkit.ZeroOptimizer)."
    )


def _interval_json(interval: Interval) -> Mapping[str, object]:
    return {
        "tier": interval.name,
        "steps": interval.steps,
        "seconds": interval.seconds if interval.steps else None,
        "waste": interval.waste,
        "reason": interval.reason,
    }
