"""GradientReducer on several ranks at once, with a reduction that only adds."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ftkit.collectives.gradients import GradientReducer
from ftkit.collectives.handle import Handle
from ftkit.collectives.slot_tree import SlotNode
from ftkit.collectives.slots import Add, assign, fold_plan
from ftkit.core.errors import GenerationAborted, StateChanged, UsageError
from ftkit.core.ids import Slot
from ftkit.session.step import Step

SLOTS = 6

Backward = Callable[[nn.Module, int], Any]


class Done:
    def wait(self, timeout_s: float | None = None) -> None:
        return None

    def done(self) -> bool:
        return True


class Running(Done):
    def done(self) -> bool:
        return False


class Crew:
    """Ranks that play one after another; the reduction takes place once the last is through."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        ranks: int,
        bucket_bytes: int,
        *,
        staged: bool = False,
    ) -> None:
        self.models = [build() for _ in range(ranks)]
        self.sent: list[list[tuple[Sequence[SlotNode], torch.Tensor, float]]] = [
            [] for _ in range(ranks)
        ]
        self.reducers = [
            GradientReducer(
                m.parameters(),
                slots=SLOTS,
                reduce=self._reduce_of(r),
                bucket_bytes=bucket_bytes,
                staged=lambda device: staged,
            )
            for r, m in enumerate(self.models)
        ]

    def _reduce_of(self, rank: int) -> Callable[..., Done]:
        def reduce(nodes: Sequence[SlotNode], out: torch.Tensor, scale: float) -> Done:
            self.sent[rank].append((nodes, out, scale))
            return Done()

        return reduce

    def step(self, backward: Backward) -> list[int]:
        """One step on every rank. Returns their digests."""
        parts = assign(SLOTS, len(self.models))
        for sent, reducer, model, held in zip(
            self.sent, self.reducers, self.models, parts, strict=True
        ):
            sent.clear()
            reducer.begin()
            for slot in held:
                reducer.start_slot(slot, last=slot == held[-1])
                backward(model, slot)
                reducer.end_slot()
            if not held:
                reducer._last = True
                reducer._launch()
            reducer._start(reducer.buckets)  # as `finish` does, which waits here for all ranks
        for bucket in zip(*self.sent, strict=True):
            stack: list[torch.Tensor] = []
            for word in fold_plan(SLOTS, len(self.models)):
                if isinstance(word, Add):
                    right = stack.pop()
                    stack.append(stack.pop() + right)
                else:
                    stack.append(bucket[word.rank][0][word.position].value.clone())
            for _, out, scale in bucket:
                out.copy_(stack[0] * scale)
        return [
            r.finish(held=len(held)) for r, held in zip(self.reducers, parts, strict=True)
        ]  # fmt: skip


def play(
    build: Callable[[], nn.Module],
    backward: Backward,
    *,
    ranks: int,
    steps: int = 2,
    bucket_bytes: int = 64,
    staged: bool = False,
) -> list[dict[str, bytes | None]]:
    """Every rank's gradients after the last step, by name; the digests must agree."""
    crew = Crew(build, ranks, bucket_bytes, staged=staged)
    for _ in range(steps):
        assert len(set(crew.step(backward))) == 1
    return [
        {
            n: None if p.grad is None else p.grad.view(-1).view(torch.uint8).numpy().tobytes()
            for n, p in m.named_parameters()
        }
        for m in crew.models
    ]


def inputs(slot: int, width: int = 3) -> torch.Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(slot))


