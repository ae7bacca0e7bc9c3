"""The codec: any k shards give all others, on any memory, with the same bytes by any engine."""

import ctypes
import itertools
import logging
import mmap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint import erasure, isal
from ftkit.checkpoint.erasure import Codec, Engine, best_engine
from ftkit.checkpoint.galois import generator, inverse, multiply, recipe
from ftkit.checkpoint.planes import BLOCK_BYTES
from ftkit.checkpoint.raw import Memory, flat
from ftkit.core.errors import IntegrityError, UsageError

LIBRARY = isal.load()
ENGINES = [Engine.NUMPY, *([Engine.ISAL] if LIBRARY else [])]
CODES = [(k, m) for k in range(1, 9) for m in range(1, 5)]


@pytest.fixture
def choose_again():
    def clear():
        erasure._engines.cache_clear()
        best_engine.cache_clear()

    clear()
    yield
    clear()


def random_bytes(seed: int, count: int) -> bytearray:
    return bytearray(np.random.default_rng(seed).bytes(count))


def reference(k: int, m: int, data: list[bytearray], length: int) -> list[bytes]:
    """Parity by the definition, one byte at a time."""
    code = generator(k, m)
    parity = list[bytes]()
    for row in code:
        shard = bytearray(length)
        for coefficient, source in zip(row, data, strict=True):
            for at, value in enumerate(source):
                shard[at] ^= multiply(coefficient, value)
        parity.append(bytes(shard))
    return parity


def test_the_field():
    for a in range(1, 256):
        assert multiply(a, inverse(a)) == 1
        assert multiply(a, 1) == a
        # Doubling by its definition fixes the polynomial, and with it the format.
        assert multiply(a, 2) == (a << 1) ^ (0x11D if a & 0x80 else 0)
    for a, b, c in itertools.product((0, 3, 77, 255), repeat=3):
        assert multiply(a, multiply(b, c)) == multiply(multiply(a, b), c)
        assert multiply(a, b ^ c) == multiply(a, b) ^ multiply(a, c)
    with pytest.raises(ZeroDivisionError):
        inverse(0)


def test_the_matrices_are_the_published_ones():
    assert generator(4, 1) == ((1, 1, 1, 1),)
    assert generator(10, 2)[1][:10] == (1, 2, 4, 8, 16, 32, 64, 128, 29, 58)
    assert generator(4, 3)[0] == tuple(inverse(4 ^ j) for j in range(4))


@pytest.mark.skipif(LIBRARY is None, reason="no ISA-L here")
def test_the_matrices_are_those_of_isal():
    assert LIBRARY is not None
    library = ctypes.CDLL(LIBRARY.path)
    for k, m in ((5, 2), (6, 3), (8, 4)):
        matrix = (ctypes.c_ubyte * ((k + m) * k))()
        make = library.gf_gen_rs_matrix if m == 2 else library.gf_gen_cauchy1_matrix
        make.restype = None
        make(matrix, k + m, k)
        assert bytes(matrix)[k * k :] == bytes(v for row in generator(k, m) for v in row)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 3), (5, 2), (6, 3), (4, 4)])
def test_every_loss_has_a_recipe_and_it_is_right(k, m):
    identity = [[int(i == j) for j in range(k)] for i in range(k)]
    whole = [*identity, *generator(k, m)]
    for have in itertools.combinations(range(k + m), k):
        lost = [i for i in range(k + m) if i not in have]
        read, matrix = recipe(k, m, have, lost)
        assert sorted(read) == sorted(have)
        for shard, row in zip(lost, matrix, strict=True):
            total = [0] * k
            for coefficient, source in zip(row, read, strict=True):
                total = [
                    t ^ multiply(coefficient, v) for t, v in zip(total, whole[source], strict=True)
                ]
            assert total == list(whole[shard]), (have, shard)


@pytest.mark.parametrize("engine", ENGINES)
@given(
    code=st.sampled_from([*CODES, (12, 2), (9, 5)]),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_any_loss_is_rebuilt_and_parity_is_the_definition(engine, code, seed, data):
    k, m = code
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=k, max_size=k))
    stripe = max(lengths) + data.draw(st.sampled_from([0, 0, 9]))
    shards = [random_bytes(seed + i, n) for i, n in enumerate(lengths)]
    parity = [random_bytes(seed + k + i, stripe) for i in range(m)]
    codec = Codec(k, m, engine)
    codec.encode(shards, parity)
    assert [bytes(p) for p in parity] == reference(k, m, shards, stripe)

    whole = [bytes(s) for s in (*shards, *parity)]
    gone = data.draw(st.sets(st.integers(0, k + m - 1), max_size=m))
    lost = {i: random_bytes(seed ^ i, len(whole[i])) for i in gone}
    codec.rebuild({i: s for i, s in enumerate(whole) if i not in gone}, lost)
    assert {i: bytes(s) for i, s in lost.items()} == {i: whole[i] for i in gone}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("k", "m"), [(3, 1), (4, 2), (5, 3)])
