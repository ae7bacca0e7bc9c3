"""All state that training needs is found by name, captured, and comes back bit for bit."""

import json
import math
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.nn.parallel import DistributedDataParallel

from ftkit.checkpoint.cut_walk import CutWalk
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.memory import LiveMemory, as_numpy
from ftkit.checkpoint.plain import decode, encode
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.state import ProtectedState
from ftkit.checkpoint.walk import OptimizerWalk, unwrap
from ftkit.core.errors import IntegrityError, StateChanged, UsageError

from .helpers import Training, assert_same, contents


def take(state: ProtectedState) -> tuple[StateLayout, list[bytes], dict[str, Any]]:
    """A snapshot in private memory: layout, data, small."""
    from ftkit.checkpoint.chunks import units

    picture = state.picture()
    sources, data = LiveMemory(), np.zeros(picture.layout.total_bytes, dtype=np.uint8)
    sources.bind(picture.live, range(len(picture.live)))
    for unit in units(picture.layout, 1000, sources.whole):
        sources.copy(unit, data)
    return picture.layout, [data.tobytes()], json.loads(picture.small)


def test_a_fresh_optimizer_gets_its_state_in_the_order_of_its_parameters():
    trained, fresh = Training(seed=1), Training(seed=2)
    trained.train(1)
    fresh.state.load(*take(trained.state))
    assert list(fresh.optimizer.state) == [
        p for group in fresh.optimizer.param_groups for p in group["params"]
    ]


# ---------------------------------------------------------------------------- plain values

