"""Accelerate: what was prepared is protected, and the main process is the first of the world."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ftkit
from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import Kind, Point
from tests.drills.jobs import fault, run

pytest.importorskip("accelerate", reason="accelerate is not installed: ftkit[accelerate]")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    from accelerate.state import AcceleratorState, PartialState

    from ftkit.integrations.accelerate import Accelerator
    from tests.integrations import accelerate_job as job

STEPS = 40


@pytest.fixture(autouse=True)
def forgotten(fresh: None) -> Any:
    """Accelerate keeps its state for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_gradients_are_the_mean_over_all_batches_of_a_step() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=3, cpu=True)
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1)
    plain = torch.nn.Linear(2, 1)
    plain.load_state_dict(net.state_dict())
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loader = DataLoader(TensorDataset(torch.randn(12, 2)), batch_size=4)
    for step in accelerator.steps(loader, until=1):
        with step:
            for (x,) in step.batches():
                (plain(x).square().mean() / 3).backward()
                accelerator.backward(model(x).square().mean())
            for p, q in zip(net.parameters(), plain.parameters(), strict=True):
                assert p.grad is not None
                assert q.grad is not None
                torch.testing.assert_close(p.grad, q.grad)
            optimizer.step()


def test_nothing_prepared_is_refused() -> None:
    with pytest.raises(UsageError, match="prepare the model"):
        Accelerator(cpu=True).steps([1], until=1)


def test_accelerate_that_was_set_up_before_is_refused() -> None:
    PartialState(cpu=True)
    PartialState._shared_state["num_processes"] = 2
    with pytest.raises(UsageError, match="before anything else"):
        Accelerator(cpu=True)


@pytest.mark.multiproc
@pytest.mark.timeout(300)
def test_the_first_rank_is_killed_and_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    truth = job.main(STEPS, 6)
    done = run(
        tmp_path,
        Path(job.__file__),
        [str(STEPS), "3"],
        faults=[fault(Kind.KILL, Point.BACKWARD, seat=0, step=12)],
    )
    assert done.stop.code == 0, done.log
    assert [e["seat"] for e in done.of("admit")] == [0]
    assert done.params == {ftkit.init().digest()}
    for told in done.of("trained"):
        assert told["first"] is (told["seat"] == 0)
        assert {k: told[k] for k in ("steps", "rate", "last")} == {
            k: truth[k] for k in ("steps", "rate", "last")
        }
