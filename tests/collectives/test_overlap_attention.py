"""Context-parallel attention is attention: by every route, forward and backward."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from ftkit.collectives.modelled import Duplex, ModelledGroup
from ftkit.collectives.overlap.attention import ContextParallel, context_parallel_attention
from ftkit.collectives.overlap.routes import Load, Rotate, Shapes, cheapest, load
from ftkit.collectives.overlap.sequence import Layout, blocks
from ftkit.core.errors import GenerationAborted, UsageError

from .ranks import everywhere, timed

ROUTES = list(Rotate)


def whole(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, scale: float | None = None
) -> torch.Tensor:
    return functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=True
    )


def problem(
    tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, kv_tokens: int | None = None
) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, of the whole sequence."""
    made = torch.Generator().manual_seed(5)
    shapes = [(2, heads, tokens, 8)] + [(2, kv_heads, kv_tokens or tokens, 8)] * 2
    shapes.append(shapes[0])
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for s in shapes]


def compare(
    tensors: list[torch.Tensor],
    layouts: tuple[Layout, Layout],
    *,
    causal: bool,
    rotate: Any,
    tolerance: float,
) -> None:
    q, k, v, grad = tensors
    leaves = [t.double().clone().requires_grad_() for t in (q, k, v)]
    out = whole(*leaves, causal=causal)
    out.backward(grad.double())
    wanted = [out.detach(), *(leaf.grad for leaf in leaves)]
    largest = max(expected.abs().max() for expected in wanted if expected is not None)
    queries, keys = layouts

    def rank(group: ModelledGroup) -> None:
        def ours(t: torch.Tensor, layout: Layout) -> torch.Tensor:
            return layout.take(t, group.rank(), 2)

        mine = [ours(q, queries), ours(k, keys), ours(v, keys)]
        leaves = [t.clone().requires_grad_() for t in mine]
        got = context_parallel_attention(
            *leaves, group=group, is_causal=causal, rotate=rotate, layout=queries, kv_layout=keys
        )
        got.backward(ours(grad, queries))
        results = [got.detach(), *(leaf.grad for leaf in leaves)]
        for result, expected, layout in zip(
            results, wanted, [queries, queries, keys, keys], strict=True
        ):
            assert result is not None
            assert expected is not None
            assert result.dtype == q.dtype
            mine_ = ours(expected, layout)
            assert result.shape == mine_.shape
            off = (result.double() - mine_).abs()
            scale = expected.abs().max()
            if scale < tolerance * largest:
                scale = largest  # of one token all cancels: what is left is rounding
            assert not off.numel() or off.max() <= tolerance * scale

    everywhere(queries.size, rank)


@pytest.mark.parametrize("rotate", ROUTES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 3), (8, 2)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_every_route_is_exact(
    rotate: Rotate, heads: int, kv_heads: int, size: int, causal: bool
) -> None:
    layout = Layout(8 * size, size, zigzag=causal)
    tensors = problem(8 * size, heads, kv_heads, torch.float64)
    compare(tensors, (layout, layout), causal=causal, rotate=rotate, tolerance=1e-13)


@pytest.mark.parametrize("rotate", ROUTES)
@pytest.mark.parametrize("zigzag", [True, False])
@pytest.mark.parametrize(("tokens", "size"), [(13, 3), (7, 4), (5, 4), (2, 3), (1, 2)])
def test_parts_may_be_uneven_or_empty(rotate: Rotate, zigzag: bool, tokens: int, size: int) -> None:
    layout = Layout(tokens, size, zigzag=zigzag)
    tensors = problem(tokens, 4, 2, torch.float32)
    compare(tensors, (layout, layout), causal=True, rotate=rotate, tolerance=5e-6)
    compare(tensors, (layout, layout), causal=False, rotate=rotate, tolerance=5e-6)


