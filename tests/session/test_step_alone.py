"""The step transaction in a world of one: what a script may do, and what is refused."""

import contextlib
import random
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from ftkit.core.errors import OutsideStep, StateChanged, StepRolledBack, UsageError
from ftkit.detection.row import Phase
from ftkit.session import step as step_module
from ftkit.session.loop import Loop
from ftkit.session.voting import Attempt, Counted, vote
from tests.session.alone import SLOTS, Points, alone, bits, learn, net, train


def setup(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


# ---- what works


def test_the_same_steps_give_the_same_bits_whatever_the_random_state_around() -> None:
    first = train()
    torch.manual_seed(99)
    random.seed(99)

    def disturb(step: Any, *_: object) -> None:
        torch.rand(step.index)
        random.random()

    assert train(meddle=disturb) == first


def test_gradients_are_those_of_the_mean_over_slots() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plain = nn.Linear(2, 1)
    plain.load_state_dict(model.state_dict())
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        step = next(session.steps(Points(), slots=3, slot_size=2, until=1))
        with step:
            for x, y in step.batches():
                (nn.functional.mse_loss(plain(x), y) / 3).backward()
                nn.functional.mse_loss(model(x), y).backward()
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                assert p.grad is not None
                torch.testing.assert_close(p.grad, q.grad)


def test_the_loss_is_the_mean_of_what_was_recorded() -> None:
    with alone() as session:
        model = net()
        optimizer = setup(model)
        session.protect(model=model, optimizer=optimizer)
        seen: list[float] = []
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=1):
            with step:
                for i, (x, y) in enumerate(step.batches()):
                    nn.functional.mse_loss(model(x), y).backward()
                    step.record(torch.tensor(float(i)))
                    seen.append(float(i))
                assert step.loss is None
                optimizer.step()
            assert step.committed
            assert step.loss == sum(seen) / SLOTS


def test_until_none_plays_nothing_and_until_more_counts_from_one() -> None:
    with alone() as session:
        model = net()
        session.protect(model=model, optimizer=setup(model))
        assert list(session.steps(Points(), slots=1, slot_size=1, until=0)) == []
    with alone() as session:
        model = net()
        optimizer = setup(model)
        session.protect(model=model, optimizer=optimizer)
        indices = []
        for step in session.steps(Points(), slots=1, slot_size=2, until=3):
            with step:
                learn(model, step)
                optimizer.step()
            indices.append((step.index, session.step))
        assert indices == [(1, 1), (2, 2), (3, 3)]


def test_an_optimizer_that_is_skipped_does_not_hold_up_the_step() -> None:
    """As a GradScaler skips it when the gradients overflowed."""
    model = net()
    optimizer = setup(model)
    before = [p.detach().clone() for p in model.parameters()]
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=2):
            with step:
                learn(model, step)
            assert step.committed
        assert session.step == 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_two_optimizers_vote_once_and_both_step() -> None:
    model = net()
    first, last = model[0], model[3]  # type: ignore[index]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (first, last)]
    before = bits(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizers)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=1):
            with step:
                learn(model, step)
                seen = [step.committed]
                for optimizer in optimizers:
                    optimizer.step()
                    seen.append(step.committed)
                assert seen == [False, True, True]
        assert session.step == 1
    after = bits(model)
    changed = [a != b for a, b in zip(before, after, strict=True)]
    names = list(model.state_dict())
    assert {n for n, c in zip(names, changed, strict=True) if c} >= {"0.weight", "3.weight"}


def test_a_scheduler_and_clipping_and_zero_grad_go_on_as_usual() -> None:
    model = net()
    optimizer = setup(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    norms = []
    with alone() as session:
        session.protect(model=model, optimizer=optimizer, scheduler=scheduler)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=3):
            with step:
                learn(model, step)
                norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e-3)))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    assert all(n > 1e-3 for n in norms)
    assert optimizer.param_groups[0]["lr"] == 0.05 * 0.5**3


def test_a_closure_that_computes_nothing_new_is_called() -> None:
    model = net()
    optimizer = setup(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=1):
            with step:
                learn(model, step)
                assert optimizer.step(lambda: 7.0) == 7.0
        assert session.step == 1


def test_an_optimizer_that_is_not_protected_is_left_alone() -> None:
    model, other = net(), nn.Linear(1, 1)
    stranger = torch.optim.SGD(other.parameters(), lr=1.0)
    with alone() as session:
        session.protect(model=model, optimizer=setup(model))
        other(torch.ones(1, 1)).sum().backward()
        stranger.step()


