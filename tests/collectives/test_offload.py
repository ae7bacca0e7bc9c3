"""Activations offloaded by token rows: the same gradients, to the bit; and what is kept where."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from ftkit.collectives.overlap import offload, offload_activations
from ftkit.collectives.overlap.host_memory import HostPool, Loaded, ThreadMover, copy_rate
from ftkit.collectives.overlap.offload import Offload
from ftkit.collectives.overlap.offload_plan import BlockCosts, best_fraction, split_at
from ftkit.core.errors import UsageError

WIDTH, HEADS, DEEP = 32, 4, 3

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A team of threads waits for the one that has no core, at every operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    """A transformer block: attention, grouped, and a gated MLP that uses its input twice."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 2 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.gate = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.first(x)).unflatten(-1, (2 * HEADS, -1)).transpose(1, 2)
        q, k, v = heads.split([HEADS, HEADS // 2, HEADS // 2], 1)
        seen = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, dropout_p=self.dropout
        )
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        normed = self.second(x)
        y: Tensor = x + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        return y


def stack(dtype: torch.dtype = torch.float32, **options: Any) -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(**options).to(dtype) for _ in range(DEEP)]


def tokens(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, WIDTH, generator=made).to(dtype)


Through = Callable[..., Tensor]


def results(blocks: list[nn.Module], x: Tensor, through: Through | None = None) -> list[Any]:
    """What comes out, and the gradients of the input and of all parameters."""
    leaf = y = x.clone().requires_grad_()
    for block in blocks:
        y = block(y) if through is None else through(block, y)
    parameters = [p for block in blocks for p in block.parameters()]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *parameters])]


def equal(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0, "auto"])
@pytest.mark.parametrize(
    ("dtype", "batch", "length"),
    [
        (torch.float32, 1, 256),
        (torch.float32, 3, 200),
        (torch.bfloat16, 2, 130),
        (torch.float64, 2, 128),
        (torch.float32, 1, 1),
    ],
)
def test_gradients_are_those_without_to_the_bit(
    fraction: Any, dtype: torch.dtype, batch: int, length: int
) -> None:
    blocks, x = stack(dtype), tokens(batch, length, dtype)
    wanted = results(blocks, x)
    with offload_activations(fraction) as through:
        assert equal(results(blocks, x, through), wanted)
        taken = through.host_bytes
        assert equal(results(blocks, x, through), wanted)
        assert through.host_bytes == taken, "host memory is used again"
        assert taken or length == 1, "there is something to offload"


def test_the_split_is_real() -> None:
    """Half of the tokens are on the host, and the block runs over the other half in backward."""
    blocks, x, lengths = stack(), tokens(1, 256), list[int]()
    with offload_activations(0.5) as through:
        results(blocks, x, through)
        full = Offload(1.0, dim=1, exact=True, host_bytes=None, clock=lambda: 0.0)
        results(blocks, x, full)
        profile = through.profile(blocks[0], x.clone().requires_grad_())
        assert (profile.rows, profile.tokens, profile.exact) == (128, 256, True)
        blocks[1].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        results(blocks, x, through)
        assert lengths == [256, 128]
        # Input and attention's output go whole either way.
        assert 0.5 * full.host_bytes < through.host_bytes < 0.8 * full.host_bytes
        full.close()


def test_nothing_of_it_stays_on_the_device_until_backward() -> None:
    block, x = stack()[0], tokens(1, 128).requires_grad_()
    made = list[StorageWeakRef]()

    def look(_: Any, __: Any, out: Tensor) -> None:
        made.append(StorageWeakRef(out.untyped_storage()))

    with offload_activations(0.5) as through:
        through.profile(block, x)
        for part in block.children():
            part.register_forward_hook(look)
        y = through(block, x)
        mover = next(iter(through._movers.values()))[1]
        mover.back(torch.empty(0), x.device).result()  # all copies before it are made
        assert len(made) == 7
        assert all(storage.expired() for storage in made)
        y.sum().backward()


