"""On a CUDA device: what a snapshot takes from matrix products, and how near the fused norm is to memory.

One process on one GPU. ::

    snapshot     steps of matrix products (bfloat16) and a fused AdamW over a state in float32; in
                 turn without and with a capture of every step, digests of all included
    norm         residual and RMSNorm in one kernel, against a copy on the device, as bytes a second
    gradients    what the way over the host adds to forward and backward: in a world of one, where the
                 reduction is a copy

    python -m benchmarks.gpu [--mib 2048] [--rounds 12] [--quick] [--json] [--save]

Says so and exits with 2 where there is no device.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import scratch
from benchmarks.saving import BYTES_PER_PARAMETER
from ftkit.checkpoint.arena import SHM
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.state import ProtectedState
from ftkit.collectives.gradients import GradientReducer
from ftkit.collectives.handle import finished
from ftkit.collectives.overlap.norm import add_rms_norm
from ftkit.core.ids import Generation, Step

#: A side of the matrices that are multiplied, and of the parameters.
SIDE, WIDTH = 8192, 4096
#: Seconds of products in a step: a snapshot of 2 GiB is through by then.
STEP_S = 1.0


class Work:
    """Parameters, an optimizer, and products that take as long as a step."""

    def __init__(self, state_bytes: int, step_s: float) -> None:
        depth = max(1, state_bytes // (WIDTH * WIDTH * BYTES_PER_PARAMETER))
        self.model = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH, bias=False, device="cuda") for _ in range(depth))
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        for param in self.model.parameters():
            param.grad = torch.full_like(param, 1e-3)
        self.optimizer.step()
        self.state = ProtectedState(model=self.model, optimizer=self.optimizer)
        self._a, self._b = (
            torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        self._out = torch.empty_like(self._a)
        self._products = 8
        took = min(seconds(self.compute) for _ in range(3))
        self._products = max(8, round(step_s / took * self._products))

    def compute(self) -> None:
        for _ in range(self._products):
            torch.mm(self._a, self._b, out=self._out)


def seconds(what: Callable[[], object]) -> float:
    """How long it takes, with all that it launches."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    what()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def beside(work: Work, capture: Capture, rounds: int) -> dict[str, list[float]]:
    """Steps without and with a snapshot, in turn; seconds."""
    found: dict[str, list[float]] = {
        name: []
        for name in ("products alone", "products beside", "alone", "with", "blocked", "sealed")
    }
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def step(*, saves: bool) -> None:
        if saves:
            capture.begin(Step(capture.snapshots + 1), Generation(1))
        before.record()
        work.compute()
        after.record()
        after.synchronize()
        capture.gate()
        if saves and capture.last is not None:
            found["blocked"].append(capture.last.blocked_s)
            found["sealed"].append(capture.last.sealed_after_s)
        work.optimizer.step()

    for number in range(-1, rounds):
        for saves in (False, True):
            whole = seconds(lambda saves=saves: step(saves=saves))  # type: ignore[misc]
            products = before.elapsed_time(after) / 1e3
            found["products beside" if saves else "products alone"].append(products)
            found["with" if saves else "alone"].append(whole)
        if number < 0:  # the first one warms up
            for samples in found.values():
                samples.clear()
    return found


def wrong(work: Work, capture: Capture, arena: Any) -> str:
    """What is wrong with a snapshot of the live state; "" when nothing."""
    wanted = [t.detach().clone() for t in work.state.tensors()]
    capture.begin(Step(capture.snapshots + 1), Generation(1))
    capture.gate()
    work.optimizer.step()
    sealed = arena.newest_good()
    head = arena.head(sealed)
    work.state.load(head.layout, arena.blocks(head), head.small)
    same = [torch.equal(t, w) for t, w in zip(work.state.tensors(), wanted, strict=True)]
    return "" if all(same) else f"{same.count(False)} tensors of the snapshot are not what was live"


