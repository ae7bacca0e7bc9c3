"""A woven stack of layers computes what the plain one does; what it refuses."""

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ftkit.collectives.modelled import ModelledGroup
from ftkit.collectives.overlap import all_gather_linear, weave_run
from ftkit.collectives.overlap.linear import own_rows
from ftkit.collectives.overlap.norm import add_rms_norm, rms_norm_backward
from ftkit.collectives.overlap.weave import Layer, Weave
from ftkit.core.errors import GenerationAborted, UsageError

from .ranks import everywhere
from .weaving import WIDTH, Mlp, layers, plain, woven


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(
    ("size", "batch", "tokens", "dtype", "tolerance"),
    [
        (2, 4, 5, torch.float64, 1e-12),
        (3, 3, 7, torch.float32, 1e-4),  # halves of one and of two samples; rows of padding
        (2, 1, 3, torch.float32, 1e-4),  # nothing to split
        (1, 2, 3, torch.float64, 1e-12),
        (2, 4, 6, torch.bfloat16, 0.06),
    ],
)
def test_a_woven_stack_is_the_plain_one(
    split: bool, size: int, batch: int, tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    made = torch.Generator().manual_seed(7)
    x, grad = (torch.randn(batch, tokens, WIDTH, generator=made, dtype=torch.float64) for _ in "xg")
    whole = [layer.double() for layer in layers(0, 1, dtype)]
    leaf = x.to(dtype).double().requires_grad_()
    y = plain(leaf, whole)
    y.backward(grad)

    def rank(group: ModelledGroup) -> Any:
        stack = layers(group.rank(), size, dtype)
        ours = x.to(dtype).requires_grad_()
        out = woven(group, stack, split)(ours)
        out.backward(grad.to(dtype))
        return out.detach(), ours.grad, [[p.grad for p in one.parameters()] for one in stack]

    def close(got: Any, wanted: Any) -> None:
        off = (got.double() - wanted).abs().max().item()
        assert off <= tolerance * wanted.abs().max().item()

    results = everywhere(size, rank)
    for out, of_x, _ in results:
        close(out, y.detach())
        close(of_x, leaf.grad)
    for number, layer in enumerate(whole):
        weights = [grads[number] for _, _, grads in results]
        for of_norm, *_ in weights:
            close(of_norm, layer.weight.grad)
        if isinstance(layer.body, Mlp):
            close(torch.cat([g[1] for g in weights]), layer.body.up.grad)
            close(torch.cat([g[2] for g in weights], 1), layer.body.down.grad)
        else:
            close(torch.cat([g[2] for g in weights], 1), layer.body.out.grad)


def test_a_layer_may_send_rows_of_its_own_meanwhile() -> None:
    class Gathering(nn.Module):
        """Its input over the number of ranks, by way of all of them."""

        def __init__(self, group: ModelledGroup) -> None:
            super().__init__()
            self.group = group

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            start, end = own_rows(x.shape[1], self.group)
            eye = torch.eye(WIDTH) / self.group.size()
            return all_gather_linear(
                x[:, start:end], eye, group=self.group, dim=1, rows=x.shape[1], chunks=3
            )

    x = torch.randn(4, 9, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = x
    for _ in range(3):
        wanted = wanted + functional.rms_norm(wanted, (WIDTH,), None, 1e-6)

    def rank(group: ModelledGroup) -> None:
        stack = [Layer(torch.ones(WIDTH), Gathering(group)) for _ in range(3)]
        # Ranks are late by turns, so that messages cross in every order.
        group.network.sleep(1e-4 * group.rank())
        torch.testing.assert_close(woven(group, stack, split=True)(x).detach(), wanted)

    everywhere(3, rank, rate=1e7, latency_s=1e-4)


def test_the_input_may_change_before_backward() -> None:
    given = torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1))

    def rank(group: ModelledGroup) -> None:
        grads = []
        for overwritten in (False, True):
            stack = layers(group.rank(), 2, torch.float32)
            x = given.clone()
            out = woven(group, stack, split=True)(x)
            if overwritten:
                x.zero_()
            out.square().sum().backward()
            grads.append([p.grad for one in stack for p in one.parameters()])
        for one, other in zip(*grads, strict=True):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)

    everywhere(2, rank)


def test_parameters_accumulate_once_a_backward() -> None:
    """Hooks of DDP, FSDP and the gradient reducer would otherwise see half a gradient."""
    fired: list[int] = []

    def rank(group: ModelledGroup) -> None:
        stack = layers(group.rank(), 2, torch.float32)
        for p in (p for one in stack for p in one.parameters()):
            p.register_post_accumulate_grad_hook(lambda p: fired.append(id(p)))
        woven(group, stack, split=True)(torch.randn(4, 3, WIDTH)).sum().backward()

    everywhere(2, rank)
    assert len(fired) == len(set(fired)) == 2 * 4 * 3


