"""The overlapped linears give what the unsplit layer gives, forward and backward."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ftkit.collectives.modelled import ModelledGroup, Network
from ftkit.collectives.overlap import cuda, linear
from ftkit.collectives.overlap.auto import AutoChunks
from ftkit.collectives.overlap.modules import ColumnParallelLinear, RowParallelLinear
from ftkit.collectives.overlap.parts import bounds, growing, pieces, shrinking, sources, targets
from ftkit.core.errors import GenerationAborted, UsageError

from .ranks import everywhere, on

#: dtype, and how far a result may be off, relative to the largest element.
DTYPES = [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]

#: Shapes of the input, the dimension that is split, ranks, chunks: odd, and with empty parts.
SHAPES = [
    ((12, 8), 0, 2, 1),
    ((13, 7), 0, 3, 4),
    ((5, 6), 0, 4, 3),  # two rows each for two ranks, one for the third, none for the last
    ((3, 11, 5), 1, 2, 2),
    ((7, 2, 3, 6), 0, 3, 16),
    ((2, 1, 4), 1, 2, 2),  # one row for the first, none for the other
    ((6, 4), 0, 1, 2),
]


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    off = (got.double() - wanted.double()).abs()
    scale = max(1e-30, wanted.double().abs().max().item() if wanted.numel() else 1.0)
    assert off.numel() == 0 or off.max().item() <= tolerance * scale


def problem(shape: tuple[int, ...], dtype: torch.dtype, out: int = 10) -> Any:
    """Input, weight, bias, gradient of the output; and what the whole layer makes of them."""
    made = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=made, dtype=torch.float64).to(dtype)
    weight = torch.randn(out, shape[-1], generator=made, dtype=torch.float64).to(dtype)
    bias = torch.randn(out, generator=made, dtype=torch.float64).to(dtype)
    grad = torch.randn(*shape[:-1], out, generator=made, dtype=torch.float64).to(dtype)
    leaves = [t.double().clone().requires_grad_() for t in (x, weight, bias)]
    y = functional.linear(*leaves)
    y.backward(grad.double())
    wanted = [t.to(dtype) for t in (y.detach(), *(leaf.grad for leaf in leaves))]  # type: ignore[union-attr]
    return x, weight, bias, grad, wanted


def part(t: torch.Tensor, dim: int, group: ModelledGroup) -> torch.Tensor:
    start, end = bounds(t.shape[dim], group.size(), group.rank())
    return t.narrow(dim, start, end - start).contiguous()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("shape", "dim", "size", "chunks"), SHAPES)
@pytest.mark.parametrize("kind", ["row", "column", "row whole", "column whole"])
def test_every_form_is_the_whole_layer(
    kind: str,
    shape: tuple[int, ...],
    dim: int,
    size: int,
    chunks: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    x, weight, bias, grad, (y, of_x, of_weight, of_bias) = problem(shape, dtype)
    last = x.ndim - 1

    def rank(group: ModelledGroup) -> None:
        def leaf(t: torch.Tensor) -> torch.Tensor:
            return t.detach().clone().requires_grad_()

        def mine(t: torch.Tensor, d: int) -> torch.Tensor:
            return part(t, d, group)

        if kind.startswith("row"):
            leaves = leaf(mine(x, last)), leaf(mine(weight, 1)), leaf(bias)
            wanted = mine(of_x, last), mine(of_weight, 1), of_bias
        else:
            given = x if "whole" in kind else mine(x, dim)
            leaves = leaf(given), leaf(mine(weight, 0)), leaf(mine(bias, 0))
            wanted = (
                of_x if "whole" in kind else mine(of_x, dim),
                mine(of_weight, 0),
                mine(of_bias, 0),
            )
        options: dict[str, Any] = {"group": group, "chunks": chunks}
        match kind:
            case "row":
                got = linear.linear_reduce_scatter(*leaves, dim=dim, **options)
                out, back = mine(y, dim), mine(grad, dim)
            case "column":
                got = linear.all_gather_linear(*leaves, dim=dim, rows=shape[dim], **options)
                out, back = mine(y, last), mine(grad, last)
            case "row whole":
                got = linear.linear_all_reduce(*leaves, **options)
                out, back = y, grad
            case _:
                got = linear.linear_replicated(*leaves, **options)
                out, back = mine(y, last), mine(grad, last)
        close(got, out, tolerance)
        got.backward(back)
        for one, expected in zip(leaves, wanted, strict=True):
            assert one.grad is not None
            close(one.grad, expected, tolerance)

    everywhere(size, rank)


def test_chunks_change_no_bit_of_a_forward() -> None:
    x, weight, *_ = problem((40, 16), torch.bfloat16)

    def rank(group: ModelledGroup) -> list[bytes]:
        ours = part(x, 1, group), part(weight, 1, group)
        made = [
            linear.linear_reduce_scatter(*ours, group=group, chunks=chunks) for chunks in (1, 3, 8)
        ]
        return [m.view(torch.uint8).numpy().tobytes() for m in made]

    for rows in everywhere(3, rank):
        assert len(set(rows)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit_of_a_weights_gradient(dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(n, 16, generator=made).to(dtype) for n in (31, 24))
    given = torch.randn(31, 24, generator=made).to(dtype)

    def rank(group: ModelledGroup) -> list[torch.Tensor]:
        start, end = linear.own_rows(31, group)
        found = []
        for chunks in (1, 3, AutoChunks(group.network.now)):
            leaf = weight.clone().requires_grad_()
            linear.linear_reduce_scatter(x, leaf, group=group, chunks=chunks).backward(
                given[start:end]
            )
            assert leaf.grad is not None
            found.append(leaf.grad)
        return found

    for first, *others in everywhere(3, rank):
        assert all(torch.equal(first, other) for other in others)
        wanted = given.double().t() @ x.double()
        torch.testing.assert_close(first.double(), wanted, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("kind", ["row", "column"])
def test_parts_of_one_weight_add_up_to_the_gradients_of_the_whole(kind: str) -> None:
    x, weight, bias, *_ = problem((4, 6), torch.float64, out=4)

    def rank(group: ModelledGroup) -> None:
        # All ranks perturb alike: the function is of the whole, seen from each.
        def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            if kind == "row":
                return linear.linear_all_reduce(
                    _take(x, 1, group), _take(weight, 1, group), bias, group=group, chunks=2
                )
            return linear.linear_replicated(
                x, _take(weight, 0, group), _take(bias, 0, group), group=group, chunks=2
            )

        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves)
        total = y.square().sum()
        total.backward()
        reference = [t.clone().requires_grad_() for t in (x, weight, bias)]
        functional.linear(*reference).square().sum().backward()
        summed = [leaf.grad.clone() for leaf in leaves]
        shared = {"row": 2, "column": 0}[kind]
        for i, of_leaf in enumerate(summed):
            if i != shared:  # each rank has the gradient of its part, and zeros elsewhere
                group.allreduce([of_leaf]).wait()
            close(of_leaf, reference[i].grad, 1e-12)

    everywhere(2, rank)


def _take(t: torch.Tensor, dim: int, group: ModelledGroup) -> torch.Tensor:
    start, end = bounds(t.shape[dim], group.size(), group.rank())
    return t.narrow(dim, start, end - start)


@pytest.mark.parametrize("sequence", [True, False])
def test_a_block_of_modules_trains_like_the_whole_block(sequence: bool) -> None:
    torch.manual_seed(0)
    up, down = nn.Linear(6, 10), nn.Linear(10, 6)
    x = torch.randn(8, 6)
    whole = down(functional.gelu(up(x)))
    whole.square().sum().backward()

    def rank(group: ModelledGroup) -> None:
        options: dict[str, Any] = {"group": group, "sequence": sequence, "chunks": 2}
        first, second = (
            ColumnParallelLinear.of(up, **options),
            RowParallelLinear.of(down, **options),
        )
        y = second(functional.gelu(first(part(x, 0, group) if sequence else x)))
        close(y, part(whole.detach(), 0, group) if sequence else whole.detach(), 1e-6)
        y.square().sum().backward()
        wanted = [
            (first.weight, part(up.weight.grad, 0, group)),  # type: ignore[arg-type]
            (first.bias, part(up.bias.grad, 0, group)),  # type: ignore[arg-type]
            (second.weight, part(down.weight.grad, 1, group)),  # type: ignore[arg-type]
            (second.bias, down.bias.grad),
        ]
        for parameter, expected in wanted:
            close(parameter.grad, expected, 1e-5)  # type: ignore[union-attr, arg-type]

    everywhere(2, rank)


def test_rows_that_do_not_fit_are_refused_in_words() -> None:
    def rank(group: ModelledGroup) -> None:
        if group.rank():
            return
        with pytest.raises(ValueError, match="has 3 of 6 rows, not 5"):
            linear.all_gather_linear(
                torch.zeros(5, 2), torch.zeros(2, 2), group=group, rows=6, chunks=1
            )
        with pytest.raises(ValueError, match="dim must be one of the first 1"):
            linear.linear_reduce_scatter(torch.zeros(5, 2), torch.zeros(2, 2), group=group, dim=1)
        with pytest.raises(ValueError, match="counted from 1"):
            linear.linear_all_reduce(torch.zeros(5, 2), torch.zeros(2, 2), group=group, chunks=0)

    everywhere(2, rank)


@pytest.mark.parametrize("kind", ["row", "column", "row whole", "column whole"])
def test_layers_that_differ_on_one_rank_only_are_cut_alike_on_all(kind: str) -> None:
    """Of 9 and 10 columns the first of two ranks has 5 and 5, and the second 4 and 5."""

    def rank(group: ModelledGroup) -> int:
        auto = AutoChunks(group.network.now)
        options: dict[str, Any] = {"group": group, "chunks": auto}
        for _ in range(12):
            for width in (9, 10):
                start, end = bounds(width, 2, group.rank())
                x, own = torch.ones(32, 6).requires_grad_(), torch.ones(end - start, 6)
                row = torch.ones(32, end - start).requires_grad_()
                match kind:
                    case "row":
                        got = linear.linear_reduce_scatter(row, own.t(), **options)
                    case "column":
                        got = linear.all_gather_linear(x, own, **options)
                    case "row whole":
                        got = linear.linear_all_reduce(row, own.t(), **options)
                    case _:
                        got = linear.linear_replicated(x, own, **options)
                got.sum().backward()
        return len(auto._tuners)

    one, other = everywhere(2, rank)
    assert one == other


def test_a_fault_in_the_middle_ends_the_call_on_all_and_a_bug_on_one_too() -> None:
    x, weight, *_ = problem((12, 8), torch.float32)

    def faulty(group: ModelledGroup) -> str:
        kept = part(x, 1, group).requires_grad_()
        try:
            if group.rank() == 2:
                raise ZeroDivisionError
            linear.linear_reduce_scatter(kept, part(weight, 1, group), group=group, chunks=2)
        except ZeroDivisionError:
            group.network.sleep(0.01)
            group.abort()
            return "raised"
        except GenerationAborted as error:
            return str(error)
        return "done"

    network = Network(3, rate=1e3)
    *ended, raised = on(network, faulty)
    assert raised == "raised"
    for rank, words in enumerate(ended):
        assert words.startswith(f"linear_reduce_scatter over rank {rank} of 3: ")
    # The same call over the same members works again.
    assert on(
        network,
        lambda g: linear.linear_reduce_scatter(
            part(x, 1, g), part(weight, 1, g), group=g, chunks=2
        ).shape[0],
    ) == [4, 4, 4]


def test_an_error_of_the_user_inside_a_call_aborts_the_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = linear.times

    def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.shape[0] == 3 and a[0, 0] == 77:
            raise MemoryError("no room")
        return plain(a, b)

    monkeypatch.setattr(linear, "times", times)

    def rank(group: ModelledGroup) -> type[BaseException] | None:
        x = torch.ones(6, 2)
        x[:] = 77 if group.rank() == 0 else 1
        try:
            linear.linear_reduce_scatter(x, torch.ones(2, 2), group=group, chunks=1)
        except (MemoryError, GenerationAborted) as error:
            return type(error)
        return None

    assert everywhere(2, rank, rate=1e3) == [MemoryError, GenerationAborted]


def test_parts_cover_all_rows_once_and_ours_come_last() -> None:
    for rows in (0, 1, 5, 12):
        for size in (1, 2, 3, 5):
            cut = [bounds(rows, size, r) for r in range(size)]
            assert [list(range(rows))[a:b] for a, b in cut] == [
                c.tolist() for c in torch.arange(rows).chunk(size)
            ] + [[]] * (size - len(torch.arange(rows).chunk(size)))
            for a, b in cut:
                for spans in (
                    list(pieces(a, b, 3)),
                    list(growing(a, b, size, 3)),
                    list(shrinking(a, b, size, 3)),
                ):
                    assert [i for s, e in spans for i in range(s, e)] == list(range(a, b))
                    assert all(s < e for s, e in spans)
    assert [b - a for a, b in growing(3, 153, 2, 4)] == [10, 20, 40, 80]
    assert [b - a for a, b in shrinking(3, 22, 3, 3)] == [9, 6, 4]
    assert targets(4, 1) == [2, 3, 0]
    # Who we serve first expects us first.
    assert all(sources(4, targets(4, r)[i])[i] == r for r in range(4) for i in range(3))


def test_what_would_hang_on_cuda_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "serves", lambda x, group: True)

    def rank(group: ModelledGroup) -> None:
        x, weight = torch.ones(4, 2), torch.ones(2, 2, requires_grad=True)
        with pytest.raises(UsageError, match="no backward on CUDA"):
            linear.linear_reduce_scatter(x, weight, group=group)
        with pytest.raises(UsageError, match="divided unevenly"):
            linear.all_gather_linear(x, weight, group=group, rows=7)

    everywhere(2, rank)


FORMS = {
    "row": linear.linear_reduce_scatter,
    "column": linear.all_gather_linear,
    "row whole": linear.linear_all_reduce,
    "column whole": linear.linear_replicated,
}


def our_leaves(kind: str, group: ModelledGroup) -> list[torch.Tensor]:
    """Input, weight and bias of this rank, in float32."""
    x, weight, bias, *_ = problem((6, 8), torch.float32, out=4)
    rows = kind.startswith("row")
    mine = [
        part(x, 1, group) if rows else x if "whole" in kind else part(x, 0, group),
        part(weight, 1 if rows else 0, group),
        bias if rows else part(bias, 0, group),
    ]
    return [t.detach().clone().requires_grad_() for t in mine]


@pytest.mark.parametrize("kind", FORMS)
def test_autocast_does_what_it_does_to_the_whole_layer(kind: str) -> None:
    def rank(group: ModelledGroup) -> None:
        leaves, halves = our_leaves(kind, group), our_leaves(kind, group)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = FORMS[kind](*leaves, group=group, chunks=2)
        given = [t.bfloat16() for t in halves]
        wanted = FORMS[kind](*given, group=group, chunks=2)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, wanted)
        y.float().square().sum().backward()
        wanted.float().square().sum().backward()
        for leaf, half in zip(leaves, halves, strict=True):
            assert leaf.grad is not None
            assert leaf.grad.dtype == torch.float32
            assert torch.equal(leaf.grad, half.grad)  # type: ignore[arg-type]

    everywhere(2, rank)


@pytest.mark.parametrize("kind", FORMS)
def test_autocast_around_backward_alone_changes_nothing(kind: str) -> None:
    def rank(group: ModelledGroup) -> None:
        found = []
        for enabled in (False, True):
            leaves = our_leaves(kind, group)
            loss = FORMS[kind](*leaves, group=group, chunks=2).square().sum()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss.backward()
            found.append([leaf.grad for leaf in leaves])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)

    everywhere(2, rank)


@pytest.mark.parametrize("kind", FORMS)
def test_a_gradients_gradient_is_refused_in_words(kind: str) -> None:
    """What the others sent is not in this rank's graph: it would be wrong."""

    def rank(group: ModelledGroup) -> None:
        leaves = our_leaves(kind, group)
        y = FORMS[kind](*leaves, group=group, chunks=2)
        (of_x,) = torch.autograd.grad(y.sum(), leaves[0], create_graph=True)
        with pytest.raises(UsageError, match="no second derivative"):
            of_x.sum().backward()

    everywhere(2, rank)


