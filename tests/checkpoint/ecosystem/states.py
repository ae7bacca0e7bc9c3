"""State dicts with everything that makes formats differ."""

from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def everything(seed: int) -> dict[str, Any]:
    """Every common dtype, scalars, empty and strided tensors, and values of every JSON kind."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(37, 21, generator=g)
    return {
        "model": {
            "weight": weight,
            "bias": torch.randn(21, generator=g),
            "half": torch.randn(40, 60, generator=g).to(torch.bfloat16),
            "fp16": torch.randn(5, generator=g).to(torch.float16),
            "double": torch.randn(3, generator=g, dtype=torch.float64),
            **{str(d)[6:]: torch.randn(9, 3, generator=g).to(d) for d in FLOAT8},
            "strided": torch.randn(8, 6, 4, generator=g).permute(2, 0, 1)[:, ::2],
            "scalar": torch.tensor(float(seed)),
            "empty": torch.empty(0, 4),
            "bool": torch.randint(0, 2, (7,), generator=g).bool(),
            "ints": torch.randint(-9, 9, (4, 2), generator=g),
            "bytes": torch.randint(0, 255, (11,), generator=g).to(torch.uint8),
            "complex": torch.randn(4, generator=g, dtype=torch.complex64),
            "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        },
        "extra": {
            "step": seed,
            "lr": 1e-3,
            "name": "ä/b",
            "nothing": None,
            "flag": True,
            "betas": (0.9, 0.999),
            "infinite": float("inf"),
            "list": [1, 2.5, "x"],
        },
    }


def model_and_optimizer(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=seed * 1e-3)
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }


def blank(value: Any) -> Any:
    """The same tree with other contents."""
    if isinstance(value, torch.Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {k: blank(v) for k, v in value.items()}
    if isinstance(value, list) and any(isinstance(v, dict | torch.Tensor) for v in value):
        return [blank(v) for v in value]
    return "to be loaded"


def assert_equal(found: Any, wanted: Any, at: str = "") -> None:
    """Equal bit for bit: types, dtypes, shapes and the bytes of every tensor."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor), at
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), at
        assert raw(found) == raw(wanted), at
    elif isinstance(wanted, dict):
        assert isinstance(found, dict), at
        assert list(map(str, found)) == list(map(str, wanted)) or found.keys() == wanted.keys(), at
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{at}/{key}")
    elif isinstance(wanted, list | tuple):
        assert type(found) is type(wanted), at
        assert len(found) == len(wanted), at
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert_equal(a, b, f"{at}/{i}")
    else:
        assert type(found) is type(wanted), at
        assert found == wanted, at


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
