"""How long does a save of every step block training? ftkit's capture against its peers.

One process, one GPT with AdamW, the same steps, one way after another in each round, so that
noise of the machine falls on all alike (`saving` says what each way does). Blocked is all the
time that the training thread stands still for a save, ftkit's gate and the peer's lock among
it. The wait for the save before, without which files pile up, is shown beside it and not
counted.

    python -m benchmarks.snapshot [--mib 1024] [--steps 3] [--rounds 2] [--quick] [--json] [--save]
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from benchmarks import limits
from benchmarks.figures import Figure, Report, as_samples, finish, percentile, say
from benchmarks.jobs import scratch
from benchmarks.peers import TORCH_CHECKPOINTING, NoPeer, need
from benchmarks.saving import (
    Captured,
    Dcp,
    Loop,
    Sample,
    TorchCheckpointing,
    TorchSave,
    Way,
    be_quiet,
    broken_snapshot,
    captured,
    kept_stager,
    play,
    saving_parser,
    warm_up,
)
from ftkit.checkpoint.arena import SHM
from ftkit.launch.workload.gpt import parameters_digest

Samples = Mapping[str, Sequence[Sample]]


def measure(
    loop: Loop, ways: Mapping[str, Way], steps: int, rounds: int
) -> dict[str, list[Sample]]:
    """Each way in turn, over and over."""
    found: dict[str, list[Sample]] = {name: [] for name in ways}
    warm_up(loop, ways.values())
    for number in range(rounds):
        for name in list(ways)[:: -1 if number % 2 else 1]:
            found[name] += play(loop, ways[name], steps)
            blocked = statistics.median(s.blocked_s for s in found[name])
            say(f"{name}: blocked {blocked * 1e3:.3f} ms")
    return found


def report(
    found: Samples,
    total_bytes: int,
    memcpy_s: float,
    problems: Sequence[str],
    notes: Sequence[str],
    computed: str,
    options: Mapping[str, object],
) -> Report:
    """The figures with goals; pure."""
    gigabytes = total_bytes / 1e9
    blocked = {name: statistics.median(s.blocked_s for s in of) for name, of in found.items()}

    def against(name: str) -> str:
        waited = statistics.fmean(s.waited_s for s in found[name])
        return f"{name} {blocked[name] / gigabytes:.3g} s per GB, and {waited:.2g} s of waiting"

    ours = blocked["ftkit"]
    worst = percentile((s.blocked_s for s in found["ftkit"]), 100)
    figures = [
        Figure(name="training blocked per GB and save, p50", value=ours / gigabytes, unit="s",
               at_most=0.001, against=f"memcpy {memcpy_s / gigabytes:.3g} s per GB, one thread"),
        Figure(name="the same, worst", value=worst and worst / gigabytes, unit="s"),
    ]  # fmt: skip
    goals = {"dcp": None, "dcp-kept": 0.01, "dcp-shm": None, "torch.save": 0.001}
    figures += [
        Figure(name=f"blocked p50 / {name}", value=ours / blocked[name], unit="x",
               at_most=goal, against=against(name))
        for name, goal in {**goals, "torch_checkpointing": 1.0}.items() if name in blocked
    ]  # fmt: skip
    return Report(
        name="snapshot",
        figures=figures,
        computed={"parameters after all": computed},
        problems=problems,
        notes=notes,
        options=dict(options),
        samples={name: as_samples(of) for name, of in found.items()},
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = saving_parser(__doc__, rounds=2).parse_args(argv)
    be_quiet()
    # As in every rank: one thread computes, and what runs beside it has a core of its own.
    torch.set_num_threads(1)
    notes = list[str]()
    try:
        if options.without:
            raise NoPeer("it was left out")
        need(TORCH_CHECKPOINTING, options.peers)
    except NoPeer as error:
        notes.append(f"no figures for torch_checkpointing: {error}")
    mib = options.mib or (128 if options.quick else 1024)
    loop = Loop(mib << 20, fused=not options.plain, positions=options.positions)
    memcpy_s = limits.memcpy_s(loop.state.tensors())
    with scratch("snapshot") as folder, ExitStack() as stack:
        ours = stack.enter_context(captured(loop, SHM / f"{folder.name}-0.arena"))
        ways = everybody(loop, ours, folder, stack, modern=not notes)
        found = measure(
            loop,
            ways,
            options.steps or (2 if options.quick else 3),
            options.rounds or (1 if options.quick else 2),
        )
        play(loop, ours, 1)
        problem = broken_snapshot(ours, loop)
    problems = [problem] if problem else []
    computed = parameters_digest(loop.model)
    return finish(
        report(found, loop.total_bytes, memcpy_s, problems, notes, computed, vars(options)), options
    )


def everybody(
    loop: Loop, ours: Captured, folder: Path, stack: ExitStack, *, modern: bool
) -> dict[str, Way]:
    """The ways compared here; `modern`: torch_checkpointing is there."""
    kept, shared = kept_stager(), kept_stager(shared=True)
    stack.callback(kept.close)
    stack.callback(shared.close)
    ways: dict[str, Way] = {
        "none": Way(),
        "ftkit": ours,
        "dcp": Dcp(loop, folder / "dcp"),
        "dcp-kept": Dcp(loop, folder / "kept", kept),
        "dcp-shm": Dcp(loop, folder / "shm", shared),
        "torch.save": TorchSave(loop, folder / "torch"),
    }
    if modern:
        ways["torch_checkpointing"] = TorchCheckpointing(loop, folder / "modern", stack)
    return ways


if __name__ == "__main__":
    sys.exit(main())
