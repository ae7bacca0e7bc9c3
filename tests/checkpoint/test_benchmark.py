"""The benchmarks of snapshots and parity run, and notice wrong bytes."""

from benchmarks import parity
from ftkit.checkpoint.erasure import Codec


def test_the_parity_benchmark_runs_small():
    found = parity.measure(64 << 10, 1, [(2, 1), (3, 2), (2, 3)])
    assert not found.problems
    assert all(figure.value for figure in found.figures)
    # The parity is part of the format: these bytes may never change.
    assert found.computed == {"CRC-32 of all parity": "b63c006a"}


def test_the_parity_benchmark_notices_wrong_bytes(monkeypatch):
    right = Codec.rebuild

    def wrong(self, shards, lost):
        right(self, shards, lost)
        lost[0][0] ^= 1

    monkeypatch.setattr(Codec, "rebuild", wrong)
    found = parity.measure(64 << 10, 1, [(2, 1)])
    assert any("rebuild 2+1 gave wrong bytes" in problem for problem in found.problems)
