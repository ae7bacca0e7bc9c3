"""Approximate recovery: iterations lost a failure, on a byte-level LLaMA of six stages.

One process plays all stages: what is measured is what a loss does to the *training*, and not how
long recovery takes. Every method trains on the same batches and meets the same failures,
Bernoulli per stage and iteration (no two neighbouring stages at once). "Lost" is by how many
iterations the undisturbed run was further: its iteration with the same validation loss, taken from
its smoothed curve, from the iterations done, over the failures. First and last stages cannot be
lost to CheckFree, so it meets fewer failures. Rollback and redundant computation are arithmetic on the undisturbed curve:

* rollback at K: every failure goes back to the last multiple of K iterations.
* redundant computation loses nothing and takes 1.33 to 1.65 times as long for every iteration.

Its thirty trainings take an hour of two cores: with `--state FILE` a call goes on where the last
one ended.

    python -m benchmarks.approximate [--state FILE] [--quick] [--json] [--save]
"""

import argparse
import copy
import hashlib
import json
import logging
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.done_before import DoneBefore
from benchmarks.figures import Figure, Report, finish, parser, say
from ftkit.launch.workload.text import load_text
from ftkit.session.approximate import StaleShard, copy_neighbour, fresh_optimizer, rebuild_between

STAGES, WIDTH, HEADS, CONTEXT, BATCH, LR = 6, 64, 4, 64, 8, 1e-3
#: Of the text, at most.
TEXT_BYTES = 4 << 20
EVERY = 25
"""Iterations between two looks at the validation loss."""
METHODS = ("stale shard", "CheckFree", "CheckFree+", "random")
ROLLBACKS = (25, 100, 200)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """One LLaMA block: a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([Norm(), Norm()])
        self.qkv, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH, bias=False),
            nn.Linear(WIDTH, WIDTH, bias=False),
        )
        self.gate, self.up = (nn.Linear(WIDTH, 3 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        rates = 1e4 ** (-torch.arange(0, WIDTH // HEADS, 2).float() / (WIDTH // HEADS))
        angles = torch.outer(torch.arange(CONTEXT).float(), rates)
        # The same on every stage, and never lost.
        self.cos, self.sin = angles.cos(), angles.sin()

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1).flatten(
            -2
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        many = x.shape[0]
        q, k, v = (
            self.qkv(self.norms[0](x)).view(many, CONTEXT, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        )
        seen = functional.scaled_dot_product_attention(
            self.turned(q), self.turned(k), v, is_causal=True
        )
        x = x + self.out(seen.transpose(1, 2).reshape(many, CONTEXT, WIDTH))
        h = self.norms[1](x)
        fed: torch.Tensor = self.down(functional.silu(self.gate(h)) * self.up(h))
        return x + fed


@dataclass(frozen=True, slots=True)
class Run:
    """One training: validation losses at multiples of `EVERY`, and the failures it met."""

    losses: list[float]
    failures: int


def failures_of(seed: int, iterations: int, rate: float) -> list[list[int]]:
    """The stages lost before each iteration; never two neighbours, as CheckFree assumes."""
    chance = torch.Generator().manual_seed(1000 + seed)
    drawn = torch.rand(iterations, STAGES, generator=chance) < rate
    schedule = []
    for row in drawn.tolist():
        lost: list[int] = []
        for stage in [s for s in range(STAGES) if row[s]]:
            if not lost or stage - lost[-1] > 1:
                lost.append(stage)
        schedule.append(lost)
    schedule[0] = []
    return schedule


class Training:
    """The model in stages, and what a loss does to them."""

    def __init__(
        self, data: torch.Tensor, seed: int, method: str, *, swapped: bool = False
    ) -> None:
        torch.manual_seed(seed)
        self.method, self.swapped = method, swapped
        self.train, self.held_out = data[: -len(data) // 10], data[-len(data) // 10 :]
        self.ends = nn.ModuleList(
            [nn.Embedding(256, WIDTH), Norm(), nn.Linear(WIDTH, 256, bias=False)]
        )
        self.stages = [Block() for _ in range(STAGES)]
        for part in (self.ends, *self.stages):
            for weight in part.parameters():
                if weight.ndim > 1:
                    nn.init.normal_(weight, std=0.05)
        self.optimizers = [torch.optim.Adam(s.parameters(), lr=LR) for s in self.stages]
        self.end_optimizer = torch.optim.Adam(self.ends.parameters(), lr=LR)
        self.stale = [
            StaleShard(i, s, o)
            for i, (s, o) in enumerate(zip(self.stages, self.optimizers, strict=True))
        ]
        self.batches = torch.Generator().manual_seed(77 + seed)
        self.norms = [1.0] * STAGES

    def forward(self, x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        h = self.ends[0](x)
        for i in order:
            h = self.stages[i](h)
        logits: torch.Tensor = self.ends[2](self.ends[1](h))
        return logits

    def iterate(self) -> None:
        for optimizer in (self.end_optimizer, *self.optimizers):
            optimizer.zero_grad()
        order = list(range(STAGES))
        for half in range(2):
            if half and self.swapped:
                order = [1, 0, *range(2, STAGES - 2), STAGES - 1, STAGES - 2]
            at = torch.randint(0, len(self.train) - CONTEXT - 1, (BATCH,), generator=self.batches)
            rows = torch.stack([self.train[i : i + CONTEXT + 1] for i in at.tolist()]).long()
            logits = self.forward(rows[:, :-1], order)
            (functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()) / 2).backward()
        nn.utils.clip_grad_norm_(self.ends.parameters(), 1.0)
        for i, stage in enumerate(self.stages):
            self.norms[i] = float(nn.utils.clip_grad_norm_(stage.parameters(), 1.0))
        for optimizer in (self.end_optimizer, *self.optimizers):
            optimizer.step()

    @torch.no_grad()
    def loss(self) -> float:
        step = max(1, (len(self.held_out) - CONTEXT - 1) // 64)
        rows = torch.stack(
            [self.held_out[i * step : i * step + CONTEXT + 1] for i in range(64)]
        ).long()
        logits = self.forward(rows[:, :-1], range(STAGES))
        return float(functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))

    def lose(self, stage: int, now: int) -> bool:
        """Recover a lost stage by the method; False where the method cannot, and it is no loss."""
        edge = stage in (0, STAGES - 1)
        allowed = {"stage": stage, "allow_approximate": True, "tell": lambda *_, **__: None}
        lost = self.stages[stage]
        match self.method:
            case "stale shard":
                self.stale[stage].restore(
                    now=now, allow_approximate=True, tell=lambda *_, **__: None
                )
                return True
            case "CheckFree" if edge:
                return False
            case "CheckFree+" if edge or stage in (1, STAGES - 2):
                partner = {0: 1, 1: 0, STAGES - 1: STAGES - 2, STAGES - 2: STAGES - 1}[stage]
                copy_neighbour(lost, self.stages[partner], **allowed)  # type: ignore[arg-type]
            case "CheckFree" | "CheckFree+":
                norms = (self.norms[stage - 1], self.norms[stage + 1])
                rebuild_between(
                    lost,
                    self.stages[stage - 1],
                    self.stages[stage + 1],
                    norms=norms,
                    **allowed,  # type: ignore[arg-type]
                )
            case _:
                fresh = Block()
                for weight in fresh.parameters():
                    if weight.ndim > 1:
                        nn.init.normal_(weight, std=0.05)
                lost.load_state_dict(copy.deepcopy(fresh.state_dict()))
        fresh_optimizer(self.optimizers[stage], lr=LR)
        return True


def train(
    data: torch.Tensor, seed: int, method: str, iterations: int, rate: float, every: int
) -> Run:
    """Train by one method through the failures of `seed`; the method "" meets none."""
    job = Training(data, seed, method, swapped=method in ("CheckFree+", "swapped"))
    schedule = failures_of(seed, iterations, rate)
    losses, met = [], 0
    for now in range(iterations):
        if method in METHODS:
            met += sum(job.lose(stage, now) for stage in schedule[now])
        if method == "stale shard" and now % every == 0:
            for shard in job.stale:
                shard.capture(now)
        job.iterate()
        if (now + 1) % EVERY == 0:
            losses.append(job.loss())
    return Run(losses, met)


def equivalent(reference: Sequence[float], loss: float) -> float:
    """The iteration at which the undisturbed run had this validation loss; smoothed over three."""
    smooth = [statistics.fmean(reference[max(0, i - 1) : i + 2]) for i in range(len(reference))]
    least = [min(smooth[: i + 1]) for i in range(len(smooth))]
    for i, value in enumerate(least):
        if value <= loss:
            if i == 0 or least[i - 1] == value:
                return EVERY * (i + 1.0)
            return EVERY * (i + (least[i - 1] - loss) / (least[i - 1] - value))
    return EVERY * float(len(reference))


def rollback(schedule: Sequence[Sequence[int]], every: int) -> tuple[int, int]:
    """(iterations that remain done, failures) when each failure goes back to a multiple of `every`."""
    done, failures = 0, 0
    for lost in schedule:
        if lost:
            failures += len(lost)
            done -= done % every
        done += 1
    return done, failures


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, help="text to train on; default: Python's library")
    made.add_argument("--seeds", type=int, help="default 5, 1 with --quick")
    made.add_argument("--iterations", type=int, help="default 2000, 400 with --quick")
    made.add_argument("--rate", type=float, default=0.002, help="per stage and iteration")
    made.add_argument("--every", type=int, default=100, help="iterations between stale shards")
    made.add_argument(
        "--state", type=Path, help="a file that keeps what was trained, to go on with"
    )
    options = made.parse_args(arguments)
    options.seeds = options.seeds or (1 if options.quick else 5)
    options.iterations = options.iterations or (400 if options.quick else 2000)
    text = load_text(options.data, bytes_max=TEXT_BYTES)
    same = {
        "text": hashlib.sha256(text).hexdigest()[:16],
        "iterations": options.iterations,
        "rate": options.rate,
        "every": options.every,
    }
    before = DoneBefore(options.state, same)
    runs = {(d["seed"], d["method"]): Run(d["losses"], d["failures"]) for d in before.records}
    wanted = [
        (s, m)
        for s in range(options.seeds)
        for m in ("", "swapped", *METHODS)
        if (s, m) not in runs
    ]
    for (seed, method), run in _train_all(text, wanted, options):
        runs[seed, method] = run
        say(
            f"seed {seed}, {method or 'undisturbed'}: {run.losses[-1]:.4f}, {run.failures} failures"
        )
        before.add({"seed": seed, "method": method, **asdict(run)})
    return finish(report(runs, options), options)


def _train_all(
    text: bytes, wanted: Sequence[tuple[int, str]], options: argparse.Namespace
) -> Iterator[tuple[tuple[int, str], Run]]:
    """Trainings know nothing of each other: one on each core. Those that end, as they end."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        given = (options.iterations, options.rate, options.every)
        waiting = {pool.submit(_train_alone, text, *each, *given): each for each in wanted}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


