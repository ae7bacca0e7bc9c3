"""Rounds, losses and rot on real memory, through real byte servers: every byte comes back."""

import itertools
import os
import random
import threading
from pathlib import Path

import pytest

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.erasure import Codec
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.lines import ByteLine
from ftkit.checkpoint.parity import combine
from ftkit.checkpoint.parity.buffer import ParityHead, read_head
from ftkit.checkpoint.parity.combine import Pace, ShardLost, Superseded
from ftkit.checkpoint.parity.leader import ask_all
from ftkit.checkpoint.parity.mend import fetch_head, mend, missing_parts
from ftkit.checkpoint.parity.protocol import awaited
from ftkit.checkpoint.parity.scrub import scrub
from ftkit.checkpoint.provision import create_arena, ensure_arena
from ftkit.checkpoint.slabs import PAGE, Pin, paged
from ftkit.checkpoint.stripes import Code
from ftkit.core.errors import CapacityError, IntegrityError, ProtocolError, WireError
from ftkit.core.ids import NodeId, Step

from .cluster import SECRET, Cluster, ballot, hurry

A, B, C, D = (NodeId(n) for n in range(4))


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def data_at(cluster: Cluster, seat: int, step: int) -> int:
    """Where a part's data begins in its arena's file."""
    with Arena.open(cluster.arena(seat)) as arena:
        for slab, sealed in enumerate(arena.slabs()):
            if sealed is not None and sealed.step == step:
                return arena.geometry.slab_at(slab) + arena.geometry.data_at
    raise AssertionError(f"no step {step}")


def parity_file(cluster: Cluster, node: NodeId) -> tuple[Path, int]:
    """The buffer that counts on a node, and where its shards begin."""
    holder = cluster.machines[node].holder
    kept = holder.kept()
    assert kept is not None
    path = holder.path_of(kept.round)
    with path.open("rb") as file:
        head = read_head(path)
        meta = len(head) - 8 * len(ParityHead.parse(head, node).digests)
        size = paged(meta - 4096) + paged(len(head) - meta)
        assert file.seek(0, 2) > 4096 + size
    return path, 4096 + size


@pytest.mark.parametrize(
    ("code", "nodes", "seats"), [((2, 1), 3, 1), ((2, 2), 4, 2), ((3, 1), 5, 1), ((1, 1), 4, 3)]
)
def test_any_m_nodes_of_a_group_come_back(tmp_path, code, nodes, seats):
    with Cluster(tmp_path, Code(*code), nodes, seats=seats) as cluster:
        for step in (1, 2, 3):
            cluster.write(step)
            done = cluster.round()
            assert not done.broken
            assert done.made is not None
            assert done.made.step == step
        stands = cluster.stands()
        assert stands is not None
        assert stands.round == done.made
        for lost in itertools.combinations(stands.groups[0], code[1]):
            cluster.lose(*lost)
            for node in lost:
                cluster.start(node)
            found = awaited(
                [c for m in cluster.machines.values() for c, _ in m.state().parts],
                {n: m.holder.holdings() for n, m in cluster.machines.items()},
                (),
            )
            assert found == stands
            for node in lost:
                mended = cluster.mend(node, stands)
                assert len(mended.parts) == seats
                assert len(lost) > 1 or not mended.damaged
            for node in lost:
                head = fetch_head(cluster.peers(), stands, node)
                # Redundancy is whole again: the next m may go.
                cluster.machines[node].holder.make_again(head.stripes)
            cluster.assert_state(3)
            assert cluster.stands() == stands


def test_larger_than_a_window(tmp_path):
    layout = StateLayout.of([("w", "float32", (8_000_000,))])
    with Cluster(tmp_path, Code(2, 1), 3, layout=layout, chunk_bytes=1 << 20) as cluster:
        cluster.write(7)
        done = cluster.round()
        assert done.bytes == pytest.approx(layout.total_bytes / 2, rel=0.1), "m/k of the state"
        stands = cluster.stands()
        assert stands is not None
        cluster.lose(B)
        cluster.start(B)
        mended = cluster.mend(B, stands)
        assert mended.bytes == pytest.approx(layout.total_bytes / 3, rel=0.1)
        cluster.assert_state(7)


