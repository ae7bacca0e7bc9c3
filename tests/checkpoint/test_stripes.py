"""Stripes and rebuilds: plans that hold what they promise, and real bytes that prove it."""

import math
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.checkpoint.erasure import Codec
from ftkit.checkpoint.rebuild import shards_to_read
from ftkit.checkpoint.stripes import Code, Place, StripePlan, deal, plan_stripes
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import NodeId

CODES = [(1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2), (3, 3)]
WORLDS = [
    (4, 3, 1),
    (4, 2, 2),
    (5, 2, 1),
    (5, 3, 2),
    (6, 2, 1),
    (6, 4, 2),
    (7, 2, 2),
    (9, 2, 1),
    (9, 3, 3),
]

parts_of = st.lists(st.lists(st.integers(0, 60), max_size=3), min_size=1, max_size=14)


def numbered(parts: Sequence[Sequence[int]]) -> dict[NodeId, list[int]]:
    """Nodes whose ids are neither dense nor in order."""
    return {NodeId(3 * (i * 7 % len(parts)) + 1): list(sizes) for i, sizes in enumerate(parts)}


def sizes(nodes: int, seed: int = 0) -> dict[NodeId, list[int]]:
    rng = random.Random(seed)
    return {
        NodeId(n): [rng.randrange(2000) for _ in range(rng.randrange(1, 4))] for n in range(nodes)
    }


