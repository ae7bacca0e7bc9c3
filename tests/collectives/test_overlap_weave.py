"""A woven stack of layers computes what the plain one does; what it hides, and when it does not."""

import pickle
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ftkit.collectives.modelled import ModelledGroup, Network
from ftkit.collectives.overlap import all_gather_linear, crossing, weave_run
from ftkit.collectives.overlap.linear import own_rows
from ftkit.collectives.overlap.norm import add_rms_norm, rms_norm_backward
from ftkit.collectives.overlap.tuning import SplitTuner
from ftkit.collectives.overlap.weave import Layer, Weave
from ftkit.core.errors import GenerationAborted, UsageError

from .ranks import everywhere, on

WIDTH, HEADS, HIDDEN = 12, 6, 24


class Attention(nn.Module):
    """Some heads of causal attention; their part of the output projection."""

    def __init__(self, into: torch.Tensor, out: torch.Tensor) -> None:
        super().__init__()
        self.into, self.out = nn.Parameter(into), nn.Parameter(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = WIDTH // HEADS
        q, k, v = functional.linear(x, self.into).unflatten(-1, (3, -1, width)).movedim(2, 0)
        y = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return functional.linear(y.transpose(1, 2).flatten(2), self.out)


class Mlp(nn.Module):
    def __init__(self, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.gelu(functional.linear(x, self.up)), self.down)


def layers(rank: int, size: int, dtype: torch.dtype) -> list[Layer]:
    """Two blocks, of which each rank has some heads and some of the hidden."""
    made = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) * 0.3

    found = []
    for _ in range(2):
        into, out = random(3, HEADS, WIDTH // HEADS, WIDTH), random(WIDTH, HEADS, WIDTH // HEADS)
        heads = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
        attention = Attention(
            into[:, heads].flatten(0, 2).clone(), out[:, heads].flatten(1).clone()
        )
        up, down = random(HIDDEN, WIDTH), random(WIDTH, HIDDEN)
        hidden = slice(rank * HIDDEN // size, (rank + 1) * HIDDEN // size)
        found += [
            Layer(1 + random(WIDTH), attention),
            Layer(1 + random(WIDTH), Mlp(up[hidden].clone(), down[:, hidden].clone())),
        ]
    return found


def plain(x: torch.Tensor, stack: list[Layer]) -> torch.Tensor:
    for layer in stack:
        x = x + layer.body(functional.rms_norm(x, (WIDTH,), layer.weight, 1e-6))
    return x


class Beside:
    """What is done aside on a modelled network: a thread that has entered it."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._last: Any = None

    def submit(self, act: Callable[[], Any]) -> Any:
        one = self._last = _Doing(self._network, act, self._last)
        return one

    def shutdown(self) -> None:
        pass


class _Doing:
    def __init__(self, network: Network, act: Callable[[], Any], before: Any) -> None:
        self._network, self._done = network, network.event()
        self._value: Any = None
        self._error: BaseException | None = None
        network.enter()

        def run() -> None:
            try:
                if before is not None:
                    network.wait(before._done)
                self._value = act()
            except BaseException as error:  # noqa: BLE001 - raised where it is waited for
                self._error = error
            finally:
                network.happened(self._done)
                network.leave()

        threading.Thread(target=run, daemon=True).start()

    def result(self) -> Any:
        self._network.wait(self._done)
        if self._error is not None:
            raise self._error
        return self._value


def woven(group: ModelledGroup, stack: list[Layer], split: Any) -> Weave:
    network = group.network
    return Weave(stack, group=group, split=split, clock=network.now, aside=lambda: Beside(network))


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


class Slow(nn.Module):
    """A layer that takes a time of its own for each sample, and as long twice in backward."""

    def __init__(self, network: Network, sample_s: float) -> None:
        super().__init__()
        self.network, self.sample_s = network, sample_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        class Sleep(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
                self.network.sleep(self.sample_s * x.shape[0])
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
                self.network.sleep(2 * self.sample_s * grad.shape[0])
                return grad

        result: torch.Tensor = Sleep.apply(x)
        return result


BATCH, TOKENS, DEEP = 8, 16, 8
#: Bytes that each of two ranks sends and receives around a layer: a scatter and a gather.
AROUND = BATCH * TOKENS * WIDTH * 4


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


def step_s(
    split: Any,
    *,
    compute_s: float,
    exchange_s: float,
    steps: int = 1,
    network: Network | None = None,
) -> list[float]:
    """Seconds of each training step of a stack whose layers compute and exchange for so long."""
    network = network or Network(2, rate=AROUND / exchange_s)

    def rank(group: ModelledGroup) -> list[float]:
        stack = [Layer(torch.ones(WIDTH), Slow(network, compute_s / BATCH)) for _ in range(DEEP)]
        model, took = woven(group, stack, split), []
        for _ in range(steps):
            x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
            began = network.now()
            model(x).sum().backward()
            took.append(network.now() - began)
        return took

    return [max(both) for both in zip(*on(network, rank), strict=True)]


@pytest.mark.parametrize("exchange_s", [0.006, 0.010, 0.014])
def test_two_halves_hide_three_quarters_of_the_communication(exchange_s: float) -> None:
    """Where the bound, computing beside communicating, is 1.3 and more."""
    (whole,) = step_s(False, compute_s=0.010, exchange_s=exchange_s)
    (halves,) = step_s(True, compute_s=0.010, exchange_s=exchange_s)
    computing, exchanging = 3 * DEEP * 0.010, 2 * DEEP * exchange_s
    hideable = min(computing, exchanging)
    assert (whole - halves) / hideable >= 0.75


def test_the_link_goes_on_while_a_half_is_normed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a latency, and norms that take their time, a half's rows leave while the other's wait."""
    exchange_s, normed_s = 0.010, 0.001
    network = Network(2, rate=AROUND / exchange_s, latency_s=0.0005)

    def slowly(act: Callable[..., Any]) -> Callable[..., Any]:
        def normed(x: torch.Tensor, *args: Any) -> Any:
            network.sleep(normed_s * x.numel() / (BATCH * TOKENS * WIDTH / 2))
            return act(x, *args)

        return normed

    monkeypatch.setattr(weave_run, "add_rms_norm", slowly(add_rms_norm))
    monkeypatch.setattr(weave_run, "rms_norm_backward", slowly(rms_norm_backward))
    monkeypatch.setattr(crossing, "_PIECE_BYTES", 1)
    (halves,) = step_s(True, compute_s=0.010, exchange_s=exchange_s, network=network)
    at_least = 3 * DEEP * 0.010
    # One half's first computing and another's last crossing have nothing beside them, twice. Between
    # them a crossing's trips, uncut, take a latency more than the other's computing hides; and a norm.
    more_s = 2 * DEEP * 0.0005 + normed_s
    assert halves - at_least < 2 * exchange_s + more_s


def test_a_call_is_judged_with_its_backward() -> None:
    """Forward alone would say that there is too little to hide."""
    network = Network(2, rate=AROUND / 0.010)

    def rank(group: ModelledGroup) -> list[float]:
        stack = [Layer(torch.ones(WIDTH), Slow(network, 0.010 / BATCH)) for _ in range(DEEP)]
        model = woven(group, stack, "auto")
        x = torch.randn(BATCH, TOKENS, WIDTH, requires_grad=True)
        took = []
        for _ in range(2):
            began = network.now()
            model(x).sum().backward()
            took.append(network.now() - began)
        (tuned,) = model._tuned.values()
        assert tuned.last is not None
        return [took[-1], tuned.last.total_s]

    for took, told in on(network, rank):
        assert told == pytest.approx(took, rel=1e-3)


def test_auto_splits_where_it_pays_and_not_where_it_does_not() -> None:
    *_, last = step_s("auto", compute_s=0.010, exchange_s=0.010, steps=12)
    (halves,) = step_s(True, compute_s=0.010, exchange_s=0.010)
    assert last == pytest.approx(halves)
    *_, last = step_s("auto", compute_s=0.010, exchange_s=0.0001, steps=11)
    (whole,) = step_s(False, compute_s=0.010, exchange_s=0.0001)
    assert last == pytest.approx(whole)


def test_halves_that_turn_out_slower_are_given_up() -> None:
    tuner = SplitTuner()
    for total_s in (9.0, 2.0, 2.1):
        assert not tuner.split
        ask = tuner.note(0.5, total_s)
    assert ask == [0.5, 2.0]
    tuner.agree(ask)
    turns = []
    while True:
        turns.append(tuner.split)
        if ask := tuner.note(0.1, 1.99 if tuner.split else 2.0):
            break
    assert turns == [True, False, True, False, True, False, True]
    assert ask == [2.0, 1.99, 2.0, 1.99]
    tuner.agree(ask)
    assert tuner.settled
    assert not tuner.split
    assert tuner.note(1.0, 1.0) == []


@pytest.mark.parametrize(("halves_s", "split"), [([1.5, 2.1, 2.1], False), ([1.8, 1.8, 2.5], True)])
def test_one_lucky_call_does_not_make_halves_faster(halves_s: list[float], split: bool) -> None:
    tuner, left = SplitTuner(), deque(halves_s)
    for _ in range(3):
        ask = tuner.note(0.5, 2.0)
    tuner.agree(ask)
    tuner.note(0.1, 9.0)  # the first in halves warms up
    while not (ask := tuner.note(0.1, left.popleft() if tuner.split else 2.0)):
        pass
    tuner.agree(ask)
    assert tuner.split is split


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
