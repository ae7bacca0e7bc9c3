"""The codecs alone: bounds on the error, odd sizes, and what becomes of what is no number."""

# mypy: allow-untyped-calls

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftkit.collectives.block_codec import BLOCK, CODECS, codec_named, convert

names = st.sampled_from(sorted(CODECS))
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def vectors(draw, elements=floats):
    """Up to a few blocks, with magnitudes that differ from block to block."""
    count = draw(st.integers(0, 3 * BLOCK + 1))
    few = draw(st.lists(elements, min_size=1, max_size=8))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.choice(np.asarray(few, dtype=np.float32), size=count))


def coded(name, values):
    codec = codec_named(name)
    out = torch.empty(codec.nbytes(values.numel()), dtype=torch.uint8)
    codec.encode(values, out)
    return out


def through(name, values):
    out = torch.empty(values.numel())
    codec_named(name).decode(coded(name, values), out)
    return out


def bound(name, values):
    """The largest error the table in the module allows for each value, and float rounding."""
    exact = values.double()
    tops = torch.cat(
        [b.abs().amax().expand(b.numel()) for b in exact.split(BLOCK)] if exact.numel() else [exact]
    )
    by_codec = {
        "int8": tops / 254,
        "fp8": torch.maximum(exact.abs() / 16, tops / 458752),
        "bf16": exact.abs() / 256,
    }
    return by_codec[name] * (1 + 1e-5) + 1e-37


@given(name=names, values=vectors())
def test_no_value_moves_further_than_stated(name, values):
    got = through(name, values).double()
    if name == "bf16":  # near the end of float32 it rounds up to infinity, as a cast does
        got[got.isinf()] = values.double()[got.isinf()]
    assert ((got - values.double()).abs() <= bound(name, values)).all()


@given(
    name=names,
    values=vectors(st.sampled_from([0.5, -3.0, 1e30, float("nan"), float("inf"), -float("inf")])),
)
def test_what_is_not_finite_never_becomes_a_number_and_spoils_at_most_its_block(name, values):
    got = through(name, values)
    for before, after in zip(values.split(BLOCK), got.split(BLOCK), strict=True):
        if name == "bf16":
            assert torch.equal(before.isnan(), after.isnan())
            assert torch.equal(before.isinf(), after.isinf())
        elif before.isfinite().all():
            assert after.isfinite().all()
        else:
            assert after.isnan().all()


@given(name=names, values=vectors(), more=vectors())
def test_add_is_decode_and_one_addition(name, values, more):
    count = min(values.numel(), more.numel())
    acc = more[:count].clone()
    codec_named(name).decode(coded(name, values[:count]), acc, add=True)
    want = more[:count] + through(name, values[:count])
    assert torch.equal(acc.nan_to_num(1.0), want.nan_to_num(1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(CODECS))
def test_other_dtypes_code_to_the_bytes_of_their_float32(name, dtype):
    values = torch.linspace(-3, 5, 1001, dtype=torch.float64).to(dtype)
    assert torch.equal(coded(name, values), coded(name, values.float()))


@pytest.mark.parametrize("name", sorted(CODECS))
@pytest.mark.parametrize("count", [1, 255, 256, 257, 127 * 256 + 1, 300_001])
def test_neither_torchs_pool_nor_the_size_changes_a_bit(name, count):
    torch.manual_seed(count)
    values = torch.randn(count)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, back = coded(name, values), through(name, values)
        torch.set_num_threads(2)
        assert torch.equal(coded(name, values), alone)
        assert torch.equal(through(name, values), back)
    finally:
        torch.set_num_threads(before)
    if count % BLOCK == 0:
        assert alone.numel() <= 2 * count + 4 * count // BLOCK


def test_int8_errs_less_than_fp8_on_ordinary_values():
    torch.manual_seed(0)
    values = torch.randn(1 << 16)

    def error(name):
        return float((through(name, values) - values).norm() / values.norm())

    assert error("bf16") < 2e-3
    assert 5e-3 < error("int8") < 8e-3
    assert 2e-2 < error("fp8") < 4e-2


@settings(max_examples=20)
@given(values=vectors())
def test_convert_rounds_once(values):
    out = torch.empty(values.numel(), dtype=torch.float16)
    convert(values, out)
    assert torch.equal(out, values.half())


def test_an_unknown_codec_is_named():
    with pytest.raises(ValueError, match=r"'int4' is not one of int8, fp8, bf16"):
        codec_named("int4")
