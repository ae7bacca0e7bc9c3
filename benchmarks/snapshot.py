"""How long does a snapshot of every step block training? Capture against DCP's async_save.

One process, one model, the same steps, one mode after another in each round so that noise of
the machine falls on all alike. What is compared differs in kind: Capture writes to shared
memory (survives the process), DCP to files (survives the machine). Only the time that the
training thread stands still is compared::

    capture     begin + gate
    dcp         the call of async_save, with a new stager each time (its default)
    dcp-kept    the same, with one DefaultStager kept by the caller

DCP's wait for the previous upload, without which saves pile up, is shown beside it and not
counted.

    python -m benchmarks.snapshot --params 85000000 --steps 8 [--quick] [--json [FILE]] [--save]
"""

import hashlib
import json
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save

from benchmarks.figures import Figure, Report, parser, save
from benchmarks.figures import table as figures_table
from benchmarks.jobs import ended_by_sigterm
from ftkit.checkpoint.arena import SHM, Arena
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.ids import Generation, Step

KEPT = StagingOptions(
    use_pinned_memory=False,
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


@dataclass
class Times:
    """Seconds, one entry a step."""

    blocked_s: list[float] = field(default_factory=list)
    waited_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)


class Loop:
    """A training loop with hooks before and after the optimizer."""

    def __init__(self, params: int) -> None:
        width = max(8, round((params / 4) ** 0.5))
        layers = [m for _ in range(4) for m in (nn.Linear(width, width), nn.GELU())]
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.batch = torch.randn(256, width)
        self.step(lambda: None, lambda: None)

    def step(self, before: Callable[[], None], after: Callable[[], None]) -> float:
        """One step; `after` is where a snapshot of it is begun."""
        start = time.perf_counter()
        self.model(self.batch).square().mean().backward()
        before()
        self.optimizer.step()
        self.optimizer.zero_grad()
        after()
        return time.perf_counter() - start

    def state_dict(self) -> dict[str, object]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def run_none(loop: Loop, steps: int, times: Times) -> None:
    for _ in range(steps):
        times.step_s.append(loop.step(lambda: None, lambda: None))


def run_capture(loop: Loop, steps: int, times: Times, capture: Capture) -> None:
    spent = 0.0

    def gate() -> None:
        nonlocal spent
        spent += capture.gate()

    def begin() -> None:
        nonlocal spent
        spent += capture.begin(Step(capture.snapshots + 1), Generation(1))

    for _ in range(steps):
        spent = 0.0
        times.step_s.append(loop.step(gate, begin))
        times.blocked_s.append(spent)
    capture.gate()


def run_dcp(
    loop: Loop, steps: int, times: Times, where: Path, stager: DefaultStager | None
) -> None:
    previous: Future[object] | None = None
    for number in range(steps):
        path = where / str(number)

        def save(path: Path = path) -> None:
            nonlocal previous
            start = time.perf_counter()
            if previous is not None:
                previous.result()
            waited = time.perf_counter()
            saved = async_save(
                loop.state_dict(), checkpoint_id=path, async_stager=stager, no_dist=True
            )
            times.blocked_s.append(time.perf_counter() - waited)
            assert isinstance(saved, Future), "a thread saves, not a process"
            previous = saved
            times.waited_s.append(waited - start)

        times.step_s.append(loop.step(lambda: None, save))
        shutil.rmtree(where / str(number - 2), ignore_errors=True)
    if previous is not None:
        previous.result()
    shutil.rmtree(where, ignore_errors=True)


