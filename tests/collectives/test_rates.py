"""What is made of measured rates, and who meets whom to measure them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.collectives.rates import dropped, filled, pooled, unknown
from ftkit.collectives.tournament import rounds


@given(st.integers(2, 40))
def test_in_a_tournament_everybody_meets_everybody_once_and_nobody_plays_twice_at_a_time(count):
    schedule = rounds(count)
    assert len(schedule) == count - 1 + count % 2
    for pairs in schedule:
        players = [p for pair in pairs for p in pair]
        assert len(players) == len(set(players)) == count - count % 2
    met = sorted(pair for pairs in schedule for pair in pairs)
    assert met == list(itertools.combinations(range(count), 2))


@pytest.mark.parametrize("count", [0, 1])
def test_there_is_no_tournament_of_one(count):
    assert rounds(count) == []


def test_hosts_share_what_is_known_of_their_members():
    rates = unknown(4)
    rates[0, 2], rates[1, 3] = 5.0, 7.0
    names, between = pooled(rates, ["a", "a", "b", "b"])
    assert names == ["a", "b"]
    assert between[0, 1] == 7.0
    assert np.isnan(between[1, 0])


def test_an_unknown_pair_is_as_fast_as_its_hosts_and_an_unknown_pair_of_hosts_as_the_median():
    hosts = ["a", "a", "b", "c"]
    rates = unknown(4)
    rates[0, 2], rates[2, 0], rates[2, 3] = 2.0, 4.0, 100.0
    result = filled(rates, hosts)
    assert result[1, 2] == 2.0  # the hosts' other pair
    assert result[3, 0] == 4.0  # the median of 2, 4 and 100
    assert result[0, 1] == 100.0  # memory is as fast as the fastest
    assert result[0, 2] == 2.0


def test_nothing_known_means_all_alike():
    result = filled(unknown(3), ["a", "b", "c"])
    assert (result == 1.0).all()


def test_an_edge_has_dropped_when_every_one_of_its_last_windows_is_slow():
    assert dropped(100.0, [60.0, 69.0])
    assert not dropped(100.0, [60.0, 71.0])
    assert not dropped(None, [1.0])
    assert not dropped(100.0, [])