def device_seconds(what: Callable[[], object], times: int = 20) -> float:
    """The median of some launches, by the device's own clock."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
    for _ in range(3):
        what()
    for before, after in events:
        before.record()
        what()
        after.record()
    torch.cuda.synchronize()
    took: list[float] = [a.elapsed_time(b) for a, b in events]
    return statistics.median(took) / 1e3


def norms(rows: int) -> tuple[dict[int, float], float, str]:
    """Bytes a second of the fused norm by width, and of a copy; and what was wrong."""
    rates, problem = dict[int, float](), ""
    for width in (1024, 4096, 8192):
        x, residual = (
            torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) for _ in range(2)
        )
        weight = torch.randn(width, device="cuda", dtype=torch.bfloat16)
        y, total = add_rms_norm(x, residual, weight, 1e-6)
        wanted = functional.rms_norm(total.float(), (width,), weight.float(), 1e-6)
        if not torch.equal(total, x + residual):
            problem = f"the new residual of width {width} is not the sum"
        if not torch.allclose(y.float(), wanted, rtol=1e-2, atol=1e-2):
            problem = f"the norm of width {width} is off by {(y.float() - wanted).abs().max()}"
        del y, total, wanted
        took = device_seconds(lambda: add_rms_norm(x, residual, weight, 1e-6))  # noqa: B023
        rates[width] = 4 * x.numel() * x.element_size() / took
    source = torch.empty(rows * 8192, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    return rates, copied / device_seconds(lambda: target.copy_(source)), problem


def gradients(rounds: int) -> tuple[dict[str, list[float]], str]:
    """Passes with and without the way of their gradients over the host, in seconds; what was wrong."""
    found: dict[str, list[float]] = {"plain": [], "over the host": []}
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, device="cuda") for _ in range(16)))
    x = torch.randn(16384, WIDTH, device="cuda")

    def reduce(nodes: Sequence[Any], out: torch.Tensor, scale: float) -> Any:
        (whole,) = nodes
        torch.mul(whole.value, scale, out=out)
        return finished(None)

    def backward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()

    def over_the_host() -> None:
        reducer.begin()
        reducer.start_slot(0, last=True)
        backward()
        reducer.end_slot()
        reducer.finish(held=1)
        reducer.end()

    problem = ""
    for number in range(-1, rounds):
        plain = seconds(backward)
        wanted = [p.grad for p in model.parameters()]
        for param in model.parameters():
            param.grad = None
        reducer = GradientReducer(model.parameters(), slots=1, reduce=reduce)
        over_the_host()  # takes its memory
        over = seconds(over_the_host)
        for param, grad in zip(model.parameters(), wanted, strict=True):
            if param.grad is None or grad is None or not torch.equal(param.grad, grad):
                problem = "gradients that went over the host are not those that did not"
            param.grad = None
        del wanted
        reducer.close()
        if number >= 0:
            found["plain"].append(plain)
            found["over the host"].append(over)
    return found, problem


def report(
    found: dict[str, list[float]],
    state_bytes: int,
    rates: dict[int, float],
    copy_rate: float,
    ways: dict[str, list[float]],
    problems: list[str],
    notes: list[str],
    options: dict[str, object],
) -> Report:
    """The figures; pure."""
    half = {name: statistics.median(samples) for name, samples in found.items()}
    slowed = {
        name: 100 * (half[with_it] / half[alone] - 1)
        for name, alone, with_it in (
            ("products beside a snapshot", "products alone", "products beside"),
            ("a step with a snapshot", "alone", "with"),
        )
    }
    over = statistics.median(ways["over the host"]) / statistics.median(ways["plain"])
    figures = [
        *(
            Figure(name=f"{name}, slower by", value=value, unit="%", at_most=3.0,
                   against=f"{half['alone']:.3g} s a step, {state_bytes / 1e9:.2f} GB")
            for name, value in slowed.items()
        ),
        Figure(name="a snapshot is sealed after", value=half["sealed"], unit="s",
               against=f"{state_bytes / half['sealed'] / 1e9:.2f} GB/s"),
        Figure(name="the training thread stands still", value=half["blocked"], unit="s"),
        *(
            Figure(name=f"residual and norm of {width} / copy on the device",
                   value=rate / copy_rate, unit="x", at_least=0.8,
                   against=f"{rate / 1e12:.2f} of {copy_rate / 1e12:.2f} TB/s")
            for width, rate in rates.items()
        ),
        Figure(name="forward and backward with gradients over the host / plain", value=over, unit="x",
               against="float32 gradients of 1.07 GB, a world of one"),
    ]  # fmt: skip
    return Report(
        name="gpu",
        figures=figures,
        computed={},
        problems=problems,
        notes=notes,
        options=options,
        samples={**found, **ways},
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    made = parser(__doc__)
    made.add_argument("--mib", type=int, help="size of the state in MiB (2048; quick: 512)")
    made.add_argument("--rounds", type=int, help="steps of each kind (12; quick: 3)")
    options = made.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here", file=sys.stderr)
        return 2
    mib = options.mib or (512 if options.quick else 2048)
    rounds = options.rounds or (3 if options.quick else 12)
    work = Work(mib << 20, STEP_S)
    layout = work.state.layout()
    with scratch("gpu") as folder:
        path = SHM / f"{folder.name}-0.arena"
        try:
            with ensure_arena(path, layout) as arena, Capture(arena, work.state) as capture:
                arena.reserve(layout.total_bytes)
                found = beside(work, capture, rounds)
                problems = [wrong(work, capture, arena)]
        finally:
            path.unlink(missing_ok=True)
    say(f"a step takes {statistics.median(found['alone']):.2f} s")
    del work
    rates, copy_rate, off = norms(4096 if options.quick else 65536)
    ways, other = gradients(rounds)
    problems = [p for p in (*problems, off, other) if p]
    notes = [torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}"]
    told = report(found, layout.total_bytes, rates, copy_rate, ways, problems, notes, vars(options))
    return finish(told, options)


if __name__ == "__main__":
    sys.exit(main())