@pytest.mark.parametrize("rotate", ROUTES)
def test_half_precision_is_as_good_as_that_of_one_process(rotate: Rotate) -> None:
    layout = Layout(24, 3, zigzag=True)
    tensors = problem(24, 4, 2, torch.bfloat16)
    compare(tensors, (layout, layout), causal=True, rotate=rotate, tolerance=1.5e-2)


@pytest.mark.parametrize("rotate", ROUTES)
@pytest.mark.parametrize(("tokens", "kv_tokens"), [(6, 20), (11, 2)])
def test_queries_may_be_of_another_sequence(rotate: Rotate, tokens: int, kv_tokens: int) -> None:
    layouts = Layout(tokens, 3), Layout(kv_tokens, 3)
    tensors = problem(tokens, 4, 2, torch.float64, kv_tokens)
    compare(tensors, layouts, causal=False, rotate=rotate, tolerance=1e-13)


def test_the_whole_sequence_comes_back_and_zigzag_is_fair() -> None:
    for tokens, size, zigzag in ((13, 3, True), (13, 3, False), (1, 4, True), (16, 4, True)):
        layout = Layout(tokens, size, zigzag)
        x = torch.arange(tokens)
        parts = [layout.take(x, r, 0) for r in range(size)]
        assert [len(p) for p in parts] == [layout.tokens(r) for r in range(size)]
        assert torch.equal(layout.join(parts, 0), x)
    fair = Layout(64, 4, zigzag=True)
    work = [
        sum(
            (b.queries.stop - b.queries.start) * (b.keys.stop - b.keys.start) / (1 + b.diagonal)
            for other in range(4)
            for b in blocks(fair.spans(rank), fair.spans(other), causal=True)
        )
        for rank in range(4)
    ]
    assert max(work) == min(work)


def test_blocks_are_what_a_causal_mask_leaves() -> None:
    for tokens, size, zigzag in ((13, 3, True), (9, 4, True), (10, 3, False)):
        layout = Layout(tokens, size, zigzag)
        positions = [layout.take(torch.arange(tokens), r, 0) for r in range(size)]
        for a in range(size):
            for b in range(size):
                seen = torch.zeros(layout.tokens(a), layout.tokens(b), dtype=torch.bool)
                for block in blocks(layout.spans(a), layout.spans(b), causal=True):
                    part = seen[block.queries, block.keys]
                    assert not part.any(), "no pair is seen twice"
                    part |= torch.ones_like(part).tril() if block.diagonal else True
                assert torch.equal(seen, positions[a][:, None] >= positions[b][None, :])


MHA = Shapes(size=4, queries=512, keys=512, heads=8, kv_heads=8, width=64, item=4, sum_item=4)
GQA = Shapes(size=4, queries=512, keys=512, heads=8, kv_heads=2, width=64, item=4, sum_item=4)
Q = 512 * 8 * 64 * 4


def test_the_bytes_are_those_of_the_table() -> None:
    lse = 512 * 8 * 4
    assert load(Rotate.KV, MHA, backward=False) == Load(2 * Q, 2 * Q)
    assert load(Rotate.BIDIRECTIONAL, MHA, backward=False) == Load(Q, 2 * Q)
    assert load(Rotate.QUERY, MHA, backward=False) == Load(Q + lse, 2 * Q + lse)
    assert load(Rotate.BIDIRECTIONAL, GQA, backward=True) == Load(Q / 2, Q)
    assert load(Rotate.QUERY, GQA, backward=True) == Load(3 * Q + lse, 4 * Q + lse)
    assert load(Rotate.ALLGATHER, GQA, backward=True) == Load(Q, Q)


