"""The toy that ftkit, torchft and plain DDP all train in `against_torchft`; needs only torch.

An MLP of 4 layers of 256 on random numbers; every replica has one block of the data a step.
What each framework's script prints is one JSON object a line: `commit` with `step` and `mono`
(monotonic seconds) when a step has been applied, `kill` just before SIGKILL, `final` with a
digest of the parameters.
"""

import hashlib
import json
import time

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

WIDTH, DEPTH, BLOCKS = 256, 4, 512

#: With three times as much, 240 steps of 512 rows make 1e-3 of the norm out of sums in another order: no
#: two tools could be told to have trained the same.
LEARNING_RATE = 3e-4


def build() -> nn.Module:
    """The same model in every process: float32, one torch thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(*layers)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, the same everywhere."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False, fused=False)


def loss_of(model: nn.Module, block: Tensor) -> Tensor:
    """A scalar to descend: the model learns to reproduce its input."""
    loss: Tensor = (model(block) - block).square().mean()
    return loss


class Noise(Dataset[Tensor]):
    """Blocks of random numbers, float32, shape (rows, WIDTH); block i never changes."""

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self._rows = torch.randn(rows + BLOCKS, WIDTH, generator=generator)
        self._count = rows

    def __len__(self) -> int:
        return BLOCKS

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < BLOCKS:
            raise IndexError(f"block {index} of {BLOCKS}")
        return self._rows[index : index + self._count]


def note(kind: str, **fields: object) -> None:
    """Print one event, at once."""
    print(json.dumps({"kind": kind, "mono": time.monotonic()} | fields), flush=True)


def digest(model: nn.Module) -> str:
    """SHA-256 (hex) of all parameters' bytes."""
    hasher = hashlib.sha256()
    for parameter in model.parameters():
        hasher.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()
