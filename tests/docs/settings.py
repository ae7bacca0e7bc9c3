"""What a reader has who copies a block of Python from a page: the names that it takes for granted.

A setting is a generator in a process of its own: it gives the names, the block is executed with
them, and what it made of them is looked at. Settings stand by page, in the order of the blocks.
"""

# mypy: allow-untyped-calls

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import ftkit
from tests.collectives.worlds import join
from tests.session.alone import Points, learn

Names = dict[str, Any]


class Place(NamedTuple):
    """Where a block is executed."""

    rank: int
    size: int
    talk: Any
    """To the other processes: see tests/collectives/crew.py."""
    folder: Path
    """One for all of them, and the current directory."""


Setting = Callable[[Place], Iterator[Names]]


def process_group(place: Place) -> None:
    from ftkit.collectives.backend import register

    register()
    store = dist.FileStore(str(place.folder / "store"), place.size)  # type: ignore[attr-defined]  # public, but not listed
    dist.init_process_group("ftkit", store=store, rank=place.rank, world_size=place.size)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def common() -> Names:
    return {"ftkit": ftkit, "torch": torch, "dist": dist, "dataset": Points()}


class Batches:
    """A loader: two samples a batch."""

    def __iter__(self) -> Iterator[Any]:
        points = Points()
        for first in range(0, len(points), 2):
            samples = [points[i] for i in (first, first + 1)]
            yield tuple(torch.stack(column) for column in zip(*samples, strict=True))


class Played:
    """A session whose steps are played before the block sees them: what its `...` leaves out."""

    def __init__(self) -> None:
        self.session = ftkit.init()
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.session.protect(model=self.model, optimizer=self.optimizer)

    def steps(self, data: Any, **options: Any) -> Iterator[Any]:
        for step in self.session.steps(data, **options):
            with step:
                learn(self.model, step)
                self.optimizer.step()
                self.optimizer.zero_grad()
            yield step


def quickstart(place: Place) -> Iterator[Names]:
    names = common() | {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "build_model": net,
        "loss_fn": functional.mse_loss,
    }
    yield names
    assert names["step"].committed
    assert names["step"].index == 3
    assert names["found"].damaged == ()


def standalone(place: Place) -> Iterator[Names]:
    model = net()
    names: Names = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "step": 7}
    yield names
    assert names["step"] == 7
    assert list((place.folder / "ck").glob("step-7"))


