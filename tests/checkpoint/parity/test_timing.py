"""Hostile timing: nodes that die or stop in the middle of a round, of a rebuild, and again."""

import random
import time
from collections.abc import Callable

import pytest

from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.parity import operations
from ftkit.checkpoint.parity.combine import Pace
from ftkit.checkpoint.parity.rounds import Holding
from ftkit.checkpoint.stripes import Code
from ftkit.core.errors import WireError
from ftkit.core.ids import NodeId

from .cluster import Cluster, hurry

A, B, C, D = (NodeId(n) for n in range(4))

#: Two windows a shard, so that there is a middle.
LARGE = StateLayout.of([("w", "uint8", (36 << 20,))])


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Signs of life are much more frequent than the silence that is borne, as they should be."""
    monkeypatch.setattr(operations, "WORKING_S", 0.05)


def at_pause(number: int, do: Callable[[], object]) -> Pace:
    """A pace that does something before it goes on for that time."""
    left = [number]

    class Interrupted(Pace):
        def pause(self) -> None:
            left[0] -= 1
            if left[0] == 0:
                do()
            super().pause()

    return Interrupted(share=1.0)


def published(cluster: Cluster, step: int) -> Holding:
    cluster.write(step)
    assert cluster.round().made is not None
    stands = cluster.stands()
    assert stands is not None
    return stands


@pytest.mark.parametrize("during", ["ask", "make"])
def test_a_node_that_stops_breaks_one_round_and_holds_up_nobody(tmp_path, monkeypatch, during):
    with Cluster(tmp_path, Code(2, 1), 3, timeout_s=1.0) as cluster:
        before = published(cluster, 1)
        cluster.write(2)
        stopped = cluster.machines[B]
        if during == "ask":
            stopped.stop()
        else:
            holder = cluster.machines[A].holder
            heads = type(holder).heads

            def then_stops(self, stripes, peers):
                stopped.stop()
                return heads(self, stripes, peers)

            monkeypatch.setattr(type(holder), "heads", then_stops)
        start = time.monotonic()
        done = cluster.round()
        assert "silent" in done.broken
        assert time.monotonic() - start < 5
        monkeypatch.undo()
        for node in (A, C):
            kept = cluster.machines[node].holder.kept()
            assert kept is not None
            assert kept.round == before.round
        stopped.goes_on.set()
        after = published(cluster, 3)
        assert after.round.step == 3
        cluster.lose(B)
        cluster.start(B)
        cluster.mend(B, after)
        cluster.assert_state(3)


def test_a_node_that_dies_while_it_is_read_from_is_replaced_by_another(tmp_path):
    with Cluster(tmp_path, Code(2, 2), 4, layout=LARGE, chunk_bytes=1 << 20) as cluster:
        stands = published(cluster, 1)
        cluster.lose(D)
        cluster.start(D)
        read = sorted(cluster.machines.keys() - {D})
        mended = cluster.mend(D, stands, at_pause(1, lambda: cluster.lose(read[0])))
        assert mended.damaged, "some shard was out of reach"
        cluster.assert_state(1, nodes=[D])
        cluster.start(read[0])
        cluster.mend(read[0], stands)
        cluster.assert_state(1)


def test_a_rebuild_that_dies_and_a_second_loss_before_it_is_tried_again(tmp_path):
    with Cluster(tmp_path, Code(2, 2), 4, layout=LARGE, chunk_bytes=1 << 20) as cluster:
        stands = published(cluster, 1)

        def die() -> None:
            raise KeyboardInterrupt

        cluster.lose(B)
        cluster.start(B)
        for pause in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                cluster.mend(B, stands, at_pause(pause, die))
            assert cluster.machines[B].state().parts == (), "nothing half made looks good"
        cluster.lose(B, C)
        for node in (B, C):
            cluster.start(node)
        for node in (B, C):
            cluster.mend(node, stands)
        cluster.assert_state(1)


def test_with_too_few_left_a_rebuild_says_so_and_goes_on_when_they_are_back(tmp_path):
    with Cluster(
        tmp_path, Code(2, 1), 3, layout=LARGE, chunk_bytes=1 << 20, timeout_s=1.0
    ) as cluster:
        stands = published(cluster, 1)
        cluster.lose(B)
        cluster.start(B)
        stopped = cluster.machines[C]
        with pytest.raises(WireError, match=r"nodes \[1, 2\] are lost"):
            cluster.mend(B, stands, at_pause(1, stopped.stop))
        assert cluster.machines[B].state().parts == ()
        stopped.goes_on.set()
        cluster.mend(B, stands)
        cluster.assert_state(1)


@pytest.mark.parametrize("seed", range(2))
def test_whoever_dies_at_whatever_moment_of_a_round_some_step_comes_back(
    tmp_path, monkeypatch, seed
):
    """A node dies as some node begins a window of a round; what stands is rebuilt; and again."""
    rng = random.Random(seed)
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        stands = published(cluster, 1)
        for step in range(2, 10, 2):
            victim = NodeId(rng.randrange(3))
            worker = cluster.machines[NodeId(rng.randrange(3))].holder
            cluster.write(step)

            def die(victim=victim) -> None:
                cluster.machines[victim].kill()
                raise WireError("its memory is gone")

            dying = at_pause(1, die)
            monkeypatch.setattr(worker, "make_pace", lambda _, dying=dying: dying)
            done = cluster.round(leader=rng.randrange(3))
            monkeypatch.setattr(worker, "make_pace", hurry)
            assert done.broken
            cluster.lose(victim)
            cluster.start(victim)
            found = cluster.stands()
            assert found is not None
            assert found.round >= stands.round, "what was published is not undone"
            cluster.mend(victim, found)
            cluster.assert_state(found.round.step)
            stands = published(cluster, step + 1)
            for other in cluster.machines.values():
                assert {h.round for h in other.holder.holdings()} == {stands.round}


def test_a_bit_that_flips_anywhere_in_a_parity_file_is_never_loaded(tmp_path):
    """Page, stripes, heads, digests and shards; one node lost besides. m = 2."""
    rng = random.Random(5)
    with Cluster(tmp_path, Code(2, 2), 4) as cluster:
        stands = published(cluster, 1)
        for _ in range(10):
            bad, lost = rng.sample([A, B, C, D], 2)
            holder = cluster.machines[bad].holder
            if not holder.holdings():
                continue
            path = holder.path_of(stands.round)
            data = bytearray(path.read_bytes())
            at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(8192)
            with path.open("r+b") as file:
                file.seek(at)
                file.write(bytes([data[at] ^ 1 << rng.randrange(8)]))
            cluster.lose(lost)
            cluster.start(lost)
            cluster.mend(lost, stands)
            cluster.assert_state(1)
            with path.open("r+b") as file:
                file.seek(at)
                file.write(data[at : at + 1])
            kept = holder.stripes_of(stands.round)
            cluster.machines[lost].holder.make_again(kept)