def test_a_loader_is_read_batch_by_batch() -> None:
    model = net()
    optimizer = setup(model)
    seen: list[list[float]] = []
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        points: Any = Points()
        loader: DataLoader[Any] = DataLoader(points, batch_size=2, shuffle=True)
        for step in session.steps(loader, slots=4, until=4):
            with step:
                for x, y in step.batches():
                    seen.append(x[:, 0].tolist())
                    nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
    epochs = [sorted(v for b in seen[i : i + 8] for v in b) for i in (0, 8)]
    assert epochs == [[i / 16 for i in range(16)]] * 2
    assert seen[:8] != seen[8:]


def test_numpy_and_python_draws_in_a_slot_belong_to_the_slot() -> None:
    def draws(noise: int) -> list[tuple[float, float, float]]:
        model, got = net(), []
        optimizer = setup(model)
        with alone() as session:
            session.protect(model=model, optimizer=optimizer)
            for step in session.steps(Points(), slots=2, slot_size=2, until=2, seed=3):
                numpy.random.seed(noise)
                random.seed(noise)
                torch.manual_seed(noise)
                with step:
                    for x, _ in step.batches():
                        model(x).sum().backward()
                        got.append(
                            (random.random(), float(numpy.random.rand()), float(torch.rand(())))
                        )
                    optimizer.step()
        return got

    first = draws(1)
    assert first == draws(2)
    assert len(set(first)) == len(first)


# ---- exceptions of the script's own


def test_an_exception_goes_through_and_the_step_comes_round_untouched() -> None:
    attempts: list[int] = []

    def fail_once(step: Any, *_: object) -> None:
        attempts.append(step.index)
        if attempts == [1, 2]:
            raise KeyError("mine")

    assert train(meddle=fail_once) == train()
    assert attempts == [1, 2, 2, 3, 4, 5]


def test_an_exception_between_two_slots_leaves_nothing_behind() -> None:
    failed: list[int] = []

    class Fragile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(x)
            if self.training and len(failed) < 2:
                failed.append(0)
                if len(failed) == 2:  # the second slot of the first step
                    raise KeyError("mine")
            return y

    model = Fragile()
    assert train(model=model) == train()
    assert len(failed) == 2


