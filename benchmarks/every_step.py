"""How much longer is a step when every step is saved? ftkit and its peers, against no saving.

One process trains a GPT with AdamW and is timed step by step, in rounds in which each way of
saving (`saving`) has its turn, a few steps of no saving before it: a way adds what its median
step is longer than that. All that a save costs is in it: the time the training thread stands
still, the wait for the save before, and the cores and memory that the work beside it takes.

ftkit's memory tier is measured alone, with digests of every byte, and with parity: three agents
in processes of their own, of which node 0 has this rank's snapshot and the others keep its
parity. Together they do what one node of three does in a job: as many bytes are sent, received,
checked and encoded as a node holds. The peers write to disk, for that is what they have.

    python -m benchmarks.every_step [--mib 1024] [--steps 3] [--rounds 3] [--quick] [--json]
                                    [--save]
"""

import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks import limits
from benchmarks.figures import Figure, Report, as_samples, finish, say
from benchmarks.jobs import scratch
from benchmarks.parity_node import nodes
from benchmarks.peers import TORCH_CHECKPOINTING, NoPeer, need
from benchmarks.saving import (
    Dcp,
    Loop,
    Sample,
    TorchCheckpointing,
    Way,
    be_quiet,
    broken_snapshot,
    captured,
    group_of_one,
    kept_stager,
    play,
    saving_parser,
    warm_up,
)
from ftkit.checkpoint.arena import SHM, arena_path
from ftkit.checkpoint.slabs import SLABS
from ftkit.core.ids import JobId, Seat
from ftkit.launch.arenas import PARITY_SLABS
from ftkit.launch.workload.gpt import parameters_digest

#: Three nodes, each of which keeps parity of the two others.
CODE, NODES = "2+1", 3
DCP = ("dcp", "dcp-kept", "dcp-process")

Turns = Mapping[str, Sequence[tuple[float, Sequence[Sample]]]]
"""By way, its turns: the step without saving before it, in seconds, and its steps."""


def measure(loop: Loop, ways: Mapping[str, Way], steps: int, rounds: int) -> Turns:
    """Each way in turn, in another order each round, always after steps of no saving."""
    found, rng = defaultdict[str, list[tuple[float, list[Sample]]]](list), random.Random(0)
    order = list(ways)
    warm_up(loop, ways.values())
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            none = statistics.median(s.step_s for s in play(loop, Way(), max(2, steps // 2)))
            turn = play(loop, ways[name], steps)
            found[name].append((none, turn))
            middle = statistics.median(s.step_s for s in turn)
            say(f"{name}: {middle:.3f} s a step, {none:.3f} s without saving")
    return found


def added(turns: Sequence[tuple[float, Sequence[Sample]]]) -> float:
    """Seconds that a way adds to a step, the median of its turns; pure. Below 0 is noise."""
    return statistics.median(
        statistics.median(s.step_s for s in turn) - none for none, turn in turns
    )


def stretched(turns: Sequence[tuple[float, Sequence[Sample]]]) -> float:
    """A way's step / the step without saving, the median of its turns; pure."""
    return statistics.median(
        statistics.median(s.step_s for s in turn) / none for none, turn in turns
    )


def report(
    found: Turns,
    total_bytes: int,
    memcpy_s: float,
    problems: Sequence[str],
    notes: Sequence[str],
    computed: str,
    options: Mapping[str, object],
) -> Report:
    """The figures with goals; pure."""
    costs = {name: added(turns) for name, turns in found.items()}
    none = statistics.median(none for turns in found.values() for none, _ in turns)
    least = min(DCP, key=lambda name: costs[name])
    figures = []
    for name, what, share, step in (
        ("ftkit", "memory tier", 0.10, 1.05),
        ("ftkit-parity", "memory tier and parity", 0.25, 1.10),
    ):
        figures += [
            Figure(name=f"{what}: step / no saving", value=stretched(found[name]), unit="x",
                   at_most=step, against=f"{none:.3g} s, {costs[name] * 1e3:+.1f} ms a step"),
            Figure(name=f"{what}: added / what {least} adds, the least of DCP",
                   value=max(0.0, costs[name]) / max(1e-9, costs[least]), unit="x", at_most=share,
                   against=f"{costs[least] * 1e3:+.1f} ms a step"),
        ]  # fmt: skip
    figures += [
        Figure(name=f"{name}: step / no saving", value=stretched(turns), unit="x",
               against=f"{costs[name] * 1e3:+.1f} ms a step")
        for name, turns in found.items() if not name.startswith("ftkit")
    ]  # fmt: skip
    figures.append(
        Figure(name="the limit: memcpy of the state, one thread", value=memcpy_s, unit="s",
               against=f"{total_bytes / memcpy_s / 1e9:.1f} GB/s")
    )  # fmt: skip
    return Report(
        name="every_step",
        figures=figures,
        computed={"parameters after all": computed},
        problems=problems,
        notes=notes,
        options=dict(options),
        samples={
            name: [{"none_s": none, "steps": as_samples(turn)} for none, turn in turns]
            for name, turns in found.items()
        },
    )


def main(argv: Sequence[str] | None = None) -> int:
    options = saving_parser(__doc__, rounds=3).parse_args(argv)
    be_quiet()
    # As in every rank: one thread computes, and what runs beside it has a core of its own.
    torch.set_num_threads(1)
    notes, problems = list[str](), list[str]()
    try:
        if options.without:
            raise NoPeer("it was left out")
        need(TORCH_CHECKPOINTING, options.peers)
    except NoPeer as error:
        notes.append(f"no figures for torch_checkpointing: {error}")
    mib = options.mib or (128 if options.quick else 1024)
    steps = options.steps or (2 if options.quick else 3)
    loop = Loop(mib << 20, fused=not options.plain, positions=options.positions)
    memcpy_s = limits.memcpy_s(loop.state.tensors())
    with scratch("every-step") as folder, ExitStack() as stack:
        agents = stack.enter_context(nodes(folder / "nodes", CODE, NODES))
        stack.enter_context(group_of_one())
        kept, beside = kept_stager(), kept_stager(shared=True, beside=True)
        stack.callback(kept.close)
        stack.callback(beside.close)
        alone = stack.enter_context(captured(loop, SHM / f"{folder.name}-0.arena"))
        path = arena_path(JobId(agents.config.job), Seat(0), agents.config.shm_dir(0))
        watched = stack.enter_context(captured(loop, path, slabs=SLABS + PARITY_SLABS))
        ways: dict[str, Way] = {
            "ftkit": alone,
            "ftkit-parity": watched,
            "dcp": Dcp(loop, folder / "dcp"),
            "dcp-kept": Dcp(loop, folder / "kept", kept),
            "dcp-process": Dcp(loop, folder / "process", beside, AsyncCheckpointerType.PROCESS),
        }
        if not notes:
            ways["torch_checkpointing"] = TorchCheckpointing(loop, folder / "modern", stack)
        found = measure(loop, ways, steps, options.rounds or (1 if options.quick else 3))
        for ours in (alone, watched):
            play(loop, ours, 1)
            problems += filter(None, [broken_snapshot(ours, loop)])
        agents.await_round(watched.capture.snapshots)
        rounds = len(agents.rounds())
        notes.append(f"parity was made of {rounds} of {watched.capture.snapshots} snapshots")
    computed = parameters_digest(loop.model)
    return finish(
        report(found, loop.total_bytes, memcpy_s, problems, notes, computed, vars(options)), options
    )


if __name__ == "__main__":
    sys.exit(main())