def test_blocks_join_without_a_seam(monkeypatch, engine, k, m):
    monkeypatch.setattr(isal.Tables, "BLOCK_BYTES", BLOCK_BYTES)
    length = 4 * BLOCK_BYTES + 1
    data = [random_bytes(i, length - i * 1000) for i in range(k)]
    parity = [bytearray(length) for _ in range(m)]
    Codec(k, m, engine).encode(data, parity)
    other = [bytearray(length) for _ in range(m)]
    Codec(k, m, Engine.NUMPY).encode(data, other)
    assert parity == other
    for at in (0, BLOCK_BYTES - 1, BLOCK_BYTES, length - 3000, length - 1):
        expected = reference(k, m, [d[at : at + 1] for d in data], 1)
        assert [p[at : at + 1] for p in parity] == expected
    lost = {i: bytearray(len(data[i])) for i in range(m)}
    rest = {i: s for i, s in enumerate([*data, *parity]) if i not in lost}
    Codec(k, m, engine).rebuild(rest, lost)
    assert [lost[i] for i in range(m)] == data[:m]


@pytest.mark.parametrize("engine", ENGINES)
def test_any_memory_at_any_address(engine):
    with mmap.mmap(-1, 4096) as shared:
        shared[:] = random_bytes(1, 4096)
        view = memoryview(shared)
        read_only = np.frombuffer(bytes(random_bytes(2, 1001)), dtype=np.uint8)
        words = np.arange(250, dtype=np.float32)
        data: list[Memory] = [view[3:1004], read_only, words]
        parity: list[Memory] = [view[2001:3002], np.full(1001, 7, np.uint8), bytearray(1001)]
        Codec(3, 3, engine).encode(data, parity)
        plain = [bytearray(flat(d)) for d in data]
        assert [bytes(flat(p)) for p in parity] == reference(3, 3, plain, 1001)
        # Nothing beside the target was touched.
        assert bytes(view[3002:]) == bytes(random_bytes(1, 4096)[3002:])
        assert bytes(view[1004:2001]) == bytes(random_bytes(1, 4096)[1004:2001])
        view.release()
        del data, parity


def test_no_bytes_at_all():
    Codec(2, 1).encode([b"", b""], [bytearray()])
    parity = bytearray(b"old")
    Codec(2, 1).encode([b"", b""], [parity])
    assert parity == bytes(3)
    Codec(2, 1).rebuild({0: b"", 1: b""}, {})


def test_what_the_caller_did_wrong():
    codec = Codec(2, 1)
    with pytest.raises(ValueError, match="2 data and 1 parity shards, not 1 and 1"):
        codec.encode([b"a"], [bytearray(1)])
    with pytest.raises(ValueError, match="data shard 1 has 2 bytes, the stripe's parity 1"):
        codec.encode([b"a", b"ab"], [bytearray(1)])
    with pytest.raises(ValueError, match="differ in length"):
        Codec(1, 2).encode([b"a"], [bytearray(1), bytearray(2)])
    with pytest.raises(ValueError, match="read-only"):
        codec.encode([b"a", b"b"], [b"c"])
    with pytest.raises(ValueError, match="contiguous"):
        codec.encode([np.zeros((3, 3))[:, 0], b"b"], [bytearray(9)])
    with pytest.raises(ValueError, match="no shard 3"):
        codec.rebuild({0: b"a", 3: b"b"}, {1: bytearray(1)})
    with pytest.raises(ValueError, match=r"shards \[1\] are given, and to be computed"):
        codec.rebuild({0: b"a", 1: b"b"}, {1: bytearray(1)})
    for k, m in ((0, 1), (1, 0), (254, 2)):
        with pytest.raises(ValueError, match="at most 255"):
            Codec(k, m)


def test_too_great_a_loss_is_refused_and_names_what_is_missing():
    target = bytearray(b"z")
    with pytest.raises(IntegrityError, match=r"2 shards .* 3 are needed: lost are \[0, 2, 4\]"):
        Codec(3, 2).rebuild({1: b"a", 3: b"b"}, {0: target})
    assert target == b"z"


class TestChoosingAnEngine:
    def test_isal_when_there_is_one(self, choose_again):
        assert Codec(4, 2).engine is (Engine.ISAL if LIBRARY else Engine.NUMPY)

    def test_without_isal_numpy_works_and_says_so_once(self, monkeypatch, choose_again, caplog):
        monkeypatch.setattr(erasure, "load", lambda: None)
        with caplog.at_level(logging.WARNING):
            assert Codec(4, 2).engine is Engine.NUMPY
            assert Codec(4, 2).engine is Engine.NUMPY
        assert len([r for r in caplog.records if "install pyeclib" in r.message]) == 1
        with pytest.raises(UsageError, match="pyeclib"):
            Codec(4, 2, Engine.ISAL)

    @pytest.mark.skipif(LIBRARY is None, reason="no ISA-L here")
    @pytest.mark.parametrize("rows", [1, 2, 3])
    def test_an_isal_that_computes_nonsense_is_not_used(
        self, monkeypatch, choose_again, caplog, rows
    ):
        right = isal.Tables.multiply

        def wrong(self, sources, targets):
            right(self, sources, targets)
            if len(targets) == rows:
                targets[-1][-1] ^= 1  # one bit, at the end of one kind of code

        monkeypatch.setattr(isal.Tables, "multiply", wrong)
        assert Codec(4, 2).engine is Engine.NUMPY
        assert "computes wrong parity" in caplog.text
        with pytest.raises(UsageError):
            Codec(4, 2, Engine.ISAL)
