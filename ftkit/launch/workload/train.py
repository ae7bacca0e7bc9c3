"""The training job itself: an ordinary DDP or FSDP2 script over ftkit's public API.

Run by `ftkit run` or `ftkit drill`, or alone as a world of one::

    python -m ftkit.launch.workload.train --steps 100
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ftkit
from ftkit.core.errors import UsageError
from ftkit.launch.workload.gpt import GPT, PRESETS, GPTConfig, next_byte_loss, parameters_digest
from ftkit.launch.workload.text import ByteWindows, load_text

#: Windows of an evaluation, and how long it may take at most.
EVAL_WINDOWS, EVAL_MAX_S = 512, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything the job's outcome depends on, apart from the machine's arithmetic."""

    model: GPTConfig
    steps: int
    slots: int
    slot_size: int
    seed: int
    learning_rate: float
    data: Path | None
    data_bytes_max: int
    short_handed_s: float
    """For drills: slept after each step while a seat is empty, so that a job of few steps lasts
    until a rank that was lost is back. No part of the outcome."""
    verify_every: int | None
    """Steps between two comparisons of the ranks' state; None for what ftkit chooses."""
    on_nan: str
    device_s: float
    """For drills: slept for each slot, as a rank does whose device computes. On a machine with
    more ranks than cores nothing else is the same work for all. No part of the outcome."""
    threads: int
    """Threads of torch in each rank. Part of the outcome: kernels sum by thread."""
    sharded: int
    """Ranks over which a copy of the model is cut: 0 for none, 1 for all there are."""
    clip: float
    """Longest gradient; 0 for any."""
    rebalance: bool = False
    """Whether ranks play as many slots as they are fast. No part of the outcome."""
    zero: bool = False
    """Whether the optimizer's state is cut over the ranks. No part of the outcome."""
    stages: bool = False
    """Whether the model is a pipeline, one stage on each rank."""
    eval_every: int = 0
    """Steps between two evaluations by rank 0, for which the others wait; 0 for none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a rank holds at the end."""

    steps: int
    """Steps this rank committed or was restored past: the index of its last one."""
    loss: float | None
    """Loss of the last step, the mean over its slots; None when this rank played none."""
    params: str
    """`parameters_digest` of the model, or the session's of a sharded one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Join the job, train, tell the result. Returns the process's exit code."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    # The text is read before joining: a wrong path ends the job before the others wait for us.
    try:
        dataset = ByteWindows(
            load_text(options.data, bytes_max=options.data_bytes_max),
            context=options.model.context,
            origin=str(options.data or "the standard library's text"),
        )
    except UsageError as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    session = ftkit.init()
    result = train(session, dataset, options)
    session.trace.event("final", params=result.params, loss=result.loss, step=result.steps)
    if session.rank == 0:
        line = {"steps": result.steps, "loss": result.loss, "params": result.params}
        print(json.dumps(line), flush=True)
    return 0


def train(session: Any, dataset: ByteWindows, options: Options) -> Result:
    """Train until step `options.steps`; what a user's script would say, and nothing else.

    Args:
      session: what `ftkit.init()` returned; its process group is torch's default one.
      dataset: read by index, from this thread.
      options: the same on every rank.
    """

    def build(mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
        whole = GPT(options.model, seed=options.seed)
        shard(whole, mesh)
        return whole, optimizer_of(whole)

    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        # Neither fused nor foreach: the fused CPU kernel's vector tail depends on how the
        # parameters are cut, which would cost the equality of bits between world sizes.
        return torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, foreach=False, fused=False
        )

    built = bool(options.sharded or options.stages)
    pipelines: list[Any] = []
    if options.stages:
        from ftkit.launch.workload.pipeline import builder

        stages = builder(
            session,
            options.model,
            optimizer_of,
            slots=options.slots,
            slot_size=options.slot_size,
            seed=options.seed,
            keep=pipelines.append,
        )
        session.protect(build=stages, stages=True, device="cpu")
    elif options.sharded:
        shards = options.sharded if options.sharded > 1 else None
        session.protect(build=build, shards=shards, device="cpu")  # where its batches are
    else:
        model = replicated = DistributedDataParallel(GPT(options.model, seed=options.seed))
        optimizer = optimizer_of(model)
        if options.zero:
            optimizer = ftkit.ZeroOptimizer(
                model.parameters(), torch.optim.AdamW, lr=options.learning_rate, foreach=False
            )
        session.protect(model=model, optimizer=optimizer)

    done, loss_value = 0, None
    for step in session.steps(
        dataset,
        slots=options.slots,
        slot_size=options.slot_size,
        until=options.steps,
        seed=options.seed,
        verify_every=options.verify_every,
        on_nan=options.on_nan,
        rebalance=options.rebalance,
    ):
        if built:
            model, optimizer = session.model, session.optimizer
        del pipelines[:-1]
        with step:
            if options.stages:
                pipelines[-1].run(step, step.slots())
            for x, y in step.batches() if not options.stages else ():
                loss = next_byte_loss(model(x), y)
                loss.backward()  # type: ignore[no-untyped-call]
                if options.device_s:
                    time.sleep(options.device_s)
                step.record(loss)
            if options.clip:
                step.clip_grad_norm_(options.clip)
            optimizer.step()
            optimizer.zero_grad()
        if session.world_size < int(os.environ.get("WORLD_SIZE", "1")):
            time.sleep(options.short_handed_s)
        if step.committed:
            done, loss_value = int(step.index), step.loss
            if session.rank == 0 and done % 100 == 0:
                # A step that was rolled forward has no loss: its ballots were lost.
                print(f"step {done}: loss {loss_value}", flush=True)
            if options.eval_every and done % options.eval_every == 0 and session.rank == 0:
                evaluate(session, replicated.module, dataset, step=done)
    params = session.digest() if built else parameters_digest(replicated.module)
    return Result(steps=done, loss=loss_value, params=params)


def evaluate(session: Any, model: nn.Module, dataset: ByteWindows, *, step: int) -> float:
    """Mean loss over fixed windows; one rank does it, and tells the others' patience of it."""
    model.eval()
    with session.unhurried(EVAL_MAX_S), torch.no_grad():
        windows = [dataset[i * len(dataset) // EVAL_WINDOWS] for i in range(EVAL_WINDOWS)]
        losses = [next_byte_loss(model(x[None]), y[None]).item() for x, y in windows]
    model.train()
    loss = sum(losses) / len(losses)
    session.trace.event("evaluation", step=step, loss=loss)
    return loss


def shard(model: GPT, mesh: Any) -> None:
    """Cut a model over the ranks of a mesh: each block, and what is left over, is one unit."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def parse(argv: Sequence[str] | None = None) -> Options:
    """Read the command line. SystemExit(2) with a message when it makes no sense."""
    parser = argparse.ArgumentParser(prog="train", description="Train a byte-level GPT on text.")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in all")
    parser.add_argument("--params", choices=sorted(PRESETS), help="a model of a known size")
    parser.add_argument("--width", type=int, help="features of a position")
    parser.add_argument("--depth", type=int, help="transformer blocks")
    parser.add_argument("--heads", type=int, help="attention heads of a block")
    parser.add_argument("--context", type=int, help="bytes of a window")
    parser.add_argument("--dropout", type=float, help="0 by default")
    parser.add_argument("--slots", type=int, default=8, help="slots of the global batch")
    parser.add_argument("--slot-size", type=int, default=4, help="samples of a slot")
    parser.add_argument("--seed", type=int, default=0, help="decides parameters and samples")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--data", type=Path, help="text file or folder; else Python's library")
    parser.add_argument("--data-bytes", type=int, default=4 << 20, help="most bytes of text read")
    parser.add_argument("--threads", type=int, default=1, help="torch threads in each rank")
    parser.add_argument("--verify-every", type=int, help="steps between looks at replicas")
    parser.add_argument("--on-nan", choices=("report", "skip", "raise"), default="report")
    parser.add_argument(
        "--sharded", type=int, nargs="?", const=1, default=0, metavar="RANKS",
        help="cut the model over all ranks (FSDP2), or each copy of it over RANKS (HSDP)",
    )  # fmt: skip
    parser.add_argument("--rebalance", action="store_true", help="slots to ranks by their speed")
    parser.add_argument("--zero", action="store_true", help="cut the optimizer's state over ranks")
    parser.add_argument("--stages", action="store_true", help="a pipeline, a stage on each rank")
    parser.add_argument("--clip", type=float, default=0.0, help="longest gradient; 0 for any")
    parser.add_argument(
        "--short-handed-s", type=float, default=0.0, help="pause of a step while a seat is empty"
    )
    parser.add_argument(
        "--eval-every", type=int, default=0, metavar="STEPS", help="rank 0 evaluates; 0 for never"
    )
    parser.add_argument("--device-s", type=float, default=0.0, help="sleep for each slot")
    given = parser.parse_args(argv)

    for name in ("steps", "slots", "slot_size", "data_bytes", "threads"):
        if getattr(given, name) < 1:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} must be at least 1, got {getattr(given, name)}")
    if given.eval_every > 0 and (given.sharded or given.stages):
        parser.error(
            "--eval-every is for a model that each rank has whole: one rank evaluates alone"
        )
    if given.zero and (given.sharded or given.stages):
        parser.error("--zero is for a model that each rank has whole")
    if not given.lr > 0:
        parser.error(f"--lr must be above 0, got {given.lr}")
    shape = {
        name: value
        for name in ("width", "depth", "heads", "context", "dropout")
        if (value := getattr(given, name)) is not None
    }
    try:
        model = replace(PRESETS[given.params] if given.params else GPTConfig(), **shape)
    except ValueError as error:
        parser.error(str(error))
    return Options(
        model=model,
        steps=given.steps,
        slots=given.slots,
        slot_size=given.slot_size,
        seed=given.seed,
        learning_rate=given.lr,
        data=given.data,
        data_bytes_max=given.data_bytes,
        threads=given.threads,
        sharded=max(given.sharded, 0),
        clip=max(given.clip, 0.0),
        rebalance=given.rebalance,
        zero=given.zero,
        stages=given.stages,
        eval_every=max(given.eval_every, 0),
        verify_every=given.verify_every,
        on_nan=given.on_nan,
        short_handed_s=max(given.short_handed_s, 0.0),
        device_s=max(given.device_s, 0.0),
    )


if __name__ == "__main__":
    raise SystemExit(main())
