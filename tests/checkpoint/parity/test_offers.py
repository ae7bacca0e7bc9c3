"""What a node offers a leader is pinned until it is taken up, or nobody is going to."""

from pathlib import Path

import pytest

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.parity import parts
from ftkit.checkpoint.slabs import Pin
from ftkit.checkpoint.stripes import Code
from ftkit.core.ids import NodeId, Step
from tests.checkpoint.parity.cluster import Cluster, ballot


def pinned(cluster: Cluster) -> list[int]:
    """The steps that parity keeps in the arena of node 0."""
    with Arena.open(cluster.arena(0)) as arena:
        held = [(s, arena.pins(slab)[Pin.PARITY]) for slab, s in enumerate(arena.slabs()) if s]
    return sorted(s.step for s, pin in held if pin)


def test_an_offer_is_let_go_when_its_leader_never_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Cluster(tmp_path, Code(1, 1), 2) as cluster:
        for step in (1, 2, 3):
            cluster.write(step)
        mine = cluster.machines[NodeId(0)].holder
        assert mine.ask(ballot(7, 1)) == ""
        mine.repin()
        assert pinned(cluster) == [2, 3]
        monkeypatch.setattr(parts, "OFFER_S", -1.0)
        mine.repin()
        assert pinned(cluster) == []


def test_what_was_pinned_by_mistake_is_let_go(tmp_path: Path) -> None:
    """A slab may be chosen, and filled, between a look at it and the pin."""
    with Cluster(tmp_path, Code(1, 1), 2) as cluster:
        cluster.write(1)
        cluster.round()
        cluster.write(2)
        with Arena.open(cluster.arena(0), writable=True) as arena:
            arena.pin(arena.find(Step(2)), Pin.PARITY)
        assert pinned(cluster) == [1, 2]
        cluster.machines[NodeId(0)].holder.repin()
        assert pinned(cluster) == [1]
