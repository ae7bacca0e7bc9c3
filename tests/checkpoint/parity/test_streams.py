"""A shard as a run of bytes: taken where it lies, joined only where blocks end in between."""

import numpy as np
import pytest

from ftkit.checkpoint.parity.streams import Stream
from ftkit.core.errors import IntegrityError


def blocks(*sizes: int) -> list[memoryview]:
    whole = np.arange(sum(sizes), dtype=np.uint8)
    return [part.data for part in np.split(whole, np.cumsum(sizes)[:-1])]


def test_what_lies_in_one_block_is_not_copied() -> None:
    given = blocks(8, 8)
    stream = Stream(given)
    for block, count in ((0, 5), (0, 3), (1, 8)):
        taken = stream.take(count)
        assert len(taken) == count
        assert np.shares_memory(np.asarray(taken), np.asarray(given[block]))


def test_what_lies_in_several_is_joined() -> None:
    stream = Stream(blocks(3, 4, 9))
    assert [bytes(stream.take(n)) for n in (2, 7, 0, 7)] == [
        bytes(range(2)), bytes(range(2, 9)), b"", bytes(range(9, 16))
    ]  # fmt: skip


def test_a_shard_that_ends_too_early_says_by_how_much() -> None:
    stream = Stream(blocks(3, 4))
    stream.take(2)
    with pytest.raises(IntegrityError, match="ends 5 bytes too early"):
        stream.take(10)