class Shared(torch.autograd.Function):
    """x + weight * mask, whose gradient of the weight is the caller's own `mask`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return x + weight * mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return grad, mask, None


class Alike(nn.Module):
    """Weights that get one and the same memory as their gradient, once as a view, one that gets the
    mask, one that is tied to the first, and one that gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(WIDTH)) for _ in range(3))
        self.d, self.e, self.unused = (nn.Parameter(torch.ones(WIDTH)) for _ in range(3))
        self.tied = self.a
        self.mask = torch.full((WIDTH,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masked: torch.Tensor = Shared.apply(x * self.tied, self.c, self.mask)
        return masked + (self.a + self.b) + (self.d.view(1, 1, -1) + self.e.view(1, 1, -1))


def test_gradients_of_both_halves_add_up_where_they_share_memory() -> None:
    seen: list[torch.Tensor] = []

    def rank(group: ModelledGroup) -> list[torch.Tensor | None]:
        body = Alike()
        if group.rank() == 0:
            body.a.register_hook(lambda grad: seen.append(grad.clone()))
        model = woven(group, [Layer(torch.ones(WIDTH), body)], True)
        for _ in range(2):
            x = torch.ones(4, 3, WIDTH, requires_grad=True)
            model(x).sum().backward()
        assert torch.equal(body.mask, torch.full((WIDTH,), 2.0))
        return [p.grad for p in (body.a, body.b, body.c, body.d, body.e, body.unused)]

    for a, b, c, d, e, unused in everywhere(2, rank):
        assert unused is None
        rows = 4 * 3.0
        assert torch.allclose(a, torch.full((WIDTH,), 2 * 2 * rows))  # as a factor, and as a term
        assert all(torch.allclose(one, torch.full((WIDTH,), 2 * rows)) for one in (b, d, e))
        assert torch.allclose(
            c, torch.full((WIDTH,), 2 * 2 * 2.0)
        )  # two calls, two halves, the mask
    first, _ = seen  # a hook sees the sum, once a backward
    assert torch.allclose(first, torch.full((WIDTH,), 2 * 12.0))


@pytest.mark.parametrize("split", [True, False])
def test_a_parameter_that_would_get_no_gradient_is_refused_in_words(split: bool) -> None:
    class Borrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mine, self.borrowed = (
                nn.Parameter(torch.ones(WIDTH)),
                [nn.Parameter(torch.ones(WIDTH))],
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.mine * self.borrowed[0]

    def rank(group: ModelledGroup) -> BaseException:
        model = woven(group, [Layer(torch.ones(WIDTH), Borrows())], split)
        with pytest.raises((UsageError, GenerationAborted)) as caught:
            model(torch.ones(4, 3, WIDTH))
        return caught.value

    # Whom the other's abort reaches first sees that.
    refused = [str(error) for error in everywhere(2, rank) if isinstance(error, UsageError)]
    assert refused
    assert all("Borrows computes with a tensor that needs a gradient" in words for words in refused)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_what_learns_in_torch_script_is_refused_and_nothing_else() -> None:
    body = torch.jit.script(nn.Linear(WIDTH, WIDTH))
    x = torch.ones(4, 3, WIDTH)

    def made(group: ModelledGroup, body: nn.Module) -> Weave:
        return woven(group, [Layer(torch.ones(WIDTH), body)], True)

    def goes_on(group: ModelledGroup) -> list[torch.Size]:
        with torch.no_grad():
            read = made(group, body)(x)
        beside = nn.Sequential(nn.Linear(WIDTH, WIDTH), torch.jit.script(nn.GELU()))
        return [read.shape, made(group, beside)(x).shape]

    def learns(group: ModelledGroup, body: nn.Module) -> str:
        with pytest.raises((UsageError, GenerationAborted)) as caught:
            made(group, body)(x)
        return str(caught.value)

    assert everywhere(2, goes_on) == [[x.shape, x.shape]] * 2
    for refused in (body, nn.Sequential(nn.GELU(), body)):
        told = everywhere(2, partial(learns, body=refused))
        assert any("learns in TorchScript" in words for words in told)


def test_a_fault_on_the_way_ends_it_on_all_ranks() -> None:
    def rank(group: ModelledGroup) -> str:
        stack = layers(group.rank(), 3, torch.float32)
        if group.rank() == 2:
            group.network.sleep(0.001)
            group.abort()
            return "aborted"
        try:
            woven(group, stack, split=True)(torch.randn(4, 3, WIDTH))
        except GenerationAborted as error:
            return str(error)
        return "done"

    first, second, third = everywhere(3, rank, rate=1e6)
    assert third == "aborted"
    assert all("abort() was called" in words for words in (first, second))


@pytest.mark.parametrize("where", ["body", "backward", "norm"])
def test_an_error_on_one_rank_ends_it_on_all(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if where == "body":
                raise MemoryError("no room")
            y = x * 1.0
            if where == "backward":
                y.register_hook(self.fail)
            return y

        def fail(self, grad: torch.Tensor) -> None:
            raise MemoryError("no room")

    def normed(*args: Any) -> Any:
        if args[2][0] == 77:
            raise MemoryError("no room")
        return add_rms_norm(*args)

    monkeypatch.setattr(weave_run, "add_rms_norm", normed)

    def rank(group: ModelledGroup) -> str:
        stack = layers(group.rank(), 3, torch.float32)
        if group.rank() == 1:
            body = stack[2].body if where == "norm" else Faulty()
            stack[2] = Layer(torch.full((WIDTH,), 77.0), body)
        try:
            x = torch.randn(4, 3, WIDTH, requires_grad=True)
            woven(group, stack, split=True)(x).sum().backward()
        except (MemoryError, GenerationAborted) as error:
            return str(error)
        return "done"

    first, failed, third = everywhere(3, rank, rate=1e6)
    assert failed == "no room"
    assert all("abort() was called" in words for words in (first, third))


def test_a_second_backward_is_refused_in_words() -> None:
    def rank(group: ModelledGroup) -> None:
        out = woven(group, layers(group.rank(), 2, torch.float32), split=True)(
            torch.randn(2, 3, WIDTH)
        ).sum()
        out.backward(retain_graph=True)
        with pytest.raises(UsageError, match="one backward"):
            out.backward()

    everywhere(2, rank)


def test_evaluation_keeps_no_graph() -> None:
    class Seen(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            assert not x.requires_grad
            return x

    def rank(group: ModelledGroup) -> None:
        stack = woven(group, [Layer(torch.ones(WIDTH), Seen())] * 2, split=True)
        with torch.no_grad():
            assert not stack(torch.randn(2, 3, WIDTH)).requires_grad

    everywhere(2, rank)


def test_cuda_is_refused_in_words() -> None:
    class OnCuda(torch.Tensor):
        is_cuda = True

    def rank(group: ModelledGroup) -> None:
        with pytest.raises(UsageError, match="stream of its own"):
            woven(group, [], split=False)(torch.ones(2, 3, WIDTH).as_subclass(OnCuda))

    everywhere(1, rank)


def test_the_norms_own_gradient() -> None:
    made = torch.Generator().manual_seed(0)
    x, residual, grad = (torch.randn(5, 7, generator=made, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(7, generator=made, dtype=torch.float64).requires_grad_()
    total = (x + residual).requires_grad_()
    y = functional.rms_norm(total, (7,), weight, 1e-6)
    y.backward(grad)
    got, kept = add_rms_norm(x, residual, weight.detach(), 1e-6)
    torch.testing.assert_close(got, y.detach())
    torch.testing.assert_close(kept, total.detach())
    of_total, of_weight = rms_norm_backward(grad, kept, weight.detach(), 1e-6)
    torch.testing.assert_close(of_total, total.grad)
    torch.testing.assert_close(of_weight, weight.grad)
    half, _ = add_rms_norm(x.bfloat16(), residual.bfloat16(), weight.detach().bfloat16(), 1e-6)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), y.detach(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_it_runs_it_again(reentrant: bool, split: bool) -> None:
    def rank(group: ModelledGroup) -> None:
        stack = woven(group, layers(group.rank(), 2, torch.float64), split)
        x = torch.randn(
            2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        found = []
        for again in (False, True):
            leaf = x.clone().requires_grad_()
            y = checkpoint(stack, leaf, use_reentrant=reentrant) if again else stack(leaf)
            y.square().sum().backward()
            found.append(leaf.grad)
        torch.testing.assert_close(*found)

    everywhere(2, rank)


def test_autocast_leaves_the_residual_as_it_was() -> None:
    """Of a plain stack, too, autocast changes the layers alone."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = plain(leaf, layers(0, 1, torch.float32))
    assert wanted.dtype == torch.float32
    wanted.square().sum().backward()

    def rank(group: ModelledGroup) -> None:
        ours = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = woven(group, layers(group.rank(), 2, torch.float32), split=True)(ours)
        assert y.dtype == torch.float32
        assert not torch.equal(y, y.bfloat16())
        y.square().sum().backward()
        for got, expected in ((y, wanted), (ours.grad, leaf.grad)):
            assert got is not None
            assert expected is not None
            # As far off as a stack in bfloat16 may be, above.
            assert (got - expected).abs().max() <= 0.06 * expected.abs().max()

    everywhere(2, rank)


def test_a_gradients_gradient_is_refused_in_words() -> None:
    def rank(group: ModelledGroup) -> None:
        leaf = torch.randn(2, 3, WIDTH).requires_grad_()
        y = woven(group, layers(group.rank(), 2, torch.float32), split=True)(leaf)
        (of_leaf,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
        with pytest.raises(UsageError, match="no second derivative"):
            of_leaf.sum().backward()

    everywhere(2, rank)


def test_a_stack_can_be_pickled() -> None:
    stack = Weave(layers(0, 1, torch.float32))
    assert pickle.loads(pickle.dumps(stack)).state_dict().keys() == stack.state_dict().keys()


def test_a_word_for_split_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r'split is True, False or "auto", not \'never\''):
        Weave([], split="never")  # type: ignore[arg-type]
