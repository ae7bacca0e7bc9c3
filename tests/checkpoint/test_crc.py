"""CRC-32C: known values, every engine, any memory."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint import crc, isal
from ftkit.checkpoint.crc import crc32c, portable, with_isal
from ftkit.checkpoint.raw import Memory, flat

LIBRARY = isal.load()
ENGINES = [portable, *([with_isal(LIBRARY)] if LIBRARY else [])]


@pytest.fixture
def choose_again():
    crc._chosen.cache_clear()
    yield
    crc._chosen.cache_clear()


def reference(data: bytes) -> int:
    """Bit by bit, as RFC 3720 defines it."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("data", "value"),
    [  # RFC 3720, B.4, and the check value that every catalogue gives
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_known_values(engine, data, value):
    assert engine(flat(data), 0) == value
    assert crc32c(data) == value


@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_cut_and_any_engine_give_the_reference(data, cut):
    value = reference(data)
    for engine in ENGINES:
        assert engine(flat(data[cut:]), engine(flat(data[:cut]), 0)) == value
    assert crc32c(data[cut:], crc32c(data[:cut])) == value


def test_it_is_zarrs(tmp_path):
    import zarr
    from zarr.codecs import Crc32cCodec

    data = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8)
    zarr.create_array(
        store=tmp_path / "a", data=data, chunks=data.shape, compressors=[Crc32cCodec()]
    )
    chunk = (tmp_path / "a" / "c" / "0").read_bytes()
    assert len(chunk) == data.nbytes + 4
    assert chunk[-4:] == crc32c(data).to_bytes(4, "little")
    assert portable(data, 0) == crc32c(data)  # in more than one piece


def test_any_memory():
    words = np.arange(100, dtype=np.float32).reshape(4, 25)
    expected = crc32c(words.tobytes())
    read_only = words.copy()
    read_only.flags.writeable = False
    same: Memory
    for same in (words, bytearray(words.tobytes()), memoryview(words.data), read_only):
        assert crc32c(same) == expected
    for engine in ENGINES:
        assert engine(flat(read_only), 0) == expected
        assert engine(flat(bytearray(words.tobytes()))[3:], 0) == crc32c(words.tobytes()[3:])


def test_what_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        crc32c(np.zeros((4, 4))[:, 1])
    for seed in (-1, 1 << 32):
        with pytest.raises(ValueError, match="seed"):
            crc32c(b"", seed)


def test_without_isal_the_value_is_the_same(monkeypatch, choose_again):
    monkeypatch.setattr(crc, "load", lambda: None)
    assert crc32c(b"123456789") == 0xE3069283


def test_an_isal_that_computes_nonsense_is_not_used_and_said_once(
    monkeypatch, choose_again, caplog
):
    class Broken:
        path = "libisal-broken.so"

        def crc32_iscsi(self, at: int, count: int, register: int) -> int:
            return 42

    monkeypatch.setattr(crc, "load", Broken)
    with caplog.at_level(logging.WARNING):
        assert crc32c(b"123456789") == 0xE3069283
        assert crc32c(b"123456789") == 0xE3069283
    assert [r.message for r in caplog.records if "libisal-broken.so" in r.message] == [
        "libisal-broken.so computes a wrong CRC-32C here; google-crc32c does it instead"
    ]