def test_the_cheapest_route_is_taken() -> None:
    def with_(shapes: Shapes, **more: int) -> Shapes:
        fields = {name: getattr(shapes, name) for name in Shapes.__slots__}
        return Shapes(**{**fields, **more})

    for backward in (False, True):
        assert cheapest(MHA, backward=backward) is Rotate.BIDIRECTIONAL
        assert cheapest(GQA, backward=backward) is Rotate.BIDIRECTIONAL
        assert cheapest(with_(GQA, size=2), backward=backward) is Rotate.KV
        assert cheapest(with_(GQA, kv_heads=1), backward=backward) is Rotate.KV
        mesh = with_(MHA, mesh=True)
        assert load(Rotate.ALLGATHER, mesh, backward=backward).busiest == pytest.approx(
            load(Rotate.KV, MHA, backward=backward).busiest / 3
        )
        assert cheapest(mesh, backward=backward) is Rotate.ALLGATHER
        assert cheapest(with_(GQA, mesh=True, size=2), backward=backward) is Rotate.KV
        # A few queries over a long sequence, as when a prompt is read in chunks.
        assert cheapest(with_(GQA, queries=16), backward=backward) is Rotate.QUERY


@pytest.mark.parametrize(("kv_heads", "backward"), [(8, False), (8, True), (2, False), (2, True)])
def test_what_is_on_the_wire_is_what_the_table_says(kv_heads: int, backward: bool) -> None:
    """Counted by the network."""
    size, tokens = 4, 16
    shapes = Shapes(
        size=size,
        queries=tokens,
        keys=tokens,
        heads=8,
        kv_heads=kv_heads,
        width=16,
        item=4,
        sum_item=4,
    )
    for rotate in (Rotate.KV, Rotate.BIDIRECTIONAL, Rotate.ALLGATHER):
        counted = list[tuple[int, int]]()

        def rank(group: ModelledGroup, rotate: Rotate = rotate, counted: Any = counted) -> None:
            q = torch.randn(1, 8, tokens, 16).requires_grad_()
            k = torch.randn(1, kv_heads, tokens, 16).requires_grad_()
            out = context_parallel_attention(
                q, k, k.clone(), group=group, rotate=rotate, layout=Layout(size * tokens, size)
            )
            group.barrier().wait()
            before = group.network.carried
            out.sum().backward()
            group.barrier().wait()
            counted.append((before, group.network.carried))

        everywhere(size, rank)
        step = load(rotate, shapes, backward=backward).total * size
        # Nobody is slower than who looks last, and nobody faster than who looks first.
        there = min(before for before, _ in counted)
        found = max(after for _, after in counted) - there if backward else there
        assert found == step * (size - 1)