@pytest.mark.parametrize("kind", ["row whole", "column whole"])
def test_one_token_alone_needs_no_dimension(kind: str) -> None:
    def rank(group: ModelledGroup) -> None:
        x, weight, bias = our_leaves(kind, group)
        one, same = (x.detach()[0].requires_grad_(), x.detach()[:1].requires_grad_())
        y, wanted = (FORMS[kind](t, weight, bias, group=group, chunks=2) for t in (one, same))
        assert torch.equal(y, wanted[0])
        (y.sum() + wanted.sum()).backward()
        assert torch.equal(one.grad, same.grad[0])  # type: ignore[arg-type, index]

    everywhere(2, rank)


def test_chunks_of_another_kind_are_refused_in_words() -> None:
    def rank(group: ModelledGroup) -> None:
        for chunks in ("atuo", 2.0, None):
            with pytest.raises(ValueError, match=f'number from 1 or "auto", got {chunks!r}'):
                linear.linear_all_reduce(
                    torch.zeros(5, 2),
                    torch.zeros(2, 2),
                    group=group,
                    chunks=chunks,  # type: ignore[arg-type]
                )

    everywhere(1, rank)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("kind", [RowParallelLinear, ColumnParallelLinear])
def test_a_compiled_model_runs_it_as_it_is(kind: Any) -> None:
    def rank(group: ModelledGroup) -> None:
        torch.manual_seed(0)
        layer = kind.of(nn.Linear(12, 8), group=group)
        model = nn.Sequential(nn.Linear(12, 12), layer, nn.GELU())
        x = torch.randn(6, 12)
        wanted = model(x)
        wanted.square().sum().backward()
        before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        got = torch.compile(model, backend="eager")(x)
        assert torch.equal(got, wanted)
        got.square().sum().backward()
        after = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(after) == len(before) == 4
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))

    everywhere(1, rank)


