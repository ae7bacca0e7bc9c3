"""The Triton kernel, in Triton's interpreter, against torch. Skipped where Triton is not installed.

The interpreter runs program after program, so it finds no races, and no access out of bounds; and
it decides when a kernel is decorated, which is why this has a process of its own.
"""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs ftkit[triton]"),
]

SCRIPT = """
import torch
from torch.nn import functional
from ftkit.collectives.overlap.norm_triton import add_rms_norm

made = torch.Generator().manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
    for rows, width in ((5, 33), (1, 64), (3, 1000), (0, 8)):
        x, residual = (torch.randn(rows, width, generator=made).to(dtype) for _ in range(2))
        weight = torch.randn(width, generator=made).to(dtype)
        y, total = add_rms_norm(x, residual, weight, 1e-6)
        kept = (x.float() + residual.float()).to(dtype)
        # The interpreter cuts what a GPU rounds.
        torch.testing.assert_close(total, kept, rtol=tolerance, atol=tolerance)
        wanted = functional.rms_norm(total.float(), (width,), weight.float(), 1e-6)
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), wanted, rtol=tolerance, atol=tolerance)
"""

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ftkit.collectives.overlap.norm_triton import add_rms_norm_kernel

pointers = {f"{n}_ptr": "*bf16" for n in ("x", "residual", "weight", "y", "total")}
signature = pointers | {"width": "i32", "eps": "fp32", "BLOCK": "constexpr"}
source = ASTSource(
    add_rms_norm_kernel,
    signature,
    constexprs={(7,): 4096},
    attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},
)
for capability in (80, 90, 100):
    binary = compile(source, target=GPUTarget("cuda", capability, 32)).asm
    assert binary["cubin"]
    assert "ld.global.v4" in binary["ptx"], "elements must be read four words at a time"
"""


def run(script: str, **more: str) -> None:
    path = os.pathsep.join(sys.path)
    env = {**os.environ, "PYTHONPATH": path, **more}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_kernel_is_torchs_add_and_norm() -> None:
    run(SCRIPT, TRITON_INTERPRET="1")


def test_it_compiles_for_gpus_that_are_not_here(tmp_path: object) -> None:
    run(COMPILE, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_the_same() -> None:
    run(SCRIPT.replace("generator=made)", 'generator=made).to("cuda")'))