@pytest.mark.parametrize("duplex", list(Duplex))
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_two_directions_are_faster_where_there_are_two_and_never_slower(
    duplex: Duplex, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def took(rotate: Rotate) -> float:
        def rank(group: ModelledGroup) -> None:
            q = torch.randn(1, 8, 16, 16).requires_grad_()
            k = torch.randn(1, kv_heads, 16, 16)
            leaves = [q, k.clone().requires_grad_(), k.clone().requires_grad_()]
            out = context_parallel_attention(*leaves, group=group, rotate=rotate)
            out.sum().backward()

        return timed(4, rank, rate=1e6, duplex=duplex)

    one, both, everybody = (took(r) for r in (Rotate.KV, Rotate.BIDIRECTIONAL, Rotate.ALLGATHER))
    if duplex is Duplex.WIRES:
        assert both <= 0.51 * one
    else:
        assert both <= 1.02 * min(one, everybody)


def test_inside_the_block_a_models_own_attention_is_split() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    project = torch.nn.Linear(16, 48)
    x = torch.randn(2, 24, 16)

    def model(x: torch.Tensor) -> torch.Tensor:
        q, k, v = project(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: torch.Tensor = layer.linear2(layer.linear1(y.transpose(1, 2).flatten(2)).relu())
        return result

    wanted = model(x).detach()

    def rank(group: ModelledGroup) -> None:
        with ContextParallel(length=24, is_causal=True, group=group) as context:
            ours = model(context.shard(x, 1))
            assert torch.equal(x[:, context.positions], context.shard(x, 1))
            torch.testing.assert_close(ours, context.shard(wanted, 1), rtol=1e-5, atol=1e-6)
            with pytest.raises(UsageError, match="is_causal=True"):
                functional.scaled_dot_product_attention(ours, ours, ours)
            with pytest.raises(UsageError, match="mask"):
                functional.scaled_dot_product_attention(ours, ours, ours, attn_mask=ours)

    everywhere(3, rank)


def test_what_does_not_fit_is_refused_in_words() -> None:
    def rank(group: ModelledGroup) -> None:
        q = torch.zeros(1, 4, 5, 8)
        refused: list[tuple[str, tuple[torch.Tensor, ...], dict[str, Any]]] = [
            ("pass the layout", (q, q, q), {"is_causal": True, "layout": Layout(12, 2, True)}),
            ("cannot share", (q, q[:, :3], q[:, :3]), {}),
            ("of one batch and width", (q, q[..., :4], q[..., :4]), {}),
            ("are of", (q, q.double(), q.double()), {}),
            (
                "of the same tokens",
                (q, q, q),
                {"is_causal": True, "layout": Layout(10, 2), "kv_layout": Layout(10, 2, True)},
            ),
        ]
        for words, tensors, options in refused:
            with pytest.raises(UsageError, match=words):
                context_parallel_attention(*tensors, group=group, **options)

    everywhere(2, rank)


def test_uneven_parts_without_a_layout_are_refused_on_all_ranks() -> None:
    def rank(group: ModelledGroup) -> None:
        q = torch.zeros(1, 2, 4 + 2 * group.rank(), 8)
        even = torch.zeros(1, 2, 4, 8)
        for tensors in ((q, q, q), (even, q, q)):
            with pytest.raises(UsageError, match=r"\[\[4, 4\], \[., 6\]\].* pass the layout"):
                context_parallel_attention(*tensors, group=group)

    everywhere(2, rank)


def test_a_fault_on_the_way_ends_it_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(group: ModelledGroup) -> str:
        q = torch.randn(1, 4, 8, 8)
        if group.rank() == 2:
            group.network.sleep(0.002)
            group.abort()
            return "aborted"
        try:
            context_parallel_attention(q, q, q, group=group)
        except GenerationAborted as error:
            return str(error)
        return "done"

    first, second, third = everywhere(3, rank, rate=1e6)
    assert third == "aborted"
    for words in (first, second):
        assert words.startswith("context_parallel_attention over rank")


def test_autocast_does_what_it_does_to_attention() -> None:
    """After a rotary embedding in float32, v alone is of half precision."""

    def rank(group: ModelledGroup) -> None:
        q, k, v, grad = problem(8, 4, 2, torch.float32)
        layout = Layout(8, 2, zigzag=True)
        parts = [layout.take(t, group.rank(), 2) for t in (q, k, v, grad)]
        leaves = [t.requires_grad_() for t in (parts[0], parts[1], parts[2].bfloat16())]
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            ContextParallel(length=8, is_causal=True, group=group),
        ):
            got = functional.scaled_dot_product_attention(
                leaves[0], leaves[1], leaves[2], is_causal=True, enable_gqa=True
            )
        halves = [t.detach().bfloat16() for t in (q, k, v)]
        wanted = layout.take(whole(*halves, causal=True), group.rank(), 2)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
        got.backward(parts[3].bfloat16())
        assert [t.grad.dtype for t in leaves if t.grad is not None] == [t.dtype for t in leaves]

    everywhere(2, rank)


def test_a_gradients_gradient_is_refused_in_words() -> None:
    def rank(group: ModelledGroup) -> None:
        q, k, v, _ = (t.requires_grad_() for t in problem(4, 4, 2, torch.float32))
        y = context_parallel_attention(q, k, v, group=group)
        (of_q,) = torch.autograd.grad(y.sum(), q, create_graph=True)
        with pytest.raises(UsageError, match="no second derivative"):
            of_q.sum().backward()

    everywhere(2, rank)
