"""Slow storage: said of the node and the path, by what was really waited for."""

import random
from collections.abc import Sequence

import pytest

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import NodeId
from ftkit.core.verdict import EVICT, Fault, Verdict
from ftkit.detection.observations import WorldChanged
from ftkit.detection.signals import IoSeen, NodeSeen, from_json, to_json
from ftkit.detection.slow_io import ALARM_S, HOLD_S, SlowIo
from tests.detection.scene import world

PATH = "/data/checkpoints"
MIB = 1 << 20


def seen(at: float, seconds: float, *, node: int = 0, count: int = 10, **more: object) -> IoSeen:
    fields: dict[str, object] = {"op": "write", "path": PATH, "nbytes": count * MIB} | more
    return IoSeen(node=NodeId(node), at=at, count=count, seconds=seconds, **fields)  # type: ignore[arg-type]


def detector(*, nodes: int = 3, windows: int = 5, usual_s: float = 0.2) -> SlowIo:
    """It has seen every node write ten MiB a window at the usual pace. One rank a node."""
    slow = SlowIo()
    slow.ingest(WorldChanged(world=world(nodes, per_node=1), at=0.0))
    for at in range(windows):
        for node in range(nodes):
            slow.ingest(seen(float(at), usual_s, node=node))
    return slow


def said(slow: SlowIo, windows: Sequence[IoSeen]) -> list[tuple[float, Verdict]]:
    found = []
    for window in windows:
        slow.ingest(window)
        found += [(window.at, v) for v in slow.tick(window.at)]
    return found


def test_a_disk_that_becomes_slow_is_named_with_its_node_and_path_and_nobody_goes() -> None:
    slow = detector()
    slow.ingest(NodeSeen(node=NodeId(1), at=9.0, available_bytes=1, pressure={"io": 0.4}))
    found = said(slow, [seen(10.0 + i, 1.0, node=1, count=2) for i in range(10)])
    at, verdict = found[0]
    assert at <= 10 + ALARM_S + 1
    assert (verdict.fault, verdict.seat) == (Fault.SLOW_IO, 1)
    assert Fault.SLOW_IO not in EVICT
    told = verdict.evidence
    assert (told["node"], told["path"], told["op"], told["others"]) == (1, PATH, "write", [])
    assert told["pressure_io"] == 0.4
    assert verdict.since_s == 9.0
    assert {v.seat for _, v in found} == {1}


def test_a_write_that_does_not_return_is_said_while_it_hangs() -> None:
    found = said(detector(), [seen(10.0 + i, 1.0, node=2, count=0) for i in range(4)])
    assert [at for at, _ in found] == [11.0, 12.0, 13.0]


def test_a_node_that_was_always_slower_than_others_is_found_without_a_past() -> None:
    slow = detector(nodes=3)
    slow.ingest(WorldChanged(world=world(4, per_node=1), at=9.0))
    found = said(slow, [seen(10.0 + i, 3.0, node=3) for i in range(3)])
    assert {v.seat for _, v in found} == {3}


def test_two_alone_have_only_their_past_to_compare_with() -> None:
    slow = SlowIo()
    slow.ingest(WorldChanged(world=world(2, per_node=1), at=0.0))
    for at in range(9):
        slow.ingest(seen(float(at), 0.2, node=0))
        slow.ingest(seen(float(at), 2.0, node=1))
    assert not slow.tick(9.0)


def test_when_all_are_slow_it_is_the_storage() -> None:
    slow = detector()
    for at in range(10, 14):
        for node in range(3):
            slow.ingest(seen(float(at), 3.0, node=node))
    verdicts = slow.tick(13.0)
    assert [v.evidence["others"] for v in verdicts] == [[1, 2], [0, 2], [0, 1]]
    assert "it is the storage" in verdicts[0].reason


def test_larger_files_and_milliseconds_are_no_fault() -> None:
    slow = detector(usual_s=0.2)
    # Eight times as much in one operation takes about as much longer; the other is ten times slower.
    assert not said(slow, [seen(10.0 + i, 0.9, count=10, nbytes=80 * MIB) for i in range(20)])
    assert not said(slow, [seen(40.0 + i, 0.06, count=1, op="read", nbytes=0) for i in range(9)])


def test_what_is_as_it_was_again_is_over_and_so_is_what_nobody_uses() -> None:
    slow = detector()
    assert said(slow, [seen(10.0 + i, 3.0) for i in range(5)])
    assert slow.tick(14.0 + HOLD_S)
    assert not slow.tick(15.0 + HOLD_S)
    slow.ingest(seen(100.0, 0.2))
    assert slow.tick(100.0), "one window may be luck"
    slow.ingest(seen(101.0, 0.2))
    assert not slow.tick(101.0)


@pytest.mark.parametrize("seed", range(5))
def test_noise_that_storage_has_is_nobody_s_fault(seed: int) -> None:
    chance = random.Random(seed)
    slow = detector(windows=0)
    windows = [
        seen(float(at), 0.2 * chance.lognormvariate(0, 0.4), node=node)
        for at in range(3000)
        for node in range(3)
    ]
    assert not said(slow, windows)


def test_it_crosses_the_wire_and_nonsense_does_not() -> None:
    one = seen(1.0, 0.5)
    assert from_json(to_json(one)) == one
    for wrong in ({"count": -1}, {"seconds": float("nan")}, {"nbytes": -1}, {"count": "x"}):
        with pytest.raises(ProtocolError):
            from_json(to_json(one) | wrong)
