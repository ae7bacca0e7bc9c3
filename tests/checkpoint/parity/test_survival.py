"""The stories of `survival` that parity is in, told a few times."""

from tests.checkpoint.survival import CLUSTERS, flip_in_parity, lose_nodes


def test_nodes_that_vanish_together_come_back(tmp_path):
    assert lose_nodes(tmp_path, 2 * len(CLUSTERS), seed=3)


def test_a_bit_of_parity_that_flips_is_noticed_and_made_up_for(tmp_path):
    assert flip_in_parity(tmp_path, 16, seed=4) == 16
