"""The quantized all-reduce between processes: same bits, two roundings, nothing lost for good."""

# mypy: allow-untyped-calls

import time
import zlib

import pytest
import torch

from ftkit.collectives.quantized import ErrorFeedback, all_reduce_quantized
from ftkit.core.errors import GenerationAborted
from ftkit.core.ids import Generation

from .crew import Crew
from .worlds import join, make_group, world

CODECS = ("int8", "fp8", "bf16")
#: Of the whole sum, for normal values: two roundings. int8 is the goal that is published.
ERROR = {"int8": 1e-2, "fp8": 4e-2, "bf16": 3e-3}
SIZES = (0, 1, 2, 255, 1000, 12_345, 1_000_003)


def values(rank, count, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randn(count, generator=generator)


def digest(tensor):
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def sums(rank, size, talk, transport):
    group, _, _ = join(rank, talk, transport)
    digests, errors = [], {}
    for codec in CODECS:
        for count in SIZES:
            mine = values(rank, count)
            kept = mine.clone()
            out = torch.empty(count)
            all_reduce_quantized(group, mine, codec=codec, op="avg", out=out).wait(20)
            assert torch.equal(mine, kept), "the input is only read"
            exact = sum(values(r, count).double() for r in range(size)) / size
            if count > 10_000:
                errors[codec] = float((out - exact).norm() / exact.norm())
                assert errors[codec] <= ERROR[codec]
            digests.append(digest(out))
            all_reduce_quantized(group, mine, codec=codec, op="avg").wait(20)
            assert torch.equal(mine, out), "in place is no different"
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        mine = values(rank, 70_001).to(dtype)
        exact = sum(values(r, 70_001).to(dtype).double() for r in range(size))
        all_reduce_quantized(group, mine.view(7, -1) if mine.numel() % 7 == 0 else mine).wait(20)
        assert float((mine.double() - exact).norm() / exact.norm()) < 1.2e-2
        digests.append(digest(mine))
    digests += spoiled(group, rank, size)
    group.barrier().wait(20)
    group.close()
    return digests, errors


def spoiled(group, rank, size):
    """A NaN of one rank and an infinity of another reach everybody, and only their blocks."""
    digests = []
    for codec in CODECS:
        mine = torch.ones(5000)
        if rank == 0:
            mine[10] = torch.nan
        if rank == size - 1:
            mine[4990] = torch.inf
        all_reduce_quantized(group, mine, codec=codec).wait(20)
        assert mine[10].isnan()
        assert not mine[4990].isfinite()
        good = mine.isfinite()
        assert int((~good).sum()) <= (2 if codec == "bf16" else 4 * 256)
        assert (mine[good] - size).abs().max() < 1e-5
        digests.append(digest(good.float()))
    return digests


@pytest.mark.multiproc
@pytest.mark.parametrize(("size", "transport"), [(2, "auto"), (3, "tcp"), (4, "auto")])
def test_all_ranks_hold_the_same_bits_within_two_roundings(size, transport):
    with Crew(sums, size, transport) as crew:
        results = crew.results()
    assert all(digests == results[0][0] for digests, _ in results)


def owing(rank, size, talk):
    group, _, _ = join(rank, talk, "auto")
    count, rounds = 3000, 64
    mine = values(rank, count)
    exact = sum(values(r, count).double() for r in range(size))
    means = {}
    for codec in ("int8", "fp8"):
        for feedback in (None, ErrorFeedback()):
            total = torch.zeros(count, dtype=torch.float64)
            for _ in range(rounds):
                out = torch.empty(count)
                all_reduce_quantized(group, mine, codec=codec, feedback=feedback, out=out).wait(20)
                total += out
            error = float((total / rounds - exact).norm() / exact.norm())
            means[codec, feedback is not None] = error
    # A NaN is not owed: the sum after it is clean.
    feedback = ErrorFeedback()
    bad = mine.clone()
    bad[5] = torch.nan
    all_reduce_quantized(group, bad, feedback=feedback).wait(20)
    again = mine.clone()
    all_reduce_quantized(group, again, feedback=feedback).wait(20)
    assert again.isfinite().all()
    group.barrier().wait(20)
    group.close()
    return means


@pytest.mark.multiproc
def test_with_error_feedback_the_mean_error_goes_to_zero():
    with Crew(owing, 3) as crew:
        for means in crew.results():
            for codec in ("int8", "fp8"):
                assert means[codec, True] < means[codec, False] / 20


def test_a_world_of_one_rounds_nothing_and_pays_what_it_owes():
    group, _ = make_group(0)
    with group:
        mine = values(0, 1001)
        out = torch.empty(1001)
        all_reduce_quantized(group, mine, codec="fp8", out=out).wait(5)
        assert torch.equal(mine, out)
        feedback = ErrorFeedback()
        feedback.residual = torch.full((1001,), 0.25)
        all_reduce_quantized(group, mine, codec="fp8", feedback=feedback, out=out).wait(5)
        assert torch.equal(out, mine + 0.25)
        assert not feedback.residual.any()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"tensor": torch.ones(3, dtype=torch.int32)}, "not torch.int32"),
        ({"tensor": torch.ones(3).to(torch.float8_e4m3fn)}, "16 bits or more"),
        ({"tensor": torch.ones(3), "op": "max"}, "a sum or an avg"),
        ({"tensor": torch.ones(3), "codec": "int4"}, "not one of"),
        ({"tensor": torch.ones(3), "out": torch.ones(4)}, "shape and dtype"),
        ({"tensor": torch.ones(3, 2).t()}, "contiguous"),
    ],
)
def test_what_cannot_work_is_refused_at_the_call(wrong, match):
    group, _ = make_group(0)
    with group, pytest.raises(ValueError, match=match):
        all_reduce_quantized(group, **wrong)


def cut(rank, size, talk):
    group, _, addresses = join(rank, talk, "tcp")
    mine = values(rank, 2_000_000)
    kept = mine.clone()
    feedback = ErrorFeedback()
    out = torch.empty_like(mine)
    all_reduce_quantized(group, mine, feedback=feedback, out=out).wait(20)
    before = digest(feedback.residual)
    if rank == size - 1:
        # The others cannot finish without it: it comes, and goes, in the middle.
        time.sleep(0.05)
        group.abort(Generation(1), "drill")
    with pytest.raises(GenerationAborted, match="drill"):
        all_reduce_quantized(group, mine, feedback=feedback, out=out).wait(20)
    assert torch.equal(mine, kept), "a failed reduction leaves the input"
    assert digest(feedback.residual) == before, "and what was owed"
    group.edit(world(2, addresses), timeout_s=20)
    all_reduce_quantized(group, mine, feedback=feedback, out=out).wait(20)
    group.barrier().wait(20)
    group.close()
    return digest(out)


@pytest.mark.multiproc
def test_an_abort_leaves_input_and_feedback_as_they_were():
    with Crew(cut, 3) as crew:
        assert len(set(crew.results())) == 1