class Branches(nn.Module):
    """One branch for even slots, one for odd ones, one for slot 4, and one for nobody."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.even, self.odd = nn.Linear(3, 2), nn.Linear(3, 2)
        self.rare, self.never = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        y: torch.Tensor = self.odd(x) if slot % 2 else self.even(x)
        return y + self.rare(x) if slot == 4 else y


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))


def dense_backward(model: nn.Module, slot: int) -> None:
    model(inputs(slot)).square().mean().backward()


def branch_backward(model: nn.Module, slot: int) -> None:
    model(inputs(slot), slot).square().mean().backward()


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
@pytest.mark.parametrize("staged", [False, True])
def test_the_bits_do_not_depend_on_ranks_buckets_or_the_way_over_the_host(
    ranks: int, bucket_bytes: int, staged: bool
) -> None:
    (alone,) = play(dense, dense_backward, ranks=1, bucket_bytes=1 << 20)
    many = play(dense, dense_backward, ranks=ranks, bucket_bytes=bucket_bytes, staged=staged)
    assert many == [alone] * ranks


def test_the_sum_is_the_mean_of_the_slots() -> None:
    crew = Crew(dense, 2, 64)
    crew.step(dense_backward)
    plain = dense()
    for slot in range(SLOTS):
        (plain(inputs(slot)).square().mean() / SLOTS).backward()
    for p, q in zip(crew.models[0].parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_parameter_that_no_slot_used_has_no_gradient_and_one_slot_is_enough(ranks: int) -> None:
    (alone,) = play(Branches, branch_backward, ranks=1)
    assert {n for n, g in alone.items() if g is None} == {"never.weight", "never.bias"}
    assert play(Branches, branch_backward, ranks=ranks) == [alone] * ranks
    assert play(Branches, branch_backward, ranks=ranks, staged=True) == [alone] * ranks


def test_a_parameter_that_came_out_of_use_loses_its_gradient() -> None:
    crew = Crew(Branches, 2, 64)
    crew.step(branch_backward)
    assert crew.models[0].rare.weight.grad is not None  # type: ignore[union-attr]
    crew.step(lambda model, slot: model(inputs(slot), slot % 2).square().mean().backward())
    for model in crew.models:
        assert model.rare.weight.grad is None  # type: ignore[union-attr]
        assert model.even.weight.grad is not None  # type: ignore[union-attr]


class Tied(nn.Module):
    """Embedding and head share their weight, as a GPT's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, slot: int) -> torch.Tensor:
        y: torch.Tensor = self.head(self.embed(torch.tensor([slot, 0, 1])))
        return y


def test_a_tied_parameter_is_reduced_once_with_both_its_uses() -> None:
    def backward(model: nn.Module, slot: int) -> None:
        model(slot).square().sum().backward()

    (alone,) = play(Tied, backward, ranks=1)
    assert list(alone) == ["embed.weight"]
    assert play(Tied, backward, ranks=3) == [alone] * 3
    plain = Tied()
    for slot in range(SLOTS):
        (plain(slot).square().sum() / SLOTS).backward()
    crew = Crew(Tied, 2, 64)
    crew.step(backward)
    torch.testing.assert_close(crew.models[0].embed.weight.grad, plain.embed.weight.grad)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_reduced_in_their_own(dtype: torch.dtype) -> None:
    def build() -> nn.Module:
        return dense().to(dtype)

    def backward(model: nn.Module, slot: int) -> None:
        model(inputs(slot).to(dtype)).float().square().mean().backward()

    (alone,) = play(build, backward, ranks=1)
    assert play(build, backward, ranks=3) == [alone] * 3
    assert all(g is not None and any(g) for g in alone.values())


def test_several_dtypes_never_share_a_bucket() -> None:
    def build() -> nn.Module:
        model = dense()
        model[2].to(torch.float64)
        return model

    def backward(model: nn.Module, slot: int) -> None:
        hidden = model[1](model[0](inputs(slot)))  # type: ignore[index]
        model[2](hidden.double()).square().mean().backward()  # type: ignore[index]

    (alone,) = play(build, backward, ranks=1, bucket_bytes=1 << 20)
    assert play(build, backward, ranks=2, bucket_bytes=1 << 20) == [alone] * 2
    crew = Crew(build, 1, 1 << 20)
    crew.step(backward)
    assert [out.dtype for _, out, _ in crew.sent[0]] == [torch.float64, torch.float32]


def test_strides_of_parameters_do_not_matter() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def backward(model: nn.Module, slot: int) -> None:
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(slot))
        model(x).square().mean().backward()

    crew = Crew(build, 2, 64)
    crew.step(backward)
    plain = build()
    for slot in range(SLOTS):
        backward(plain, slot)
    torch.testing.assert_close(crew.models[1].weight.grad, plain.weight.grad / SLOTS)  # type: ignore[operator]


def test_frozen_parameters_are_left_alone() -> None:
    def build() -> nn.Module:
        model = dense()
        model[0].weight.requires_grad_(False)
        return model

    (alone,) = play(build, dense_backward, ranks=1)
    assert alone["0.weight"] is None
    assert play(build, dense_backward, ranks=2) == [alone] * 2


def test_a_second_backward_in_one_slot_is_refused_in_words() -> None:
    def twice(model: nn.Module, slot: int) -> None:
        dense_backward(model, slot)
        dense_backward(model, slot)

    for bucket_bytes in (1, 1 << 20):
        with pytest.raises(UsageError, match="call backward\\(\\) once a batch"):
            Crew(dense, 1, bucket_bytes).step(twice)


