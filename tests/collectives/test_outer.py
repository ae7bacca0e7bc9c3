"""The outer optimizer: the same as torch's SGD with Nesterov momentum, on any parameters."""

# mypy: allow-untyped-calls

import pytest
import torch

from ftkit.collectives.outer import Outer


def params():
    torch.manual_seed(0)
    return [torch.randn(3, 5, requires_grad=True), torch.randn(7).half(), torch.randn(())]


def test_it_takes_the_steps_of_torchs_nesterov_sgd():
    outer = Outer(params(), lr=0.7, momentum=0.9)
    reference = outer.params.clone().requires_grad_()
    sgd = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    for seed in range(5):
        torch.manual_seed(seed)
        drift = torch.randn(outer.params.numel())
        reference.grad = drift.clone()
        sgd.step()
        outer.step(drift)
        torch.testing.assert_close(outer.params, reference.detach())


def test_drift_is_what_impose_takes_back():
    model = params()
    before = [p.detach().clone() for p in model]
    outer = Outer(model, lr=1.0, momentum=0.0)
    assert outer.params.dtype == torch.float32
    assert not outer.drift().any()
    with torch.no_grad():
        for p in model:
            p.add_(1.0)
    drift = outer.drift()
    assert (drift + 1).abs().max() < 1e-2, "a gradient points back; half precision rounds"
    outer.impose()
    assert all(torch.equal(p, b) for p, b in zip(model, before, strict=True))
    assert model[0].requires_grad
    assert model[0].is_leaf
    outer.step(drift)
    outer.impose()
    assert (model[0] - before[0] - 1).abs().max() < 1e-6, "plain averaging moves by the drift"


def test_one_float64_parameter_keeps_the_outer_state_in_float64():
    assert Outer([torch.ones(2), torch.ones(1).double()], lr=1, momentum=0).params.dtype == (
        torch.float64
    )


@pytest.mark.parametrize(
    ("given", "lr", "momentum"),
    [
        ([], 0.7, 0.9),
        ([torch.ones(2, dtype=torch.int64)], 0.7, 0.9),
        ([torch.ones(2)], 0.0, 0.9),
        ([torch.ones(2)], float("nan"), 0.9),
        ([torch.ones(2)], 0.7, 1.0),
    ],
)
def test_what_cannot_be_stepped_is_refused(given, lr, momentum):
    with pytest.raises(ValueError, match=r"outer optimizer needs|need lr"):
        Outer(given, lr=lr, momentum=momentum)