@pytest.mark.parametrize("error", [StepRolledBack("refused"), KeyError("mine")])
def test_after_a_vote_that_fails_the_row_says_that_user_code_runs(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who votes is taken to wait for others: a hang before the next attempt would be theirs."""
    phases: list[Phase] = []

    def fails(loop: Loop, attempt: Attempt) -> Counted:
        loop.parts.recorder.phase(Phase.VOTE)
        if not phases:
            raise error
        return vote(loop, attempt)

    monkeypatch.setattr(step_module, "vote", fails)
    model = net()
    optimizer = setup(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=1):
            with contextlib.suppress(KeyError), step:
                learn(model, step)
                optimizer.step()
            phases.append(session._parts.recorder.shown)
            assert step.committed is (len(phases) == 2)
    assert phases == [Phase.BETWEEN] * 2


def test_an_exception_after_the_commit_cannot_be_swallowed() -> None:
    model = net()
    optimizer = setup(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        steps = session.steps(Points(), slots=SLOTS, slot_size=2, until=3)
        step = next(steps)
        with pytest.raises(KeyError), step:  # noqa: PT012  # the body of the step is the point
            learn(model, step)
            optimizer.step()
            raise KeyError("between two optimizers")
        with pytest.raises(UsageError, match="step 1 was committed, but an exception left"):
            next(steps)


# ---- what is refused


def test_an_optimizer_outside_a_step_is_refused() -> None:
    model = net()
    optimizer = setup(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        with pytest.raises(OutsideStep, match=r"outside `with step:`"):
            optimizer.step()
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=1):
            with step:
                learn(model, step)
            with pytest.raises(OutsideStep):
                optimizer.step()
    optimizer.step()  # the session is over: nobody is in the way


def test_a_step_without_gradients_is_refused_and_the_next_may_do_better() -> None:
    model = net()
    optimizer = setup(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        steps = session.steps(Points(), slots=SLOTS, slot_size=2, until=1)
        step = next(steps)
        with pytest.raises(UsageError, match="the step has no gradients"), step:
            pass
        step = next(steps)
        with pytest.raises(UsageError, match="the step has no gradients"), step:
            optimizer.step()
        step = next(steps)
        assert step.index == 1
        with step:
            learn(model, step)
            optimizer.step()
        assert step.committed


def test_a_loop_left_early_is_refused() -> None:
    model = net()
    optimizer = setup(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        step = next(session.steps(Points(), slots=SLOTS, slot_size=2, until=1))
        with pytest.raises(UsageError, match="to its end"), step:  # noqa: PT012  # so is this
            for x, y in step.batches():
                nn.functional.mse_loss(model(x), y).backward()
                break
            optimizer.step()


def test_batches_twice_nested_and_outside_are_refused() -> None:
    model = net()
    with alone() as session:
        session.protect(model=model, optimizer=setup(model))
        step = next(session.steps(Points(), slots=SLOTS, slot_size=2, until=1))
        with pytest.raises(UsageError, match="inside `with step:`"):
            next(step.batches())
        with step:
            for _ in step.batches():
                with pytest.raises(UsageError, match="once in a step"):
                    next(step.batches())
                with pytest.raises(UsageError, match="do not nest"):
                    step.__enter__()
            with pytest.raises(UsageError, match="once in a step"):
                next(step.batches())


def test_a_step_is_used_once() -> None:
    model = net()
    optimizer = setup(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        step = next(session.steps(Points(), slots=SLOTS, slot_size=2, until=2))
        with step:
            learn(model, step)
            optimizer.step()
        with pytest.raises(UsageError, match="used up"), step:
            pass
        assert session.step == 1


def test_a_step_that_is_not_entered_is_refused() -> None:
    model = net()
    with alone() as session:
        session.protect(model=model, optimizer=setup(model))
        steps = session.steps(Points(), slots=SLOTS, slot_size=2, until=2)
        next(steps)
        with pytest.raises(UsageError, match="use `with step:`"):
            next(steps)


def test_record_belongs_into_the_loop() -> None:
    model = net()
    with alone() as session:
        session.protect(model=model, optimizer=setup(model))
        step = next(session.steps(Points(), slots=SLOTS, slot_size=2, until=1))
        with pytest.raises(UsageError, match="inside `for"):
            step.record(1.0)
        with step:
            learn(model, step)
            with pytest.raises(UsageError, match="inside `for"):
                step.record(1.0)


def test_the_order_of_calls_is_checked() -> None:
    model = net()
    with alone() as session:
        with pytest.raises(UsageError, match="before steps"):
            session.steps(Points(), slots=1, slot_size=1, until=1)
        session.protect(model=model, optimizer=setup(model))
        with pytest.raises(UsageError, match="once"):
            session.protect(model=model, optimizer=setup(model))
        with pytest.raises(UsageError, match="1 ranks cannot share 0 slots"):
            session.steps(Points(), slots=0, slot_size=1, until=1)
        session.steps(Points(), slots=1, slot_size=1, until=1)
        with pytest.raises(UsageError, match="once"):
            session.steps(Points(), slots=1, slot_size=1, until=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.append(nn.Linear(1, 1)),
        lambda m: m[0].weight.requires_grad_(False),
        lambda m: m[3].bias.requires_grad_(True),
        # As many as before, but not the same ones.
        lambda m: (m[0].weight.requires_grad_(False), m[3].bias.requires_grad_(True)),
        lambda m: m.__setitem__(0, nn.Linear(2, 8)),
    ],
    ids=["added", "frozen", "thawed", "swapped", "replaced"],
)
def test_parameters_that_change_are_noticed(change: Any) -> None:
    model = net()
    model[3].bias.requires_grad_(False)  # type: ignore[index]
    optimizer = setup(model)
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        steps = session.steps(Points(), slots=SLOTS, slot_size=2, until=2)
        with next(steps) as step:
            learn(model, step)
            optimizer.step()
        change(model)
        with pytest.raises(StateChanged, match="when the step loop began"), next(steps):
            pass


def test_modules_may_share_parameters() -> None:
    encoder, decoder = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
    both = nn.Sequential(encoder, decoder)
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    with alone() as session:
        session.protect(model=[both, encoder], optimizer=optimizer)
        for step in session.steps(Points(), slots=2, slot_size=2, until=2):
            with step:
                learn(both, step)
                optimizer.step()
        assert session.step == 2


def test_a_failure_of_protect_is_named() -> None:
    model = net()
    with alone() as session, pytest.raises(UsageError, match="without state_dict"):
        session.protect(model=model, optimizer=setup(model), scheduler=object())


def test_a_loop_may_sum_over_slots_end_early_and_agree_before_the_optimizer() -> None:
    with alone() as session:
        model = net()
        optimizer = setup(model)
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=9, mean=False):
            with step:
                for i, (x, y) in enumerate(step.batches()):
                    nn.functional.mse_loss(model(x), y).backward()
                    step.record(float(i))
                step.agree()
                assert step.committed
                assert step.loss == sum(range(SLOTS))
                optimizer.step()
            if step.index == 3:
                session.end_steps()
        assert session.step == 3


def test_steps_are_not_ended_before_they_begin() -> None:
    with alone() as session, pytest.raises(UsageError, match="belongs into the loop"):
        session.end_steps()