def test_backward_outside_a_slot_is_the_users_own() -> None:
    model = dense()
    reducer = GradientReducer(model.parameters(), slots=1, reduce=lambda *_: Done())
    dense_backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())
    reducer.begin()
    assert all(p.grad is None for p in model.parameters())
    reducer.close()
    dense_backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("staged", [False, True])
def test_an_attempt_given_up_does_not_touch_buffers_that_may_still_be_sent(staged: bool) -> None:
    crew = Crew(dense, 1, 64, staged=staged)
    crew.step(dense_backward)
    expected = [p.grad.clone() for p in crew.models[0].parameters()]  # type: ignore[union-attr]
    reducer, model = crew.reducers[0], crew.models[0]
    crew.sent[0].clear()
    reducer.begin()
    for slot in range(SLOTS):
        reducer.start_slot(slot, last=slot == SLOTS - 1)
        dense_backward(model, slot)
        reducer.end_slot()
    flying = [(out, [n.value for n in nodes]) for nodes, out, _ in crew.sent[0]]
    frozen = [(out.clone(), [v.clone() for v in values]) for out, values in flying]
    crew.step(dense_backward)  # never finished the one before
    for (out, values), (old, olds) in zip(flying, frozen, strict=True):
        assert torch.equal(out, old)
        assert all(torch.equal(v, o) for v, o in zip(values, olds, strict=True))
    assert all(
        torch.equal(p.grad, e)  # type: ignore[arg-type]
        for p, e in zip(model.parameters(), expected, strict=True)
    )


def test_over_the_host_a_bucket_starts_when_the_next_one_is_on_its_way() -> None:
    """So no rank waits for the kernels that it launched last, and all start in one order."""
    model, started = dense(), list[torch.Tensor]()

    def reduce(nodes: Sequence[SlotNode], out: torch.Tensor, scale: float) -> Done:
        started.append(out)
        out.copy_(nodes[0].value * scale)
        return Done()

    reducer = GradientReducer(
        model.parameters(), slots=1, reduce=reduce, bucket_bytes=8, staged=lambda device: True
    )
    reducer.begin()
    reducer.start_slot(0, last=True)
    dense_backward(model, 0)
    assert len(started) == reducer.buckets - 1
    reducer.end_slot()
    assert len(started) == reducer.buckets
    reducer.finish(held=1)
    plain = dense()
    dense_backward(plain, 0)
    for mine, other, out in zip(
        model.parameters(), plain.parameters(), reversed(started), strict=False
    ):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)
        assert mine.grad.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()


def test_backward_never_waits_for_a_reduction_and_its_error_comes_out_at_the_end() -> None:
    """Buckets go while backward runs; one that fails is noticed when the step is voted on."""
    model = dense()
    launched = list[int]()
    handles = list[Handle[None]]()

    def reduce(*_: object) -> Handle[None]:
        # Of the gradients of the first layer, which come last, how many are there by now?
        launched.append(sum(reducer._where[id(p)][0].missing == 0 for p in model[0].parameters()))
        handles.append(Handle())
        return handles[-1]

    reducer = GradientReducer(model.parameters(), slots=1, reduce=reduce, bucket_bytes=8)
    reducer.begin()
    reducer.start_slot(0, last=True)
    dense_backward(model, 0)
    reducer.end_slot()
    assert launched[0] == 0, "the last layer's bucket goes before the first layer's is full"
    assert len(handles) == reducer.buckets > 1
    assert not any(handle.done() for handle in handles)
    for handle in handles[:-1]:
        handle.finish(None)
    handles[-1].fail(GenerationAborted("member 1 is gone"))
    with pytest.raises(GenerationAborted, match="member 1 is gone"):
        reducer.finish(held=1)


def test_a_left_early_loop_is_named() -> None:
    reducer = GradientReducer(dense().parameters(), slots=2, reduce=lambda *_: Done())
    reducer.begin()
    reducer.start_slot(0, last=False)
    with pytest.raises(UsageError, match="left early"):
        reducer.finish(held=2)


def test_kinds_of_gradient_that_cannot_be_reduced_are_named() -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    reducer = GradientReducer(embedding.parameters(), slots=1, reduce=lambda *_: Done())
    reducer.begin()
    reducer.start_slot(0, last=True)
    with pytest.raises(UsageError, match="sparse gradients"):
        embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(StateChanged, match="complex64"):
        GradientReducer(
            [nn.Parameter(torch.zeros(1, dtype=torch.complex64))],
            slots=1,
            reduce=lambda *_: Done(),
        )