def _train_alone(
    text: bytes, seed: int, method: str, iterations: int, rate: float, every: int
) -> Run:
    """`train` in a process of its own. Blocks, for minutes, on one core."""
    torch.set_num_threads(1)
    # Each loss is told by the method itself; hundreds of them are no news here.
    logging.getLogger("ftkit.session.approximate").setLevel(logging.ERROR)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return train(data, seed, method, iterations, rate, every)


def lost_by(
    runs: Mapping[tuple[int, str], Run], seed: int, *, total: int, rate: float
) -> dict[str, float]:
    """Method -> iterations lost a failure, of one seed; pure."""
    reference = runs[seed, ""].losses
    whole = equivalent(reference, _final(runs[seed, ""]))
    lost = dict[str, float]()
    for method in METHODS:
        run = runs[seed, method]
        if run.failures:
            lost[method] = max(0.0, whole - equivalent(reference, _final(run))) / run.failures
    for interval in ROLLBACKS:
        done, failures = rollback(failures_of(seed, total, rate), interval)
        if failures:
            lost[f"rollback at {interval}"] = (total - done) / failures
    return lost


def _final(run: Run) -> float:
    return statistics.fmean(run.losses[-3:])


def report(runs: Mapping[tuple[int, str], Run], options: argparse.Namespace) -> Report:
    """The figures of all seeds; pure."""
    total, seeds = options.iterations, range(options.seeds)
    lost: dict[str, list[float]] = {}
    swap_costs = []
    for seed in seeds:
        for method, value in lost_by(runs, seed, total=total, rate=options.rate).items():
            lost.setdefault(method, []).append(value)
        reference = runs[seed, ""].losses
        swap_costs.append(
            equivalent(reference, _final(runs[seed, ""]))
            - equivalent(reference, _final(runs[seed, "swapped"]))
        )
    finals = [
        {"seed": s, "method": m, "loss": _final(runs[s, m]), "failures": runs[s, m].failures}
        for s in seeds
        for m in METHODS
    ]
    goals = {"stale shard": 15.0, "CheckFree": 80.0}
    figures = [
        Figure(
            name=f"{method}: iterations lost a failure",
            value=statistics.fmean(values),
            unit="",
            at_most=goals.get(method),
            against=f"{min(values):.1f} to {max(values):.1f} over {len(values)} seeds",
        )
        for method, values in lost.items()
    ]
    figures += [
        Figure(
            name="CheckFree+: what its swapped pipeline costs without a failure",
            value=max(0.0, statistics.fmean(swap_costs)),
            unit="iterations",
        ),
        Figure(
            name="redundant computation: iterations lost to its longer ones",
            value=total * (1 - 1 / 1.33),
            unit="iterations",
            against=f"of {total}, whatever fails; {total * (1 - 1 / 1.65):.0f} at 1.65 times",
        ),
    ]
    return Report(
        name="approximate",
        figures=figures,
        computed={"losses": hashlib.sha256(json.dumps(finals).encode()).hexdigest()[:16]},
        notes=[
            f"{options.seeds} seeds of {total} iterations; all stages in one process.",
            "CheckFree+ is compared with the undisturbed run of the plain pipeline, its swap included.",
        ],
        options=vars(options)
        | {"data": options.data and options.data.name, "state": options.state is not None},
        samples=finals,
    )


if __name__ == "__main__":
    sys.exit(main())