def stream(place: Place) -> Iterator[Names]:
    (place.folder / "tokens.bin").write_bytes(bytes(range(160)))

    def decode(raw: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.tensor(list(raw), dtype=torch.float32).view(-1, 2) / 160
        return x, x.sum(1, keepdim=True)

    names: Names = {"BYTES": 8, "decode": decode, "session": Played()}
    yield names
    assert names["step"].committed
    assert names["step"].index == 3


def numbers(place: Place) -> Iterator[Names]:
    names: Names = {"session": Played(), "data": Batches()}
    yield names
    assert names["step"].committed


def approximate(place: Place) -> Iterator[Names]:
    yield {"session": ftkit.init(), "build": lambda mesh: None}


def swapped(place: Place) -> Iterator[Names]:
    """On the one rank that is left of four."""

    class Stage(nn.Module):
        def __init__(self, held: range) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({str(i): nn.Linear(2, 1 if i == 5 else 2) for i in held})

    class Left(ftkit.Session):
        seats = 4

    session = ftkit.init()
    session.__class__ = Left
    names = common() | {"session": session, "Stage": Stage, "COSTS": [0.5, 1, 1, 1, 1, 0.5]}
    yield names | {"SLOT_SIZE": 2, "WIDTH": 2, "loss_fn": functional.mse_loss}


def sharded(place: Place) -> Iterator[Names]:
    from torch.distributed.fsdp import fully_shard

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
            self.head = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            y: torch.Tensor = self.head(x)
            return y

    torch.use_deterministic_algorithms(mode=True)
    names = common() | {"Net": Net, "fully_shard": fully_shard, "loss_fn": functional.mse_loss}
    yield names
    assert names["step"].committed
    assert names["step"].index == 3


def pipeline(place: Place) -> Iterator[Names]:
    class Stage(nn.Module):
        def __init__(self, held: range) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({str(i): nn.Linear(2, 2) for i in held})

    class Schedule:
        """Stands for Schedule1F1B: plays all slots through the only stage."""

        def step(self, _: object) -> None:
            step, model = names["step"], names["session"].model
            for slot, (x, _y) in enumerate(names["batches"]):
                y = x
                for index, module in model.layers.items():
                    y = step.layer(int(index), module, y, slot=slot)
                loss = y.square().mean()
                loss.backward()
                if slot:
                    step.record(loss, slot=slot)
                else:  # it is the block that records this one
                    names["loss"], names["slot"] = loss, slot

    names = common() | {"session": ftkit.init(), "Stage": Stage, "schedule": Schedule()}
    yield names
    assert names["step"].committed
    assert len(names["session"].model.layers) == len(names["COSTS"])


def shared_state(place: Place) -> Iterator[Names]:
    from ftkit.collectives.shared_state import SharedState
    from ftkit.collectives.state_vote import Strategy

    group, _, _ = join(place.rank, place.talk)
    newcomer = place.rank == place.size - 1
    w = torch.full((5,), 9.0 if newcomer else 1.0)
    names: Names = {
        "SharedState": SharedState,
        "Strategy": Strategy,
        "group": group,
        "newcomer": newcomer,
        "w": w,
        "m": torch.zeros(3),
    }
    yield names
    assert w.eq(1).all()
    group.close()


def quantized(place: Place) -> Iterator[Names]:
    process_group(place)
    tensor = torch.full((300,), float(place.rank))
    yield {"group": dist.group.WORLD, "tensor": tensor}
    assert torch.allclose(tensor, torch.full((300,), (place.size - 1) / 2), rtol=0.02)


def hook(place: Place) -> Iterator[Names]:
    process_group(place)
    model = net()
    names: Names = {
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
        "dist": dist,
        "model": model,
    }
    yield names
    names["ddp"](torch.full((1, 2), 1.0 + place.rank)).sum().backward()
    gradients = [p.grad.tolist() for p in model.parameters() if p.grad is not None]
    told = place.talk.everyone(gradients)
    assert gradients
    assert all(t == gradients for t in told)


def diloco(place: Place) -> Iterator[Names]:
    group, faults, _ = join(place.rank, place.talk)
    model = net()
    points = [Points()[i] for i in range(place.rank, 16, 4)]

    def repair() -> None:
        raise AssertionError(f"nothing should fail here: {faults}")

    names: Names = {
        "model": model,
        "group": group,
        "repair": repair,
        "phase": lambda rounds: points,
        "loss_fn": lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
    }
    yield names
    assert names["diloco"].rounds == 3
    group.close()


def governed(place: Place) -> Iterator[Names]:
    from ftkit.collectives.overlap import TrafficGovernor

    process_group(place)
    ddp = nn.parallel.DistributedDataParallel(net())
    peer = 1 - place.rank
    names: Names = {
        "TrafficGovernor": TrafficGovernor,
        "Thread": Thread,
        "ddp": ddp,
        "peer": peer,
        "snapshot": torch.full((5000,), place.rank, dtype=torch.uint8),
    }
    yield names
    into = torch.empty(5000, dtype=torch.uint8)
    names["governor"].recv(into, peer)
    assert into.eq(peer).all()
    place.talk.everyone(None)


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(functional.gelu(self.up(x)))
        return y


def linear(place: Place) -> Iterator[Names]:
    process_group(place)
    block = Feed()
    whole = torch.arange(24.0).view(6, 4) / 24
    ours = whole.chunk(place.size)[place.rank]
    names: Names = {"block": block, "gelu": functional.gelu, "x": ours}
    yield names
    assert torch.allclose(names["y"], block(ours), atol=1e-5)
    place.talk.everyone(None)


def styled(place: Place) -> Iterator[Names]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    process_group(place)
    block, x = Feed(), torch.arange(24.0).view(6, 4) / 24
    expected = block(x)
    mesh = init_device_mesh("cpu", (place.size,))
    yield {"parallelize_module": parallelize_module, "block": block, "mesh": mesh}
    assert torch.allclose(block(x), expected, atol=1e-5)
    place.talk.everyone(None)


def context(place: Place) -> Iterator[Names]:
    process_group(place)
    torch.manual_seed(0)
    into = nn.Embedding(16, 8)

    def model(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert positions.shape[-1] == tokens.shape[1]
        x = into(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
        y = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        return y.transpose(1, 2).flatten(2)

    tokens = torch.arange(64).remainder(16)[None]
    whole = model(tokens, torch.arange(64))
    names: Names = {"model": model, "tokens": tokens}
    yield names
    positions = names["context"].positions
    assert torch.allclose(names["logits"], whole[:, positions], atol=1e-5)
    place.talk.everyone(None)


def woven(place: Place) -> Iterator[Names]:
    process_group(place)
    torch.manual_seed(0)
    blocks = [(nn.RMSNorm(4), Feed()) for _ in range(2)]
    names: Names = {"blocks": blocks, "x": torch.arange(48.0).view(2, 6, 4) / 48}
    yield names
    assert names["y"].shape == names["x"].shape
    assert names["y"].isfinite().all()
    place.talk.everyone(None)


def offloaded(place: Place) -> Iterator[Names]:
    torch.manual_seed(0)
    blocks: list[nn.Module] = [nn.Sequential(nn.RMSNorm(4), Feed()) for _ in range(3)]
    x = torch.arange(48.0).view(2, 6, 4) / 48

    def gradients() -> list[torch.Tensor]:
        return [p.grad.clone() for b in blocks for p in b.parameters() if p.grad is not None]

    y = x
    for block in blocks:
        y = block(y)
    y.square().mean().backward()
    expected = gradients()
    for block in blocks:
        block.zero_grad()
    yield {"blocks": blocks, "x": x, "loss": lambda y: y.square().mean()}
    assert expected
    assert all(map(torch.equal, gradients(), expected))


def left_out(place: Place) -> Iterator[Names]:
    from ftkit.collectives.backend import register

    register()
    yield {"dist": dist}
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == place.size


def ray_trainer(place: Place) -> Iterator[Names]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    names: Names = {
        "train": lambda config: None,
        "TorchTrainer": TorchTrainer,
        "ScalingConfig": ScalingConfig,
        "RunConfig": RunConfig,
        "FailureConfig": FailureConfig,
    }
    yield names
    assert names["trainer"] is not None


#: By page, for each of its scripts: the setting, and how many processes execute it.
SETTINGS: dict[str, list[tuple[Setting, int]]] = {
    "quickstart": [(quickstart, 1)],
    "approximate": [(approximate, 1), (swapped, 1)],
    "architecture": [(shared_state, 3)],
    "checkpoints": [(standalone, 1)],
    "data": [(stream, 1)],
    "frameworks": [(ray_trainer, 1)],
    "low-communication": [(quantized, 2), (hook, 2), (diloco, 2)],
    "numbers": [(numbers, 1)],
    "overlap": [(governed, 2), (linear, 2), (styled, 2), (context, 2), (woven, 2), (offloaded, 1)],
    "pipelines": [(pipeline, 1)],
    "process-group": [(left_out, 2)],
    "sharded": [(sharded, 1), (sharded, 1)],
}
#: What a page shows that is too long, or elsewhere, for a test.
SMALLER = {
    "until=10_000": "until=3",
    "diloco.rounds < 1000": "diloco.rounds < 3",
    "% 500 == 0": "% 1 == 0",
    "length=8192": "length=64",
    '"/data/': '"',
    '"/shared/': '"',
}
