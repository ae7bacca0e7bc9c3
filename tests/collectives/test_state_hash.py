"""A hash depends on the elements and on nothing else."""

import pytest
import torch
import xxhash

from ftkit.collectives import state_hash
from ftkit.collectives.state_hash import hash_of, layout_of


def values(*shape, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=g).to(dtype)


def test_it_is_xxh3_of_the_bytes_in_row_major_order():
    t = values(5, 7)
    assert hash_of(t) == xxhash.xxh3_64_intdigest(t.numpy().tobytes())


@pytest.mark.parametrize("block", [16, 64, 1 << 20])
def test_strides_do_not_matter(block, monkeypatch):
    monkeypatch.setattr(state_hash, "BLOCK_BYTES", block)
    for t in (values(6, 4, 5, 3), values(1, 9), values(40), values(3, 1, 2)):
        wanted = hash_of(t.clone(memory_format=torch.contiguous_format))
        assert hash_of(t.transpose(0, -1).contiguous().transpose(0, -1)) == wanted
        spread = torch.zeros(*t.shape, 2)
        spread[..., 1] = t
        assert hash_of(spread[..., 1]) == wanted
    channels_last = values(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert hash_of(channels_last) == hash_of(channels_last.contiguous())
    row = values(5)
    assert hash_of(row.expand(4, 5)) == hash_of(row.repeat(4, 1))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int8, torch.float8_e4m3fn]
)
def test_every_bit_of_every_dtype_counts(dtype):
    t = values(33, dtype=dtype)
    seen = {hash_of(t)}
    raw = t.view(torch.uint8)
    for at in range(0, raw.numel(), 7):
        for bit in (1, 128) if dtype is not torch.bool else (1,):
            raw[at] ^= bit
            seen.add(hash_of(t))
            raw[at] ^= bit
    assert len(seen) == 1 + len(range(0, raw.numel(), 7)) * (1 if dtype is torch.bool else 2)


def test_two_zeros_that_change_their_sign_are_seen():
    t = torch.zeros(64)
    before = hash_of(t)
    t[1], t[3] = -0.0, -0.0  # in a sum of 64-bit words these would cancel
    assert hash_of(t) != before


def test_scalars_empty_ones_views_and_parameters():
    assert hash_of(torch.tensor(2.0)) == hash_of(torch.tensor([2.0]))
    assert hash_of(torch.empty(0, 3)) == hash_of(torch.empty(0))
    z = torch.randn(4, dtype=torch.complex64)
    assert hash_of(z.conj()) == hash_of(z.conj().resolve_conj().clone())
    assert hash_of(torch.nn.Parameter(values(3))) == hash_of(values(3))


def test_what_has_no_bytes_in_order_is_refused():
    with pytest.raises(ValueError, match="sparse"):
        hash_of(torch.eye(3).to_sparse())


def test_names_dtypes_and_shapes_make_the_layout():
    base = {"a": torch.zeros(2, 3)}
    same = {"a": torch.ones(3, 2).t()}
    assert layout_of(base) == layout_of(same)
    for other in (
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {},
    ):
        assert layout_of(other) != layout_of(base)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_hashes_alike():
    t = values(300, 1000)
    assert hash_of(t.cuda()) == hash_of(t)
    assert hash_of(t.cuda().t()) == hash_of(t.t())