def test_connections_are_kept_from_round_to_round(tmp_path, monkeypatch):
    opened = list[object]()
    connect = ByteLine.open

    def count(address, secret, *, timeout_s):
        opened.append(address)
        return connect(address, secret, timeout_s=timeout_s)

    monkeypatch.setattr(ByteLine, "open", count)
    with Cluster(tmp_path, Code(2, 2), 4) as cluster:
        for step in range(1, 4):
            cluster.write(step)
            assert cluster.round().made is not None
        most = len(opened)
        for step in range(4, 8):
            cluster.write(step)
            assert cluster.round().made is not None
        # How many are needed at once depends on which threads meet; most rounds need no more.
        assert len(opened) - most <= most // 3


def test_nothing_newer_makes_nothing_and_the_kept_is_pinned(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        assert cluster.round().made is None
        cluster.write(1)
        assert cluster.round().made is not None
        assert cluster.round().made is None
        for step in range(2, 9):
            cluster.write(step)
        cluster.assert_state(1)
        cluster.round()
        for step in range(9, 15):
            cluster.write(step)
        with pytest.raises(IntegrityError):
            cluster.assert_state(1)
        cluster.assert_state(8)


def test_an_arena_that_grows_keeps_its_pins(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        cluster.layout = StateLayout.of([("w", "float32", (9000,)), ("b", "int8", (50_000,))])
        with ensure_arena(cluster.arena(0), cluster.layout) as arena:
            assert [any(arena.pins(s)) for s, held in enumerate(arena.slabs()) if held] == [True]


def test_a_node_that_dies_in_a_round_ends_it_and_costs_nothing(tmp_path, monkeypatch):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        before = cluster.stands()
        assert before is not None
        cluster.write(2)
        heads = type(cluster.machines[B].holder).heads

        def dies(self, stripes, peers):
            if self.node == B:
                raise WireError("this node dies here")
            return heads(self, stripes, peers)

        monkeypatch.setattr(type(cluster.machines[B].holder), "heads", dies)
        done = cluster.round()
        assert "this node dies here" in done.broken
        assert cluster.stands() == before
        monkeypatch.undo()
        cluster.lose(B)
        cluster.start(B)
        cluster.mend(B, before)
        cluster.assert_state(1)


def test_a_leader_that_dies_before_it_says_that_a_round_counts(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        cluster.write(2)
        # What the leader does, less its last message.
        number = ballot(9, 0)
        states = {
            n: m.state() for n, m in cluster.machines.items() if not m.holder.ask(number)
        }  # fmt: skip
        from ftkit.checkpoint.parity.protocol import choose

        stands = cluster.stands()
        assert stands is not None
        (stripes,) = choose({n: s.parts for n, s in states.items()}, stands, Code(2, 1), number)
        for machine in cluster.machines.values():
            machine.holder.make(stripes, number, stands.round)
        cluster.lose(A)
        cluster.start(A)
        found = cluster.stands()
        assert found is not None
        assert found.round == stripes.round, "all had made it"
        cluster.mend(A, found)
        cluster.assert_state(2)


def test_a_second_leader_is_obeyed_and_the_first_no_more(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round(leader=0)
        cluster.write(2)
        for machine in cluster.machines.values():
            assert not machine.holder.ask(ballot(50, 1))
        refused = cluster.round(leader=0)
        assert "node 1 leads" in refused.broken
        assert cluster.round(leader=0).made is not None, "it has heard of a higher ballot"


def test_a_part_that_is_gone_when_it_is_asked_for_ends_the_round(tmp_path, monkeypatch):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        monkeypatch.setattr("ftkit.checkpoint.parity.parts._pin", lambda *a, **k: False)
        done = cluster.round()
        assert "has lost step 1" in done.broken
        assert cluster.stands() is None


def test_memory_that_is_full_ends_the_round_and_says_how_much_is_needed(tmp_path, monkeypatch):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)

        class Full:
            f_bavail, f_frsize = 3, 100

        monkeypatch.setattr("os.statvfs", lambda path: Full)
        done = cluster.round()
        assert "300 bytes free" in done.broken
        monkeypatch.undo()
        assert cluster.round().made is not None


def test_a_flipped_bit_in_an_arena_is_found_and_not_encoded(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        cluster.write(2)
        flip(cluster.arena(1), data_at(cluster, 1, 2) + 5)
        done = cluster.round()
        assert "chunk 0" in done.broken
        assert "digest" in done.broken
        stands = cluster.stands()
        assert stands is not None
        assert stands.round.step == 1


@pytest.mark.parametrize("seed", range(12))
def test_bits_that_rot_are_noticed_and_made_up_for(tmp_path, seed):
    """One node lost, one bit flipped anywhere in another's part or parity; m = 2."""
    rng = random.Random(seed)
    with Cluster(tmp_path, Code(2, 2), 4) as cluster:
        cluster.write(1)
        cluster.round()
        stands = cluster.stands()
        assert stands is not None
        lost, bad = rng.sample([A, B, C, D], 2)
        if seed % 2:
            where = cluster.arena(bad)
            with Arena.open(where) as arena:
                at = data_at(cluster, bad, 1) + rng.randrange(arena.snapshots()[0].data_bytes)
        else:
            where, first = parity_file(cluster, bad)
            at = first + rng.randrange(4096)
        flip(where, at)
        cluster.lose(lost)
        cluster.start(lost)
        cluster.mend(lost, stands)
        cluster.mend(bad, stands)
        cluster.assert_state(1)


def test_more_rot_than_parity_makes_up_for_is_refused_and_sealed_nowhere(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        stands = cluster.stands()
        assert stands is not None
        with Arena.open(cluster.arena(C)) as arena:
            size = arena.snapshots()[0].data_bytes
        for at in range(0, size, 1024):
            flip(cluster.arena(C), data_at(cluster, C, 1) + at)
        cluster.lose(B)
        where = cluster.start(B).directory
        with pytest.raises(IntegrityError, match=r"nodes \[1, 2\] are lost or corrupt"):
            cluster.mend(B, stands)
        with pytest.raises(IntegrityError), Arena.open(cluster.arena(B)) as arena:
            arena.find(Step(1))
        assert where.exists()


def test_a_node_out_of_reach_is_another_matter_than_rot(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        stands = cluster.stands()
        assert stands is not None
        cluster.lose(B)
        machine = cluster.start(B)
        head = fetch_head(cluster.peers(), stands, B)
        cluster.machines[C].server.close()
        with pytest.raises(WireError, match="cannot reach"):
            mend(machine.directory, head, B, [0], cluster.peers(), hurry(lambda: True))


def test_a_mend_that_cannot_begin_closes_the_arenas_it_opened(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3, seats=2) as cluster:
        cluster.write(1)
        cluster.round()
        stands = cluster.stands()
        assert stands is not None
        machine = cluster.machines[B]
        head = fetch_head(cluster.peers(), stands, B)
        second = cluster.arena(3)
        with Arena.open(second) as arena:
            flip(second, arena.geometry.slab_at(0) + PAGE)
        before = sorted(os.listdir("/proc/self/fd"))
        for _ in range(3):
            with pytest.raises(IntegrityError, match="no good head"):
                mend(machine.directory, head, B, [0, 1], cluster.peers(), in_place=True,
                     pace=hurry(lambda: True))  # fmt: skip
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_rebuild_that_is_killed_leaves_nothing_that_looks_good(tmp_path, monkeypatch):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        stands = cluster.stands()
        assert stands is not None
        cluster.lose(B)
        machine = cluster.start(B)

        def die(self) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("ftkit.checkpoint.writer.SlabMirror.seal", die)
        with pytest.raises(KeyboardInterrupt):
            cluster.mend(B, stands)
        assert machine.state().parts == ()
        monkeypatch.undo()
        cluster.mend(B, stands)
        cluster.assert_state(1)


def test_a_torn_parity_page_is_no_parity(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        stands = cluster.stands()
        assert stands is not None
        path, _ = parity_file(cluster, A)
        flip(path, 100)
        with pytest.raises(IntegrityError, match="not sealed, or is damaged"):
            cluster.peers().parity_head(A, stands.round)
        assert fetch_head(cluster.peers(), stands, B).node == C, "another one tells"


class TestScrub:
    def test_what_is_right_is_found_right(self, tmp_path):
        with Cluster(tmp_path, Code(2, 1), 3) as cluster:
            cluster.write(1)
            cluster.round()
            for machine in cluster.machines.values():
                kept = machine.holder.kept()
                assert kept is not None
                assert scrub(machine.holder, kept) == []

    def test_a_shard_that_rotted_is_named_and_made_anew(self, tmp_path):
        with Cluster(tmp_path, Code(2, 1), 3) as cluster:
            cluster.write(1)
            cluster.round()
            holder = cluster.machines[B].holder
            kept = holder.kept()
            assert kept is not None
            path, first = parity_file(cluster, B)
            flip(path, first + 1000)
            (wrong,) = scrub(holder, kept)
            assert wrong.rotted
            assert wrong.place in kept.plan.kept(B)
            holder.replace(kept)
            assert scrub(holder, kept) == []

    def test_a_shard_that_was_computed_wrongly_is_found(self, tmp_path, monkeypatch):
        class Broken(Codec):
            def rebuild(self, shards, lost):
                super().rebuild(shards, lost)
                for out in lost.values():
                    out[7] ^= 1

        with Cluster(tmp_path, Code(2, 1), 3) as cluster:
            cluster.write(1)
            monkeypatch.setattr(combine, "Codec", Broken)
            cluster.round()
            monkeypatch.undo()
            holder = cluster.machines[B].holder
            kept = holder.kept()
            assert kept is not None
            (wrong,) = scrub(holder, kept)
            assert not wrong.rotted
            assert wrong.at == 0

    def test_data_that_rotted_elsewhere_is_named_and_its_node_mends_it(self, tmp_path):
        with Cluster(tmp_path, Code(2, 1), 3) as cluster:
            cluster.write(1)
            cluster.round()
            stands = cluster.stands()
            assert stands is not None
            flip(cluster.arena(C), data_at(cluster, C, 1) + 9)
            found = set()
            for node in (A, B):
                kept = cluster.machines[node].holder.kept()
                assert kept is not None
                try:
                    scrub(cluster.machines[node].holder, kept)
                except ShardLost as error:
                    stripe = kept.plan.stripes[error.place.stripe]
                    found.add(stripe.nodes[error.place.shard])
            assert found == {C}
            head = fetch_head(cluster.peers(), stands, C)
            where = cluster.machines[C].directory
            assert missing_parts(where, head, C) == [0]
            mend(where, head, C, [0], cluster.peers(), hurry(lambda: True), in_place=True)
            assert missing_parts(where, head, C) == []
            with Arena.open(cluster.arena(C)) as arena:
                assert sum(s is not None for s in arena.slabs()) == 1, "in place"
                assert arena.pins(0)[Pin.PARITY]

    def test_while_ranks_write_no_slab_is_taken(self, tmp_path):
        with Cluster(tmp_path, Code(2, 1), 3) as cluster:
            cluster.write(1)
            cluster.round()
            stands = cluster.stands()
            assert stands is not None
            head = fetch_head(cluster.peers(), stands, C)
            cluster.arena(C).unlink()
            where = cluster.machines[C].directory
            with pytest.raises(IntegrityError, match="no good head"):
                mend(where, head, C, [0], cluster.peers(), hurry(lambda: True), in_place=True)
            assert not cluster.arena(C).exists()


def test_strangers_orders_are_refused(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        line = ByteLine.open(cluster.machines[A].server.address, SECRET, timeout_s=5)
        wrong: list[dict[str, object]] = [
            {"op": "parity-make", "set": {}, "keep": None},
            {"op": "parity-make"},
            {"op": "parity-keep", "round": [1], "ballot": [1, 0]},
            {"op": "parity-state", "ballot": "x"},
            {"op": "parity-data", "round": [1, 1, [1, 0]], "place": [0]},
            {"op": "parity-unheard-of"},
        ]
        for request in wrong:
            with pytest.raises((ProtocolError, IntegrityError)):
                line.ask(request)
        absent: list[dict[str, object]] = [
            {"op": "parity-head", "round": [5, 5, [5, 5]]},
            {"op": "parity-data", "round": [5, 5, [5, 5]], "place": [0, 0]},
        ]
        for request in absent:
            with pytest.raises(IntegrityError):
                line.ask(request)
        line.close()
        assert set(ask_all(cluster.peers(), [A, B])) == {A, B}


def test_a_newer_order_ends_an_older_one(tmp_path):
    """The older waits in its first window; the newer takes its buffer."""
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        cluster.round()
        stands = cluster.stands()
        assert stands is not None
        holder = cluster.machines[A].holder
        reached, goes_on = threading.Event(), threading.Event()

        class Waits(Pace):
            def pause(self) -> None:
                reached.set()
                assert goes_on.wait(10)
                super().pause()

        cluster.write(2)
        errors: list[BaseException] = []
        from ftkit.checkpoint.parity.protocol import choose

        def order(number: int) -> object:
            assert not holder.ask(ballot(number, 0))
            parts = {n: m.state().parts for n, m in cluster.machines.items()}
            (stripes,) = choose(parts, stands, Code(2, 1), ballot(number, 0))
            return stripes

        older = order(70)
        holder.make_pace = lambda wanted: Waits(wanted, share=1.0)

        def work() -> None:
            try:
                holder.make(older, ballot(70, 0), stands.round)  # type: ignore[arg-type]
            except Superseded as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        assert reached.wait(10)
        newer = order(71)
        second = threading.Thread(
            target=lambda: holder.make(newer, ballot(71, 0), stands.round)  # type: ignore[arg-type]
        )
        second.start()
        goes_on.set()
        thread.join()
        second.join()
        assert len(errors) == 1
        assert {h.round.ballot.number for h in holder.holdings()} == {1, 71} | {
            stands.round.ballot.number
        } - {1}


def test_the_pace_rests_as_long_as_it_works():
    now, rested = [0.0], list[float]()
    pace = Pace(share=0.25, clock=lambda: now[0], rest=rested.append)
    now[0] += 0.01
    pace.pause()
    assert rested == [pytest.approx(0.03)]
    now[0] += 10
    pace.pause()
    assert rested[-1] == combine.REST_S, "an end is noticed soon"
    with pytest.raises(Superseded):
        Pace(lambda: False).pause()


def test_no_room_in_an_arena_is_told(tmp_path):
    with Cluster(tmp_path, Code(2, 1), 3) as cluster:
        cluster.write(1)
        with Arena.open(cluster.arena(0)) as arena:
            head = arena.head_bytes(arena.snapshots()[0])
        tiny = create_arena(tmp_path / "tiny.arena", data_bytes=10, meta_bytes=10)
        with tiny, pytest.raises(CapacityError, match="does not fit"):
            tiny.adopt(head)