class Told(ThreadMover):
    """Tells in which order things come back."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self._said = said

    def back(self, host: Tensor, device: torch.device) -> Loaded:
        self._said.append("fetch")
        return super().back(host, device)


def test_the_next_block_is_fetched_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    monkeypatch.setattr(offload, "mover_of", lambda _: Told(said))
    blocks, x = stack(), tokens(1, 128)
    with offload_activations(0.5) as through:
        results(blocks, x, through)
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda *_, n=number: said.append(f"run {n}"))
        said.clear()
        results(blocks, x, through)
    ran = [said.index(f"run {n}", 3) for n in range(DEEP)]
    assert said[:3] == ["run 0", "run 1", "run 2"]
    # As backward begins all of the last block comes, and of the one before; then of the first.
    each = said[3 : ran[2]].count("fetch") // 2
    assert each >= 8
    assert said[ran[2] : ran[1]].count("fetch") >= each, "while the second has not begun"
    assert ran[2] < ran[1] < ran[0]


def test_attention_may_drop_out_and_is_not_run_again() -> None:
    blocks, x = stack(dropout=0.3), tokens(2, 128)
    wanted = []
    for through in (None, offload_activations(0.5)):
        if through is not None:
            through.profile(blocks[0], x.clone().requires_grad_())
        torch.manual_seed(3)
        wanted.append(results(blocks, x, through))
    assert equal(*wanted)


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean(1, keepdim=True)


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x * x, 0.5)


@pytest.mark.parametrize("block", [Mixing(), Dropping()])
def test_tokens_that_meet_and_random_draws_are_refused(block: nn.Module) -> None:
    with offload_activations(0.5) as through, pytest.raises(UsageError, match=r"meet.*dropout"):
        through(block, tokens(1, 128).requires_grad_())


class Counting(nn.Module):
    """Rounds by how many tokens there are, as a kernel may."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * (1 + 1e-6 * x.shape[1])
        return y * y


@pytest.mark.parametrize("fraction", [0.5, "auto"])
def test_where_recomputed_rows_would_have_other_bits_all_is_kept_or_all_computed(
    fraction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = Counting(), tokens(1, 256)
    wanted = results([block], x)
    monkeypatch.setattr(offload, "copy_rate", lambda *_: 1e15)
    with offload_activations(fraction) as through:
        assert equal(results([block], x, through), wanted)
        assert through.profile(block, x.clone().requires_grad_()).rows in (0, 256)
    with offload_activations(0.5, exact=False) as through:
        got = results([block], x, through)
        profile = through.profile(block, x.clone().requires_grad_())
        assert (profile.rows, profile.exact) == (128, False)
        assert not equal(got, wanted)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("rate", "rows"), [(1e15, 256), (1.0, 0)])
def test_auto_goes_by_what_was_measured(
    rate: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offload, "copy_rate", lambda *_: rate)
    block, x = stack()[0], tokens(1, 256)
    with offload_activations() as through:
        costs = through.profile(block, x.requires_grad_()).costs
        assert through.profile(block, x).rows == rows
    assert costs.compute_s > 0 < costs.recompute_s
    # Three rows of the hidden width, and the rest; queries, keys and values among them.
    assert 256 * WIDTH * 4 * 9 < costs.row_bytes < 256 * WIDTH * 4 * 25
    assert costs.always_bytes >= 2 * 256 * WIDTH * 4, "the input, and attention's output"


def test_a_block_that_does_something_else_the_next_time_is_refused() -> None:
    class Moody(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x.exp().sin() if self.calls < 7 else x + 1

    block, x = Moody(), tokens(1, 256).requires_grad_()
    with offload_activations(0.5) as through:
        through.profile(block, x)
        block.calls = 5
        y = through(block, x)
        with pytest.raises(UsageError, match="the same at every call"):
            y.sum().backward()


def test_a_second_backward_and_none_at_all() -> None:
    block, x = stack()[0], tokens(1, 128).requires_grad_()
    with offload_activations(0.5) as through:
        loss = through(block, x).sum()
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(loss, x)
        assert torch.equal(first, second)
        taken = through.host_bytes
        for _ in range(3):
            through(block, x)  # forgotten
        assert through.host_bytes == taken, "its memory came back"
        with torch.no_grad():
            through(block, x)
    assert first.abs().sum() > 0


def test_without_gradients_there_is_nothing_to_offload() -> None:
    with offload_activations(0.5) as through, torch.no_grad():
        block, x = stack()[0], tokens(1, 128)
        assert torch.equal(through(block, x), block(x))
        assert through.host_bytes == 0


def test_further_inputs_are_cut_alike() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor, angle: Tensor) -> Tensor:
            return x * angle.cos() + x.square() * angle.sin()

    block, angle = Turned(), torch.arange(256.0)[None, :, None]
    x = tokens(2, 256).requires_grad_()
    (wanted,) = torch.autograd.grad(block(x, angle).sum(), x)
    with offload_activations(0.5) as through:
        (got,) = torch.autograd.grad(through(block, x, angle).sum(), x)
        assert torch.equal(got, wanted)
        with pytest.raises(UsageError, match="tokens in dimension 1"):
            through(block, x, angle[:, :5])


def test_under_autocast_rows_are_computed_again_in_its_dtype() -> None:
    blocks, x = stack(), tokens(1, 256)

    def run(through: Through | None) -> list[Any]:
        leaf = y = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in blocks:
                y = block(y) if through is None else through(block, y)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf])]

    wanted = run(None)
    with offload_activations(0.5) as through:
        assert equal(run(through), wanted)


def test_tokens_first() -> None:
    block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    x = tokens(256, 3)
    wanted = results([block], x)
    with offload_activations(0.5, dim=0) as through:
        assert equal(results([block], x, through), wanted)
        assert through.profile(block, x.clone().requires_grad_()).rows == 128