def test_the_digest_sees_one_flipped_bit() -> None:
    crew = Crew(dense, 1, 64)
    first = crew.step(dense_backward)
    assert crew.step(dense_backward) == first

    def flipped(model: nn.Module, slot: int) -> None:
        (model(inputs(slot)) * (1.0 if slot else 1.0000001)).square().mean().backward()

    assert crew.step(flipped) != first


def test_without_parameters_there_is_nothing_to_reduce() -> None:
    reducer = GradientReducer([], slots=1, reduce=lambda *_: Done())
    reducer.begin()
    reducer.start_slot(0, last=True)
    reducer.end_slot()
    assert isinstance(reducer.finish(held=1), int)
    assert not reducer.ids


@pytest.mark.parametrize("handle", [Done(), Running()])
def test_buffers_are_used_again_unless_a_reduction_may_still_read_them(handle: Done) -> None:
    outs: list[torch.Tensor] = []

    def reduce(nodes: Sequence[SlotNode], out: torch.Tensor, scale: float) -> Done:
        outs.append(out)
        return handle

    model = dense()
    reducer = GradientReducer(model.parameters(), slots=1, reduce=reduce, bucket_bytes=1 << 20)
    for _ in range(2):
        reducer.begin()
        reducer.start_slot(0, last=True)
        dense_backward(model, 0)
        reducer.end_slot()
    kept = outs[0].data_ptr() == outs[1].data_ptr()
    assert kept == handle.done()


def test_what_was_summed_before_a_break_is_played_no_second_time() -> None:
    """Slot 0 is summed, slot 1 as far as the last layer, when the attempt is cut off."""

    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    def batch(slot: int) -> torch.Tensor:
        return torch.full((2, 3), 1.0 / (3 + slot))

    def attempt(reducer: GradientReducer, model: nn.Sequential, slots: Sequence[int]) -> None:
        for slot in slots:
            reducer.start_slot(slot, last=slot == slots[-1])
            model(batch(slot)).square().sum().backward()
            reducer.end_slot()
        reducer.finish(held=4)

    def summed(nodes: Sequence[SlotNode], out: torch.Tensor, scale: float) -> Done:
        (whole,) = nodes
        out.copy_(whole.value * scale)
        return Done()

    undisturbed, model = build(), build()
    reducer = GradientReducer(undisturbed.parameters(), slots=4, reduce=summed, bucket_bytes=8)
    reducer.begin()
    attempt(reducer, undisturbed, range(4))

    reducer = GradientReducer(model.parameters(), slots=4, reduce=summed, bucket_bytes=8)
    reducer.begin()
    reducer.start_slot(0, last=False)
    model(batch(0)).square().sum().backward()
    reducer.end_slot()
    reducer.start_slot(1, last=False)
    model[1](model[0](batch(1)).detach()).square().sum().backward()
    assert reducer.summed == ([0], [1])
    reducer.begin(keep=True)
    assert reducer.summed == ([0], [1])
    attempt(reducer, model, [3, 1, 2])
    for mine, other in zip(model.parameters(), undisturbed.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine.grad, other.grad)

    reducer.begin()
    assert reducer.summed == ([], [])


def test_sums_that_are_still_read_are_not_kept() -> None:
    model = nn.Linear(2, 1)
    reducer = GradientReducer(model.parameters(), slots=1, reduce=lambda *_: Running())
    reducer.begin()
    reducer.start_slot(0, last=True)
    model(torch.ones(1, 2)).sum().backward()
    reducer.end_slot()
    assert reducer.summed == ([], [])
    reducer.begin(keep=True)
    assert reducer.summed == ([], [])


def test_a_slot_cut_off_as_its_sums_are_handed_over_is_gone_through_again() -> None:
    """All of it is summed, and nobody has noted its loss, or what it made of the buffers."""

    def broken(*_: object) -> Done:
        raise GenerationAborted("the generation is over")

    model = nn.Linear(2, 1)
    reducer = GradientReducer(model.parameters(), slots=3, reduce=broken)
    reducer.begin()
    reducer.start_slot(1, last=False)
    model(torch.ones(1, 2)).sum().backward()
    reducer.end_slot()
    reducer.start_slot(0, last=True)
    with pytest.raises((GenerationAborted, RuntimeError)):
        model(torch.ones(1, 2)).sum().backward()
    assert reducer.summed == ([0, 1], [])
    step = object.__new__(Step)
    step._loop = SimpleNamespace(reducer=reducer)  # type: ignore[assignment]
    assert step._summed({Slot(1)}) == ([1], [0])
