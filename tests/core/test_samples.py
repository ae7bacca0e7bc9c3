"""Quantiles and Wilson's interval, against published numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.samples import quantile, wilson


def test_a_quantile_is_the_nearest_rank() -> None:
    assert [quantile([3, 1, 2, 4], q) for q in (0.0, 0.25, 0.5, 0.51, 1.0)] == [1, 1, 2, 3, 4]


def test_wilson_is_wilson_s() -> None:
    # Newcombe 1998, table I: 81 of 263, and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 300), st.data())
def test_the_interval_holds_the_share_and_is_never_all_or_nothing(count, data) -> None:
    hits = data.draw(st.integers(0, count))
    low, high = wilson(hits, count)
    assert 0 <= low <= hits / count <= high <= 1
    assert low < 1
    assert high > 0