def test_a_copy_of_a_layer_is_of_the_same_ranks() -> None:
    def rank(group: ModelledGroup) -> None:
        layer = RowParallelLinear.of(nn.Linear(6, 4), group=group)
        other: Any = copy.deepcopy(nn.ModuleList([layer]))[0]
        assert other.group is group
        assert other.weight is not layer.weight
        assert torch.equal(other.weight, layer.weight)
        x = torch.randn(6, 3)
        assert torch.equal(other(x), layer(x))

    everywhere(2, rank)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", [RowParallelLinear, ColumnParallelLinear])
def test_on_one_gpu_it_is_the_plain_layer(kind: Any) -> None:
    def rank(group: ModelledGroup) -> None:
        torch.manual_seed(0)
        # A bias is added by itself here, which would round once more.
        plain = nn.Linear(256, 128, bias=False, device="cuda", dtype=torch.bfloat16)
        layer = kind.of(plain, group=group)
        x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
        mine, other = (x.clone().requires_grad_() for _ in range(2))
        y, wanted = layer(mine), plain(other)
        assert torch.equal(y, wanted), "to the bit"
        got = torch.autograd.grad(y.square().sum(), [mine, layer.weight])
        true = torch.autograd.grad(wanted.square().sum(), [other, plain.weight])
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a, b)

    everywhere(1, rank)