@pytest.mark.parametrize("block", [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)])
def test_a_block_may_begin_with_a_linear_layer(block: nn.Module) -> None:
    """Which saves other tensors of rows that are not packed, as those of two sequences are not."""
    x = tokens(2, 256)
    wanted = results([block], x)
    with offload_activations(0.5) as through:
        assert equal(results([block], x, through), wanted)
        assert through.profile(block, x.clone().requires_grad_()).rows == 128


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_a_fraction_is_one(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        offload_activations(fraction)


def test_a_tensor_changed_on_its_way_is_noticed() -> None:
    mover, gate = ThreadMover(), threading.Event()
    mover._thread.submit(gate.wait)
    source = torch.zeros(8)
    sent = mover.out(source, torch.empty(8))
    source += 1
    gate.set()
    with pytest.raises(RuntimeError, match="changed in place"):
        sent()
    mover.close()


def test_the_pool_gives_out_again_what_came_back() -> None:
    pool = HostPool(pinned=False)
    buffer, host = pool.take(torch.empty(3, 5, dtype=torch.bfloat16))
    assert (host.shape, host.dtype, pool.nbytes) == ((3, 5), torch.bfloat16, 30)
    pool.give_back([buffer])
    again, _ = pool.take(torch.empty(15, dtype=torch.int16))
    assert (again is buffer, pool.nbytes) == (True, 30)
    pool.take(torch.empty(15, dtype=torch.int16))
    assert pool.nbytes == 60


def test_the_rate_is_bytes_a_second() -> None:
    times = iter([0.0, 4.0, 10.0, 12.0])
    mover, pool = ThreadMover(), HostPool(pinned=False)
    assert copy_rate(torch.ones(100), pool, mover, lambda: next(times)) == 200.0
    mover.close()


# -- the choice ---------------------------------------------------------------------------------


def costs(**more: Any) -> BlockCosts:
    """Of 100 bytes of rows 50 hide behind a forward of a second."""
    given: dict[str, Any] = {
        "tokens": 256, "row_bytes": 100, "always_bytes": 0, "compute_s": 1.0,
        "recompute_s": 0.8, "copy_rate": 50.0,
    }  # fmt: skip
    return BlockCosts(**(given | more))


@pytest.mark.parametrize(
    ("changed", "fraction"),
    [
        ({}, 0.5),  # beyond it a row costs 0.02 s to wait for and 0.008 s to recompute
        ({"copy_rate": 1e12}, 1.0),
        ({"copy_rate": 100.0}, 1.0),  # just
        ({"copy_rate": 0.0}, 0.0),
        ({"always_bytes": 20}, 0.3),
        ({"always_bytes": 50}, 0.0),
        ({"always_bytes": 70}, 0.0),
        ({"compute_s": 0.0}, 0.0),
        ({"recompute_s": 0.0}, 0.0),  # for nothing: then no memory of the host's either
        ({"recompute_s": 3.0}, 1.0),  # waiting for the copy is less than computing again
        ({"row_bytes": 0}, 1.0),  # nothing to copy and nothing to compute
    ],
)
def test_as_much_is_copied_as_hides(changed: dict[str, Any], fraction: float) -> None:
    assert best_fraction(costs(**changed)) == pytest.approx(fraction)


@pytest.mark.parametrize(("room", "fraction"), [(1000, 0.5), (30, 0.3), (0, 0.0), (-5, 0.0)])
def test_no_more_than_the_host_has_room_for(room: int, fraction: float) -> None:
    assert best_fraction(costs(), host_bytes=room) == pytest.approx(fraction)


def test_the_choice_is_the_best_there_is() -> None:
    for rate in (1.0, 20.0, 50.0, 90.0, 1e4):
        for recompute_s in (0.1, 0.8, 2.5):
            for always in (0, 30):
                one = costs(copy_rate=rate, recompute_s=recompute_s, always_bytes=always)
                least = min(one.added_s(f / 1000) for f in range(1001))
                assert one.added_s(best_fraction(one)) <= least + 1e-9


def test_tokens_are_divided_at_tiles() -> None:
    assert [split_at(f, 256) for f in (0.0, 0.24, 0.25, 0.6, 1.0)] == [0, 0, 64, 128, 256]
    assert split_at(1.0, 100) == 100
    assert split_at(0.99, 100) == 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0, "auto"])
def test_on_cuda_too(fraction: Any) -> None:
    blocks = [block.cuda() for block in stack(torch.bfloat16)]
    x = tokens(2, 512, torch.bfloat16).cuda()
    wanted = results(blocks, x)
    with offload_activations(fraction) as through:
        for _ in range(2):
            for a, b in zip(results(blocks, x, through), wanted, strict=True):
                torch.testing.assert_close(a, b)
        pool, _ = through._mover(x.device)
        assert pool.take(x)[0].is_pinned()
