"""What one rank of `overlap` runs: the sides of one part, in turn. Prints one JSON line.

The line holds, for each case, the seconds of every round by side, and digests of what was computed.
"""

import argparse
import json
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks.sleeping import Sleep, play, sleeping, waiting_hook
from ftkit.collectives import backend
from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.overlap import (
    Layer,
    TrafficGovernor,
    Weave,
    context_parallel_attention,
    linear_reduce_scatter,
)
from ftkit.collectives.overlap.auto import running
from ftkit.collectives.overlap.exchange import scatter
from ftkit.collectives.overlap.traffic import LIMITS

Sides = dict[str, Callable[[], object]]

#: Calls before any is timed; and of what measures by itself, until it has settled.
WARM, TUNED_CHUNKS, TUNED_SPLIT = 2, 21, 12

#: Rounds that are run however long they take.
ROUNDS_MIN = 3

ROWS, INNER, OUTER = 1536, 1024, 1024

#: What multiplying these takes where it is emulated; and a sample of a woven layer, forward.
EMULATED_S, EMULATED_SAMPLE_S = 0.036, 0.017

#: Samples, tokens, width and layers of what is woven.
WOVEN = 4, 128, 1024, 4

#: Of a sequence, on each rank.
TOKENS = 512


def main() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("part")
    made.add_argument("--rounds", type=int)
    made.add_argument("--rate", type=float, help="of the link, in bytes a second")
    made.add_argument("--seconds", type=float, help="after which no round begins")
    options = made.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backend.register()
    config = CollectivesConfig(transport=Transport.TCP)
    limit = timedelta(seconds=120)
    dist.init_process_group("ftkit", pg_options=config, timeout=limit)
    rounds = Rounds(options.rounds, options.seconds)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "linear": lambda: linear(dist.new_group(backend="gloo", timeout=limit), rounds),
        "linear-emulated": lambda: linear_emulated(
            dist.new_group(backend="gloo", timeout=limit), rounds
        ),
        "weave": lambda: weave(rounds, lambda size: Part(WOVEN[2], 4 * WOVEN[2] // size)),
        "weave-emulated": lambda: weave(rounds, lambda size: Emulated()),
        "attention": lambda: attention(rounds, 8),
        "grouped": lambda: attention(rounds, 2),
        "traffic": lambda: traffic(rounds, options.rate),
        "ddp": lambda: ddp(rounds),
    }
    found = parts[options.part]()
    dist.destroy_process_group()
    print(json.dumps(found))


class Rounds:
    """So many rounds, or fewer where time runs out; as many on all ranks."""

    def __init__(self, count: int, seconds: float) -> None:
        self._count, self._seconds = count, seconds

    def __iter__(self) -> Iterator[int]:
        began = time.monotonic()
        for number in range(self._count):
            if number >= ROUNDS_MIN:
                took = torch.tensor([time.monotonic() - began])
                dist.all_reduce(took, dist.ReduceOp.MAX)
                if took.item() > self._seconds:
                    return
            yield number


def timed(sides: Sides, rounds: Rounds, **warm: int) -> dict[str, list[float]]:
    """Seconds of every round by side; the sides take turns, each behind a barrier.

    Before any is timed each is called a few times, or as often as `warm` says.
    """
    times: dict[str, list[float]] = {side: [] for side in sides}
    for side, run in sides.items():
        for _ in range(warm.get(side, WARM)):
            run()
    order = list(sides)
    for _ in rounds:
        for side in order:
            dist.barrier()
            began = time.perf_counter()
            sides[side]()
            times[side].append(time.perf_counter() - began)
        order = [*order[1:], order[0]]
    return times


def digest(t: torch.Tensor) -> int:
    """Of values that sum without rounding."""
    return zlib.crc32(t.detach().contiguous().view(torch.uint8).numpy().tobytes())


def linear(gloo: Any, rounds: Rounds) -> dict[str, Any]:
    """A row-parallel linear of small integers, whose sums every order of adding gives alike."""
    made = torch.Generator().manual_seed(1 + dist.get_rank())
    x = torch.randint(-3, 4, (ROWS, INNER), generator=made).float()
    weight = torch.randint(-3, 4, (OUTER, INNER), generator=made).float()
    whole = torch.empty(ROWS, OUTER)
    return scattered(
        lambda: torch.mm(x, weight.t(), out=whole),
        lambda: linear_reduce_scatter(x, weight, chunks="auto"),
        gloo,
        rounds,
    )


def linear_emulated(gloo: Any, rounds: Rounds) -> dict[str, Any]:
    """What such a linear is made of, around multiplying that sleeps."""
    whole = torch.full((ROWS, OUTER), 1.0 + dist.get_rank())

    def produce(a: int, b: int) -> torch.Tensor:
        time.sleep(EMULATED_S * (b - a) / ROWS)
        return whole[a:b].clone()

    def overlapped() -> torch.Tensor:
        with running(dist.group.WORLD, "emulated", "auto") as run:
            return scatter(
                run.flights,
                produce,
                whole.shape,
                chunks=run.cut.chunks,
                eager=run.cut.eager,
                like=whole,
            )

    return scattered(lambda: produce(0, ROWS), overlapped, gloo, rounds)


def scattered(
    compute: Callable[[], torch.Tensor],
    overlapped: Callable[[], torch.Tensor],
    gloo: Any,
    rounds: Rounds,
) -> dict[str, Any]:
    """Rows that are computed, then summed and scattered by gloo, by ftkit, and overlapped."""
    out = torch.empty(ROWS // dist.get_world_size(), OUTER)

    def over(group: Any) -> torch.Tensor:
        dist.reduce_scatter_single(out, compute(), group=group)
        return out

    sides: Sides = {
        "compute": compute,
        "gloo": lambda: over(gloo),
        "ftkit": lambda: over(None),
        "overlapped": overlapped,
    }
    digests = {s: digest(cast("torch.Tensor", sides[s]())) for s in sides if s != "compute"}
    return {
        "times": timed(sides, rounds, overlapped=TUNED_CHUNKS),
        "digests": digests,
        "sent": out.nbytes,
    }


class Part(nn.Module):
    """An MLP's part on this rank."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden, False), nn.Linear(hidden, width, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.down(functional.gelu(self.up(x))))


class Emulated(nn.Module):
    """A layer whose computing sleeps: so much for each sample, and twice as much in backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seconds = EMULATED_SAMPLE_S * x.shape[0]
        return cast("torch.Tensor", Sleep.apply(x, seconds, 2 * seconds))


def weave(rounds: Rounds, part: Callable[[int], nn.Module]) -> dict[str, Any]:
    """Layers as wide as small models', forward and backward: whole, in halves, and as it chooses."""
    size, (batch, tokens, width, depth) = dist.get_world_size(), WOVEN
    layers = [Layer(torch.ones(width), part(size)) for _ in range(depth)]
    x = torch.randn(batch, tokens, width)
    models = {s: Weave(layers, split=v) for s, v in (("whole", False), ("halves", True))}
    models["auto"] = Weave(layers, split="auto")

    def run(model: Weave) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        y = cast("torch.Tensor", model(leaf))
        y.square().mean().backward()
        assert leaf.grad is not None
        return leaf.grad

    def compute() -> None:
        leaf = x.clone().requires_grad_()
        y = leaf
        for layer in layers:
            y = y + layer.body(functional.rms_norm(y, (width,), layer.weight))
        y.square().mean().backward()

    sides: Sides = {"compute": compute}
    grads = {}
    for side, model in models.items():
        sides[side] = partial(run, model)
        grads[side] = run(model)
    off = max((grads[s] - grads["whole"]).abs().max().item() for s in grads)
    scale = grads["whole"].abs().max().item()
    # Around each layer a scatter and a gather, forward and backward.
    sent = 4 * depth * x.nbytes * (size - 1) // size
    return {"times": timed(sides, rounds, auto=TUNED_SPLIT), "error": off / scale, "sent": sent}


def attention(rounds: Rounds, kv_heads: int) -> dict[str, Any]:
    """Forward and backward of causal attention by each route, communication-bound."""
    q = torch.randn(1, 8, TOKENS, 64)
    k, v = (torch.randn(1, kv_heads, TOKENS, 64) for _ in "kv")
    results = {}

    def run(rotate: Any) -> torch.Tensor:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = context_parallel_attention(*leaves, is_causal=True, rotate=rotate)
        out.sum().backward()
        assert leaves[1].grad is not None
        return torch.cat([out.detach().flatten(), leaves[1].grad.flatten()])

    sides: Sides = {}
    # Rotating queries moves four times as much where heads are grouped.
    routes = ("kv", "allgather", "auto") if kv_heads < 8 else ("kv", "allgather", "query", "auto")
    for rotate in routes:
        sides[rotate] = partial(run, rotate)
        results[rotate] = run(rotate)
    off = max((r - results["kv"]).abs().max().item() for r in results.values())
    return {"times": timed(sides, rounds), "error": off / results["kv"].abs().max().item()}


def train(model: nn.Module) -> None:
    play(model)
    for p in model.parameters():
        p.grad = None


def ddp(rounds: Rounds) -> dict[str, Any]:
    """A step of DDP: plain; with a vote; with a hook that waits."""
    plain, voting, waiting = sleeping(), sleeping(), sleeping()
    waiting.register_comm_hook(None, waiting_hook)

    def vote() -> None:
        train(voting)
        dist.all_reduce(torch.ones(1))

    sides: Sides = {"plain": lambda: train(plain), "vote": vote, "wait": lambda: train(waiting)}
    return {"times": timed(sides, rounds)}


def traffic(rounds: Rounds, rate: float) -> dict[str, Any]:
    """Twelve steps of DDP beside a snapshot to the peer, sent in each way."""
    steps, nbytes = 12, 72 << 20
    peer = (dist.get_rank() + 1) % dist.get_world_size()
    model = sleeping()
    governor = TrafficGovernor(limits=replace(LIMITS, rate_guess=rate, max_slowdown=0.005))
    governor.attach(model)
    snapshot = torch.full((nbytes,), dist.get_rank(), dtype=torch.uint8)
    copy = torch.empty_like(snapshot)
    aside_s: dict[str, list[float]] = {"blast": [], "governed": []}

    def several(mode: str) -> None:
        threads: list[threading.Thread] = []
        began = time.perf_counter()

        def note(act: Callable[[], object]) -> None:
            act()
            aside_s[mode].append(time.perf_counter() - began)

        for number in range(steps):
            if number == 1 and mode in ("blast", "block"):
                came = cast("dist.Work", dist.irecv(copy, peer))
                dist.isend(snapshot, peer)
                if mode == "block":
                    came.wait()
            if number == 1 and mode == "governed":
                acts = (lambda: governor.recv(copy, peer), lambda: governor.send(snapshot, peer))
                threads = [threading.Thread(target=note, args=(act,)) for act in acts]
                for thread in threads:
                    thread.start()
            train(model)
        ended.append(time.perf_counter() - began)
        if mode == "blast":
            came.wait()
        for thread in threads:
            thread.join()
        assert mode == "none" or bool((copy == peer).all())

    times: dict[str, list[float]] = {mode: [] for mode in ("none", "block", "blast", "governed")}
    ended: list[float] = []
    for _ in range(3):
        train(model)
    for _ in rounds:
        for mode, found in times.items():
            dist.barrier()
            copy.zero_()
            several(mode)
            found.append(ended.pop())
    return {
        "times": times,
        "took": aside_s["governed"],
        "bytes": nbytes,
        "idle_share": governor.idle_share,
        "forecast": str(governor.forecast(nbytes, within_s=steps * times["none"][0] / steps)),
    }


if __name__ == "__main__":
    main()