def measure(params: int, steps: int, rounds: int = 2) -> dict[str, object]:
    """Run all modes; seconds and ratios, JSON-safe."""
    torch.manual_seed(0)
    loop = Loop(params)
    state = ProtectedState(model=loop.model, optimizer=loop.optimizer)
    layout = state.layout()
    times = {mode: Times() for mode in ("none", "capture", "dcp", "dcp-kept")}
    scratch = Path(tempfile.mkdtemp(prefix="ftkit-snapshot-"))
    path = SHM / f"{scratch.name}-0.arena"
    stager = DefaultStager(KEPT)
    try:
        with Arena.ensure(path, layout) as arena, Capture(arena, state) as capture:
            arena.reserve(layout.total_bytes)
            for number in range(rounds):
                run_none(loop, steps, times["none"])
                run_capture(loop, steps, times["capture"], capture)
                run_dcp(loop, steps, times["dcp"], scratch / f"a{number}", None)
                run_dcp(loop, steps, times["dcp-kept"], scratch / f"b{number}", stager)
    finally:
        stager.close()
        path.unlink(missing_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
    gigabytes = layout.total_bytes / 1e9
    modes = dict[str, dict[str, float]]()
    for mode, found in times.items():
        row = {"step_p50_s": statistics.median(found.step_s)}
        if found.blocked_s:
            row["blocked_p50_s_per_GB"] = statistics.median(found.blocked_s) / gigabytes
            row["blocked_max_s_per_GB"] = max(found.blocked_s) / gigabytes
            row["blocked_mean_s_per_GB"] = statistics.fmean(found.blocked_s) / gigabytes
        if found.waited_s:
            row["waited_p50_s_per_GB"] = statistics.median(found.waited_s) / gigabytes
        modes[mode] = row
    ours = modes["capture"]["blocked_p50_s_per_GB"]
    return {
        "bytes": layout.total_bytes,
        "snapshots_per_mode": steps * rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "params_sha256": digest(loop.model),
        "modes": modes,
        "capture_to_dcp": ours / modes["dcp"]["blocked_p50_s_per_GB"],
        "capture_to_dcp_kept": ours / modes["dcp-kept"]["blocked_p50_s_per_GB"],
    }


def table(result: dict[str, object]) -> str:
    modes = result["modes"]
    assert isinstance(modes, dict)
    columns = [
        "step_p50_s",
        "blocked_p50_s_per_GB",
        "blocked_mean_s_per_GB",
        "blocked_max_s_per_GB",
        "waited_p50_s_per_GB",
    ]
    lines = ["mode      " + "".join(f"{c:>23}" for c in columns)]
    for mode, row in modes.items():
        cells = (f"{row[c]:>23.6f}" if c in row else f"{'-':>23}" for c in columns)
        lines.append(f"{mode:<10}" + "".join(cells))
    return "\n".join(lines)


def digest(model: nn.Module) -> str:
    """SHA-256 (hex) of all parameters' bytes."""
    hasher = hashlib.sha256()
    for parameter in model.parameters():
        hasher.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def report(result: dict[str, object], options: dict[str, object]) -> Report:
    """The figures with goals, out of what `measure` found; pure."""
    modes = result["modes"]
    assert isinstance(modes, dict), "measure() makes a dictionary of modes"
    ours, kept = modes["capture"], modes["dcp-kept"]
    dcp = modes["dcp"]["blocked_p50_s_per_GB"]
    return Report(
        name="snapshot",
        figures=[
            Figure(
                name="training blocked per GB and snapshot, p50",
                value=ours["blocked_p50_s_per_GB"],
                unit="s",
                at_most=0.001,
                against=f"DCP async_save {dcp:.3g} s",
            ),
            Figure(
                name="the same / dcp.async_save with a kept stager",
                value=float(str(result["capture_to_dcp_kept"])),
                unit="x",
                at_most=1 / 50,
                against=f"DCP with a kept stager {kept['blocked_p50_s_per_GB']:.3g} s",
            ),
        ],
        computed={"parameters after all modes": str(result["params_sha256"])},
        options=options,
        samples=result,
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument(
        "--params", type=int, help="parameters of the model (85 million: 1 GB of state)"
    )
    made.add_argument("--steps", type=int, help="snapshots per mode and round (8; quick: 3)")
    made.add_argument("--rounds", type=int, help="rounds (2; quick: 1)")
    # As in the other benchmarks, but a file may be named: then the table is printed too.
    made.add_argument("--json", nargs="?", type=Path, const=Path("-"), default=None, metavar="FILE")
    options = made.parse_args(argv)
    quick = options.quick
    params = options.params or (2_000_000 if quick else 85_000_000)
    # DCP warns that there is no process group; there is not meant to be one.
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    with ended_by_sigterm():
        result = measure(
            params, options.steps or (3 if quick else 8), options.rounds or (1 if quick else 2)
        )
    found = report(result, vars(options))
    if options.json == Path("-"):
        print(json.dumps(found.to_json()), flush=True)
    else:
        print(figures_table(found))
        print(table(result), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.save is not None:
        save(found, options.save)
    return 0


if __name__ == "__main__":
    sys.exit(main())