keys = st.text(max_size=3) | st.integers() | st.just("$tuple")
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
        | st.dictionaries(keys, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    """Equal, and of equal types all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@given(plain)
def test_plain_values_come_back_with_their_types(value):
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(value, "x", tensors), allow_nan=False)
    assert same(decode(json.loads(text), tensors.__getitem__), value)


def test_tensors_and_what_json_cannot_say():
    tensors: dict[str, torch.Tensor] = {}
    value = {"a": [torch.ones(2)], "b": (math.inf, -math.inf), "c": math.nan, "d": np.float64(2)}
    coded = json.loads(json.dumps(encode(value, "x", tensors), allow_nan=False))
    assert list(tensors) == ["x/a/0"]
    back = decode(coded, tensors.__getitem__)
    assert torch.equal(back["a"][0], torch.ones(2))
    assert back["b"] == (math.inf, -math.inf)
    assert math.isnan(back["c"])
    assert type(back["d"]) is float
    with pytest.raises(IntegrityError, match="unknown mark"):
        decode({"$pickle": "x"}, tensors.__getitem__)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"x", np.zeros(2), lambda: 0], ids=range(5))
def test_what_cannot_be_stored_is_named(value):
    with pytest.raises(UsageError, match=r"sampler/deep/1 is a "):
        encode({"deep": [1, value]}, "sampler", {})


def test_an_ordered_dict_becomes_a_dict():
    assert encode(OrderedDict(a=1), "x", {}) == {"a": 1}


# ----------------------------------------------------------------------------- round trips


def test_training_goes_on_bit_for_bit_in_fresh_objects():
    before, after = Training(seed=1), Training(seed=2)
    for step in range(1, 4):
        before.train(step)
    parameters = [id(p) for p in after.model.parameters()]
    after.state.load(*take(before.state))
    assert_same(before.state, after.state)
    assert [id(p) for p in after.model.parameters()] == parameters
    for step in range(4, 8):
        before.train(step)
        after.train(step)
    assert_same(before.state, after.state)
    assert isinstance(after.scheduler.milestones, Counter)
    weight = after.model.get_submodule("0").get_parameter("weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_going_back_to_before_the_first_step_empties_the_optimizer():
    training = Training()
    start = take(training.state)
    reference = contents(training.state)
    training.train(1)
    training.state.load(*start)
    assert training.optimizer.state == {}
    assert contents(training.state)[1] == reference[1]
    for name, tensor in contents(training.state)[0].items():
        assert torch.equal(tensor, reference[0][name]), name


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), amsgrad=True, capturable=False),
        lambda p: torch.optim.AdamW(p, fused=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.NAdam(p),
        lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.5),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    ],
    ids=["momentum", "sgd", "amsgrad", "fused", "adafactor", "nadam", "rmsprop", "lbfgs"],
)
def test_other_optimizers_go_on_bit_for_bit(make):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = nn.Linear(4, 3)
        return model, make(list(model.parameters()))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))

        def closure():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    (model, optimizer), (fresh, fresh_optimizer) = build(), build()
    for step in range(3):
        train(model, optimizer, step)
    left = ProtectedState(model=model, optimizer=optimizer)
    right = ProtectedState(model=fresh, optimizer=fresh_optimizer)
    right.load(*take(left))
    for step in range(3, 6):
        train(model, optimizer, step)
        train(fresh, fresh_optimizer, step)
    assert_same(left, right)


class Sampler:
    """An extra with a tensor and awkward plain values."""

    def __init__(self) -> None:
        self.state = {"rng": torch.arange(5, dtype=torch.uint8), "seen": {3: (1, 2)}, "at": 7}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_extras_two_optimizers_and_a_second_module():
    def build() -> tuple[ProtectedState, list[torch.optim.SGD], Sampler]:
        model, critic = nn.Linear(3, 3), nn.Linear(3, 1, dtype=torch.bfloat16)
        optimizers = [
            torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, critic)
        ]
        sampler = Sampler()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
        state = ProtectedState(model=model, optimizer=optimizers, critic=critic, sampler=sampler)
        return state, optimizers, sampler

    left, optimizers, sampler = build()
    for optimizer in optimizers:
        optimizer.step()
    sampler.state["at"] = 8
    names = [entry.name for entry in left.layout().entries]
    assert "optimizer.1/state/critic/weight/momentum_buffer" in names
    assert names[-1] == "sampler/rng", "early tensors come last"
    right, _, other = build()
    other.state = {}
    right.load(*take(left))
    assert other.state["at"] == 8
    assert other.state["seen"] == {3: (1, 2)}
    assert isinstance(other.state["rng"], torch.Tensor)
    assert torch.equal(other.state["rng"], torch.arange(5, dtype=torch.uint8))
    assert_same(left, right)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
)
def test_strided_tensors_of_any_dtype(dtype):
    module = nn.Module()
    wide = torch.randn(6, 8).to(dtype)
    module.register_buffer("late", wide.t()[::2])
    module.register_parameter("odd", nn.Parameter(wide[:, 1::3], requires_grad=False))
    module.register_buffer("none", torch.empty(0, 3, dtype=dtype))
    state = ProtectedState(model=module)
    before = contents(state)[0]
    layout, data, small = take(state)
    with torch.no_grad():
        for tensor in state.tensors():
            as_numpy(tensor)[...] = 0
    state.load(layout, data, small)
    for name, tensor in contents(state)[0].items():
        assert np.array_equal(as_numpy(tensor), as_numpy(before[name])), name


def test_names_are_free_of_wrappers():
    torch.manual_seed(0)
    inner = nn.Linear(2, 2)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(inner)
        plain_names = [e.name for e in ProtectedState(model=inner).layout().entries]
        assert [e.name for e in ProtectedState(model=wrapped).layout().entries] == plain_names
        assert plain_names == ["model/bias", "model/weight"]
        compiled: Any = torch.compile(inner, backend="eager")
        assert unwrap(compiled) is inner
        assert [e.name for e in ProtectedState(model=compiled).layout().entries] == plain_names
    finally:
        torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------- changes


def _move(model):
    weight = model.get_submodule("4").get_parameter("weight")
    weight.data = weight.data.clone()


def _resize(model):
    model.get_submodule("4").bias = nn.Parameter(torch.zeros(7))


def _add(model):
    model.extra = nn.Linear(1, 1)


def _remove(model):
    del model[0]


@pytest.mark.parametrize("change", [_move, _resize, _add, _remove])
def test_a_changed_model_is_noticed_until_accepted(change):
    training = Training()
    training.state.layout()
    training.state.picture()
    change(training.model)
    with pytest.raises(StateChanged, match=r"model/.*protect\(\) again"):
        training.state.picture()
    if change is _remove or change is _resize:
        return  # the optimizer trains a parameter that is gone: not ours to accept
    training.state.layout()
    training.state.picture()


def test_optimizer_state_may_move_and_appear():
    training = Training()
    first = training.state.layout()
    training.train(1)
    second = training.state.picture().layout
    assert len(second.entries) > len(first.entries)
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    assert training.state.picture().layout is second
    training.train(2)
    assert training.state.picture().layout is second


def test_another_model_is_refused_untouched():
    left, right = Training(width=8), Training(width=4)
    left.train(1)
    before = contents(right.state)
    with pytest.raises(StateChanged, match=r"model/.*float32\[8.*\] became float32\[4"):
        right.state.load(*take(left.state))
    after = contents(right.state)
    assert before[1] == after[1]
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])


def test_other_parts_or_groups_are_refused():
    left, right = Training(), Training()
    bare = ProtectedState(model=right.model, optimizer=right.optimizer)
    with pytest.raises(StateChanged, match="others"):
        bare.load(*take(left.state))
    parameters = list(right.model.parameters())
    split = torch.optim.AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}])
    state = ProtectedState(model=right.model, optimizer=split, scheduler=right.scheduler)
    with pytest.raises(StateChanged, match="groups"):
        state.load(*take(left.state))


def test_what_cannot_be_protected_is_named():
    model = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"parameter 0 of group 0 of optimizer"):
        ProtectedState(
            model=model, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters())
        ).layout()
    with pytest.raises(UsageError, match=r"model/weight is on meta"):
        ProtectedState(model=nn.Linear(2, 2, device="meta")).layout()
    with pytest.raises(UsageError, match="function without state_dict"):
        ProtectedState(model=model, odd=lambda: 0)  # type: ignore[arg-type]
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(UsageError, match=r"model/sparse"):
        ProtectedState(model=model).layout()
    del model.sparse
    model.register_buffer("wide", torch.ones(1, 3).expand(2, 3))
    with pytest.raises(UsageError, match=r"model/wide is expanded"):
        ProtectedState(model=model).layout()


FRESH = """
import sys
from pathlib import Path
from typing import Any
from ftkit.checkpoint.arena import Arena
from tests.checkpoint.helpers import Training
training = Training(seed=5)
arena = Arena.open(Path(sys.argv[1]), writable=True)
head = arena.head(arena.newest())
training.state.load(head.layout, arena.blocks(head), head.small)
for step in range(head.sealed.step + 1, 8):
    training.train(step)
from ftkit.checkpoint.capture import Capture
with Capture(arena, training.state) as capture:
    capture.begin(7, 2)
"""


@pytest.mark.parametrize("kind", [OptimizerWalk, CutWalk])
def test_state_of_a_parameter_that_is_not_trained_is_refused(kind):
    trained = nn.Parameter(torch.ones(2))
    walk = kind("optimizer", torch.optim.SGD([trained]), lambda _: "w")
    with pytest.raises(StateChanged, match=r"has 'm' of parameter 'x', which optimizer does not"):
        walk.prepare("optimizer/state/x/m", torch.float32, (2,), walk.parameters())


@pytest.mark.multiproc
def test_a_fresh_process_goes_on_bit_for_bit(tmp_path):
    from ftkit.checkpoint.capture import Capture
    from ftkit.core.ids import Generation, Step

    training = Training(seed=1)
    for step in range(1, 4):
        training.train(step)
    path = tmp_path / "arena"
    with ensure_arena(path, training.state.layout()) as arena:
        with Capture(arena, training.state) as capture:
            capture.begin(Step(3), Generation(1))
        root = Path(__file__).parents[2]
        subprocess.run([sys.executable, "-c", FRESH, str(path)], cwd=root, check=True, timeout=60)
        head = arena.head(arena.find(Step(7), Generation(2)))
        other = Training(seed=9)
        other.state.load(head.layout, arena.blocks(head), head.small)
    for step in range(4, 8):
        training.train(step)
    assert_same(training.state, other.state)
