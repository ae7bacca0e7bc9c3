"""Gradients that are not finite: the step is played again, and what is said depends on it."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ftkit.core.corruption_plan import PlannedCorruption, Target
from ftkit.core.errors import NotFinite, UsageError
from ftkit.session.session import Session
from tests.session.alone import SLOTS, Points, alone, bits, learn, net, train

STEP = 3


class Listener:
    """In the agent's place: keeps what it is told."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def report(self, message: dict[str, Any]) -> None:
        if message["type"] == "signal":
            self.found.append(message["signal"])

    def close(self) -> None:
        pass


def plan(target: Target = Target.GRADIENT, **more: Any) -> PlannedCorruption:
    return PlannedCorruption(target=target, seat=0, member=0, step=STEP, **more)


def play(
    *planned: PlannedCorruption, steps: int = 5, **options: Any
) -> tuple[list[bytes], list[dict[str, Any]], list[bool]]:
    """The parameters at the end, what was told, and which steps were skipped."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    listener, skipped = Listener(), []
    with alone() as session:
        session.protect(model=model, optimizer=optimizer)
        session._parts.corruptions[:] = planned
        with heard(session, listener):
            for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=steps, **options):
                with step:
                    learn(model, step)
                    optimizer.step()
                if step.committed:
                    skipped.append(step.skipped)
    return bits(model), listener.found, skipped


def finite(params: list[bytes]) -> bool:
    weights = [torch.frombuffer(bytearray(p), dtype=torch.float32) for p in params[:2]]
    return all(bool(w.isfinite().all()) for w in weights)


@contextlib.contextmanager
def heard(session: Session, listener: Listener) -> Iterator[None]:
    session._parts.control = listener  # type: ignore[assignment]
    try:
        yield
    finally:
        session._parts.control = None


def test_what_is_gone_the_second_time_was_corruption_and_leaves_no_trace() -> None:
    params, found, _ = play(plan())
    assert params == train()
    (told,) = found
    assert (told["fault"], told["member"], told["step"]) == ("sdc", 0, STEP)
    assert told["evidence"]["norm"] == "nan"


def test_what_is_there_again_is_in_the_data_and_named_with_slot_sample_and_parameter() -> None:
    params, found, skipped = play(plan(attempts=2))
    told, *later = found
    assert (told["fault"], told["member"], told["step"]) == ("numeric", 0, STEP)
    evidence = told["evidence"]
    assert evidence["slots"] == [0]
    assert len(evidence["samples"]["0"]) == 2
    assert len(evidence["parameters"]) == 1
    assert evidence["norm"] == "nan"
    assert "twice from the same samples" in told["reason"]
    assert not finite(params)
    assert skipped == [False] * 5
    # The model is NaN from here on: that is said, and nothing is played again for it.
    assert [one["step"] for one in later] == [4, 5]
    assert all("as at the step before" in one["reason"] for one in later)


def test_such_a_step_can_be_skipped_and_the_training_is_whole() -> None:
    params, found, skipped = play(plan(attempts=2), on_nan="skip")
    assert [told["fault"] for told in found] == ["numeric"]
    assert skipped == [False, False, True, False, False]
    assert finite(params)
    assert params != train()


def test_or_end_the_job() -> None:
    with pytest.raises(NotFinite, match=f"at step {STEP}, and were so again"):
        play(plan(attempts=2), on_nan="raise")


def test_an_option_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="'ignore' is not a valid OnNaN"):
        play(on_nan="ignore")
    with pytest.raises(UsageError, match="verify_every is -1"):
        play(verify_every=-1)


def test_a_loss_that_leaps_is_told_with_the_rank_whose_gradients_leapt() -> None:
    many = PlannedCorruption(target=Target.LOSS, seat=0, member=0, step=40, factor=1e4, steps=3)
    _, found, _ = play(many, steps=50)
    assert {told["fault"] for told in found} == {"numeric"}
    assert found[0]["evidence"]["kind"] == "loss-spike"
    assert found[0]["step"] in (41, 42)
    assert play(steps=50)[1] == []


def test_small_numbers_of_half_precision_are_weighed_in_single() -> None:
    from ftkit.collectives.gradients import norm_of

    values = torch.full((1000,), 300.0, dtype=torch.float16)
    assert norm_of(values).item() == pytest.approx(300 * math.sqrt(1000))
    values[7] = math.nan
    assert math.isnan(norm_of(values).item())