class Memory:
    """The memory of a job's nodes: sealed parts, and parity that was really computed."""

    def __init__(self, parts: Mapping[NodeId, Sequence[int]], plan: StripePlan, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.plan = plan
        self.parts = {node: [rng.bytes(n) for n in sizes] for node, sizes in parts.items()}
        self.shards = dict[Place, bytes]()
        for number, stripe in enumerate(plan.stripes):
            data = [
                b"".join(self.parts[piece.node][s.part][s.at : s.at + s.count] for s in piece.spans)
                for piece in stripe.data
            ]
            parity = [bytearray(stripe.length) for _ in stripe.parity]
            Codec(len(data), plan.m).encode(data, parity)
            for shard, held in enumerate([*data, *parity]):
                self.shards[Place(number, shard)] = bytes(held)

    def run(
        self, held: Mapping[Place, NodeId], *, parity: bool = False
    ) -> tuple[dict[Place, bytes], Counter[NodeId]]:
        """Compute what is not held, from the shards that `shards_to_read` names and no others.

        Returns what was computed, and how many bytes each node sent.
        """
        found, sent = dict[Place, bytes](), Counter[NodeId]()
        for number, stripe in enumerate(self.plan.stripes):
            k = len(stripe.data)
            usable = [i for i in range(k + self.plan.m) if Place(number, i) in held]
            for shard in range(k + self.plan.m if parity else k):
                if shard in usable or not stripe.shard_bytes(shard):
                    continue
                read = shards_to_read(stripe, shard, usable, sent)
                given = {i: self.shards[Place(number, i)] for i in read}
                given |= {i: b"" for i, piece in enumerate(stripe.data) if not piece.count}
                out = bytearray(stripe.shard_bytes(shard))
                Codec(k, self.plan.m).rebuild(given, {shard: out})
                found[Place(number, shard)] = bytes(out)
                for i in read:
                    sent[stripe.nodes[i]] += stripe.shard_bytes(i)
        return found, sent


def data_places(plan: StripePlan, nodes: Collection[NodeId]) -> set[Place]:
    return {
        Place(number, shard)
        for number, stripe in enumerate(plan.stripes)
        for shard, piece in enumerate(stripe.data)
        if piece.node in nodes and piece.count
    }


def losses(plan: StripePlan, rng: random.Random) -> list[NodeId]:
    """Up to m random nodes of every group."""
    return [node for group in plan.groups for node in rng.sample(group, rng.randint(0, plan.m))]


@given(parts_of, st.sampled_from(CODES), st.sampled_from([1, 8, 64]))
def test_every_byte_has_parity_on_other_nodes(found, code, align):
    parts, (k, m) = numbered(found), code
    if len(parts) < k + m:
        with pytest.raises(UsageError, match=f"needs {k + m} nodes"):
            plan_stripes(parts, k, m, align=align)
        return
    plan = plan_stripes(parts, k, m, align=align)
    assert sorted(n for group in plan.groups for n in group) == sorted(parts)
    lengths = {len(group) for group in plan.groups}
    assert min(lengths) >= k + m
    assert max(lengths) - min(lengths) <= 1
    covered = {node: [bytearray(n) for n in sizes] for node, sizes in parts.items()}
    for stripe in plan.stripes:
        assert len(set(stripe.nodes)) == len(stripe.nodes), "two shards on one node"
        assert len(stripe.parity) == m
        (group,) = (g for g in plan.groups if set(stripe.nodes) == set(g))
        assert len(stripe.data) == len(group) - m
        for piece in stripe.data:
            for span in piece.spans:
                assert span.at % align == 0
                assert span.count
                for at in range(span.at, span.at + span.count):
                    covered[piece.node][span.part][at] += 1
    for ranges in covered.values():
        assert all(set(part) <= {1} for part in ranges)


@given(parts_of, st.sampled_from(CODES))
def test_no_node_is_special_and_memory_stays_below_m_over_k(found, code):
    parts, (k, m) = numbered(found), code
    if len(parts) < k + m:
        return
    plan = plan_stripes(parts, k, m, align=4)
    for group in plan.groups:
        largest = max(sum(-(-n // 4) * 4 for n in parts[node]) for node in group)
        for node in group:
            assert len(plan.kept(node)) == m
            piece = 4 * math.ceil(largest / 4 / (len(group) - m))
            assert plan.parity_bytes(node) <= m * piece


def test_equal_nodes_keep_exactly_m_over_k():
    for nodes, k, m in ((6, 2, 1), (5, 3, 2), (12, 4, 2)):
        parts = {NodeId(n): [600] for n in range(nodes)}
        plan = plan_stripes(parts, k, m, align=1)
        widened = {len(group) - m for group in plan.groups}
        assert {plan.parity_bytes(n) for n in parts} == {600 * m // k for k in widened}


def test_more_nodes_than_groups_need_make_k_larger_and_never_smaller():
    shapes = {
        n: [len(g) for g in plan_stripes({NodeId(i): [9] for i in range(n)}, 2, 1).groups]
        for n in range(3, 12)
    }
    assert shapes[3] == [3]
    assert shapes[5] == [5]
    assert shapes[7] == [4, 3]
    assert shapes[11] == [4, 4, 3]


def test_neighbours_sit_in_different_groups():
    plan = plan_stripes({NodeId(n): [9] for n in range(9)}, 2, 1)
    assert plan.groups == ((0, 3, 6), (1, 4, 7), (2, 5, 8))


@pytest.mark.parametrize(
    ("nodes", "advice"),
    [
        (4, "ask for 2+2, or add 2 nodes"),
        (2, "ask for 1+1, or add 4 nodes"),
        (1, "turn parity off"),
        (0, "turn parity off"),
    ],
)
def test_too_few_nodes_are_told_what_would_do(nodes, advice):
    with pytest.raises(UsageError) as refused:
        plan_stripes({NodeId(n): [9] for n in range(nodes)}, 4, 2)
    assert str(refused.value).startswith(f"parity 4+2 needs 6 nodes and there are {nodes}: ")
    assert advice in str(refused.value)


@pytest.mark.parametrize(("k", "m", "align", "size"), [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1)])
def test_codes_that_do_not_exist(k, m, align, size):
    with pytest.raises(ValueError, match="no stripes"):
        plan_stripes({NodeId(n): [size] for n in range(3)}, k, m, align=align)
    with pytest.raises(ValueError, match="negative"):
        plan_stripes({NodeId(n): [-1] for n in range(3)}, 2, 1)


@pytest.mark.parametrize(("nodes", "k", "m"), WORLDS)
def test_a_thousand_random_losses_and_every_byte_comes_back(nodes, k, m):
    parts = sizes(nodes, seed=nodes)
    plan = plan_stripes(parts, k, m, align=16)
    memory = Memory(parts, plan, seed=nodes)
    rng = random.Random(nodes * 100 + k * 10 + m)
    for _ in range(1000):
        lost = losses(plan, rng)
        held = plan.holders(lost)
        found, sent = memory.run(held)
        assert found.keys() == data_places(plan, lost)
        for place, shard in found.items():
            assert shard == memory.shards[place], (lost, place)
        assert not sent.keys() & set(lost)


@given(parts_of, st.sampled_from(CODES), st.integers(0, 1 << 30), st.booleans())
def test_any_world_any_sizes_any_loss(found, code, seed, parity):
    parts, (k, m) = numbered(found), code
    if len(parts) < k + m:
        return
    plan = plan_stripes(parts, k, m, align=8)
    memory = Memory(parts, plan, seed)
    lost = losses(plan, random.Random(seed))
    back, _ = memory.run(plan.holders(lost), parity=parity)
    assert data_places(plan, lost) <= back.keys()
    assert all(shard == memory.shards[place] for place, shard in back.items())
    if parity:  # redundancy is whole again
        gone = memory.shards.keys() - plan.holders(lost).keys()
        assert back.keys() == {place for place in gone if memory.shards[place]}


@pytest.mark.parametrize(("nodes", "k", "m"), WORLDS)
def test_a_loss_beyond_m_is_refused_and_names_what_is_missing(nodes, k, m):
    parts = {NodeId(n): [1600] for n in range(nodes)}
    plan = plan_stripes(parts, k, m, align=16)
    memory = Memory(parts, plan, seed=0)
    rng = random.Random(0)
    for _ in range(50):
        lost = rng.sample(rng.choice(plan.groups), m + 1)
        with pytest.raises(IntegrityError, match=f"those of nodes .*{min(lost)}") as refused:
            memory.run(plan.holders(lost))
        # Only where all m + 1 are data or parity of one stripe is anything lost for good.
        assert any(f"bytes of node {node} cannot be rebuilt" in str(refused.value) for node in lost)
        assert "disk" in str(refused.value)


@pytest.mark.parametrize(("nodes", "k", "m"), [(5, 3, 2), (9, 3, 3)])
def test_a_corrupt_shard_counts_as_one_more_loss(nodes, k, m):
    parts = {NodeId(n): [1600] for n in range(nodes)}
    plan = plan_stripes(parts, k, m, align=16)
    memory = Memory(parts, plan, seed=1)
    rng = random.Random(1)
    for _ in range(100):
        lost = [rng.choice(plan.groups[0])]
        bad = rng.choice(sorted(plan.holders(lost)))
        back, _ = memory.run(plan.holders(lost, {bad}), parity=True)
        assert bad in back
        assert all(shard == memory.shards[place] for place, shard in back.items())


def test_reads_are_spread_over_the_survivors():
    parts = {NodeId(n): [32000] for n in range(8)}
    plan = plan_stripes(parts, 6, 2, align=16)
    _, sent = Memory(parts, plan, seed=0).run(plan.holders([NodeId(3)]))
    piece = max(stripe.length for stripe in plan.stripes)
    assert max(sent.values()) - min(sent.values()) <= piece
    assert NodeId(3) not in sent


def test_what_is_empty_is_neither_read_nor_lost():
    parts = {NodeId(0): [64], NodeId(1): [], NodeId(2): [], NodeId(3): []}
    plan = plan_stripes(parts, 2, 2, align=16)
    memory = Memory(parts, plan, seed=0)
    # Three of four are gone, and of three kinds of shards only those with bytes count.
    assert memory.run(plan.holders([NodeId(1), NodeId(2), NodeId(3)])) == ({}, {})
    back, _ = memory.run(plan.holders([NodeId(0), NodeId(1)]))
    assert b"".join(shard for _, shard in sorted(back.items())) == memory.parts[NodeId(0)][0]


def test_nothing_to_store_needs_nothing():
    parts = {NodeId(n): list[int]() for n in range(3)}
    plan = plan_stripes(parts, 2, 1)
    assert plan.parity_bytes(NodeId(0)) == 0
    assert Memory(parts, plan, seed=0).run({}) == ({}, {})


def test_a_code_as_the_command_line_says_it():
    assert Code.parse("4+2") == (4, 2)
    assert Code.parse("") is None
    assert Code.parse("3+0") is None
    for text, words in (
        ("4", "such as 4"),
        ("a+1", "such as 4"),
        ("4+-1", "such as 4"),
        ("0+1", "k is at least 1"),
        ("250+6", "at most 255"),
    ):
        with pytest.raises(UsageError, match=words):
            Code.parse(text)


@given(st.integers(2, 60), st.sampled_from(CODES))
def test_a_group_is_dealt_to_itself(nodes, code):
    if nodes < sum(code):
        return
    for group in deal(map(NodeId, range(nodes)), Code(*code)):
        assert deal(group, Code(*code)) == (group,), "its members see the same stripes"
