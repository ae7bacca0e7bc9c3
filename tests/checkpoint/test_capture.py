"""What is captured beside training is the state as it was committed, or nothing."""

import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ftkit.checkpoint import memory
from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import CapacityError, StateChanged, UsageError
from ftkit.core.ids import Generation, Step

from .helpers import Training, assert_same, contents, make_arena

G = Generation(1)


class Rig:
    """A training after its first step, its arena, and a capture."""

    def __init__(self, tmp_path: Path, **options: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.training = Training(seed=1)
        self.training.train(1)
        self.arena = make_arena(tmp_path / "arena", self.training.state.layout())
        self.capture = Capture(self.arena, self.training.state, self.note, **options)

    def note(self, kind: str, /, **fields: object) -> None:
        self.events.append((kind, fields))

    def load(self, step):
        other = Training(seed=2)
        head = self.arena.head(self.arena.find(Step(step)))
        other.state.load(head.layout, self.arena.blocks(head), head.small)
        return other

    def close(self) -> None:
        self.capture.abandon()
        self.capture.close()
        self.arena.close()


@pytest.fixture
def rig(tmp_path):
    made = Rig(tmp_path)
    yield made
    made.close()


def hold_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the capture thread from working, so that the training thread must."""
    real, main = Capture._work, threading.current_thread()
    monkeypatch.setattr(
        Capture,
        "_work",
        lambda self, job: real(self, job) if threading.current_thread() is main else None,
    )


@pytest.mark.parametrize("starved", [False, True])
def test_every_step_is_captured_as_it_was_committed(rig, monkeypatch, starved):
    if starved:  # all copying happens after forward has changed what it may change
        hold_thread(monkeypatch)
    references = {1: Training(seed=1)}
    references[1].train(1)
    for step in range(1, 7):
        rig.capture.begin(Step(step), G)
        rig.training.forward_backward(step + 1)  # changes BatchNorm and the hidden buffer
        rig.capture.gate()
        rig.training.update()
        assert rig.arena.sealed_steps()[-1] == step
        reference = Training(seed=1)
        for past in range(1, step + 1):
            reference.train(past)
        assert_same(reference.state, rig.load(step).state)
    assert rig.capture.snapshots == 6
    assert rig.capture.bytes == 6 * rig.training.state.picture().layout.total_bytes
    assert [k for k, _ in rig.events] == ["snapshot"] * 6
    last = rig.capture.last
    assert last is not None
    assert rig.events[-1][1]["bytes"] == last.bytes
    assert rig.capture.blocked_s >= last.blocked_s > 0


def test_the_thread_seals_without_a_gate(rig):
    rig.capture.begin(Step(1), G)
    deadline = threading.Event()
    for _ in range(2000):
        if rig.arena.sealed_steps():
            break
        deadline.wait(0.01)
    assert rig.arena.sealed_steps() == (1,)


def test_the_training_thread_does_it_all_when_the_capture_thread_is_starved(rig, monkeypatch):
    hold_thread(monkeypatch)
    rig.capture.begin(Step(1), G)
    before = contents(rig.training.state)
    assert rig.capture.gate() > 0
    assert rig.capture.last is not None
    assert rig.capture.last.assisted_bytes == rig.capture.last.bytes
    rig.training.train(2)
    loaded = contents(rig.load(1).state)
    assert loaded[1] == before[1]
    assert all(torch.equal(loaded[0][name], before[0][name]) for name in before[0])


def test_a_failure_of_the_thread_reaches_the_gate_and_the_next_snapshot_works(rig, monkeypatch):
    real, failed = memory.LiveMemory.copy, threading.Event()

    def broken(self, unit, data):
        if threading.current_thread().name == "ftkit-capture":
            failed.set()
            raise RuntimeError("bus on fire")
        failed.wait(20)
        real(self, unit, data)

    monkeypatch.setattr(memory.LiveMemory, "copy", broken)
    rig.capture.begin(Step(1), G)
    assert failed.wait(20)
    with pytest.raises(RuntimeError, match="bus on fire"):
        rig.capture.gate()
    assert rig.arena.sealed_steps() == ()
    assert rig.events[-1][0] == "snapshot-failed"
    monkeypatch.setattr(memory.LiveMemory, "copy", real)
    rig.capture.begin(Step(2), G)
    rig.capture.gate()
    assert rig.arena.sealed_steps() == (2,)


def test_abandon_at_any_moment_never_seals_a_torn_snapshot(rig):
    chance = random.Random(5)
    for step in range(1, 60):
        before = contents(rig.training.state)[0]
        rig.capture.begin(Step(step), G)
        threading.Event().wait(chance.choice([0, 0.0002, 0.001]))
        rig.capture.abandon()
        with torch.no_grad():
            for tensor in rig.training.model.parameters():
                tensor.add_(1)
        if step in rig.arena.sealed_steps():
            loaded = contents(rig.load(step).state)[0]
            assert all(torch.equal(loaded[name], before[name]) for name in before)
        assert rig.capture.gate() == 0.0
    for item in rig.arena.snapshots():
        rig.arena.verify(item)


def test_begin_finishes_what_was_not_gated(rig):
    rig.capture.begin(Step(1), G)
    rig.capture.begin(Step(2), G)
    rig.capture.close()
    assert rig.arena.sealed_steps() == (1, 2)
    rig.capture.close()


def test_a_layout_that_grew_needs_a_larger_arena(tmp_path):
    training = Training(seed=1)
    path = tmp_path / "arena"
    arena = make_arena(path, training.state.layout())
    with Capture(arena, training.state) as capture:
        capture.begin(Step(0), G)
        capture.gate()
        training.train(1)  # AdamW's moments appear
        with pytest.raises(CapacityError, match="ensure_arena"):
            capture.begin(Step(1), G)
        larger = ensure_arena(path, training.state.picture().layout)
        capture.rebind(larger)
        arena.close()
        capture.begin(Step(1), G)
        capture.gate()
        assert larger.sealed_steps() == (0, 1), "the older snapshot came along"
    with pytest.raises(UsageError, match="read-only"):
        Capture(Arena.open(path), training.state)
    larger.close()


def test_moved_parameters_are_noticed_at_begin(rig):
    rig.capture.begin(Step(1), G)
    rig.training.model.double()
    rig.capture.abandon()
    with pytest.raises(StateChanged, match=r"float32.*float64"):
        rig.capture.begin(Step(2), G)


def test_small_state_that_outgrows_its_room_fails_that_snapshot(tmp_path):
    class Log:
        def __init__(self) -> None:
            self.lines = [""]

        def state_dict(self):
            return {"lines": self.lines}

        def load_state_dict(self, state):
            self.lines = state["lines"]

    log = Log()
    state = ProtectedState(model=nn.Linear(2, 2), log=log, small_bytes=500)
    with make_arena(tmp_path / "a", state.layout()) as arena, Capture(arena, state) as capture:
        capture.begin(Step(1), G)
        log.lines = ["x" * 1000]
        capture.gate()
        capture.begin(Step(2), G)
        with pytest.raises(CapacityError, match="room for 500"):
            capture.gate()
        assert arena.sealed_steps() == (1,)


@pytest.mark.parametrize("what", ["load_state_dict", "optimizer", "average"])
def test_validate_finds_a_change_outside_the_optimizer(tmp_path, what):
    rig = Rig(tmp_path, validate=True)
    rig.capture.begin(Step(1), G)
    rig.training.forward_backward(2)  # what forward changes is fine
    rig.capture.gate()
    rig.training.update()
    rig.capture.begin(Step(2), G)
    other = Training(seed=3)
    if what == "load_state_dict":
        rig.training.model.load_state_dict(other.model.state_dict())
    elif what == "optimizer":
        next(iter(rig.training.optimizer.state.values()))["exp_avg"].add_(1)
    else:
        with torch.no_grad():
            for mine, theirs in zip(
                rig.training.model.parameters(), other.model.parameters(), strict=True
            ):
                mine.lerp_(theirs, 0.5)
    with pytest.raises(StateChanged, match=r"(model|optimizer)/.*after step 2 was committed"):
        rig.capture.gate()
    assert rig.arena.sealed_steps() == (1,), "a doubtful snapshot is not sealed"
    rig.close()


def test_an_empty_state_still_seals(tmp_path):
    state = ProtectedState(model=nn.Identity())
    with make_arena(tmp_path / "a", state.layout()) as arena, Capture(arena, state) as capture:
        capture.begin(Step(1), G)
        capture.gate()
        assert arena.sealed_steps() == (1,)


TRAINER = """
import mmap, sys
from pathlib import Path
from tests.checkpoint.survival import train
train(Path(sys.argv[1]), mmap.mmap(-1, mmap.PAGESIZE))
"""


@pytest.mark.multiproc
def test_a_trainer_killed_again_and_again_goes_on_from_whole_snapshots(tmp_path):
    training = Training(seed=1)
    training.train(1)
    path = tmp_path / "arena"
    make_arena(path, training.state.layout()).close()
    training = Training(seed=1)
    root, chance, done = Path(__file__).parents[2], random.Random(3), 0
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-c", TRAINER, str(path)], cwd=root)
        try:
            with Arena.open(path) as arena:
                while (newest := arena.newest()) is None or newest.step < done + 5:
                    assert process.poll() is None
                    # Leave the core to the trainer; the loop is bounded by the test's timeout.
                    threading.Event().wait(0.005)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0, 0.03))
        finally:
            process.kill()
            process.wait(20)
        with Arena.open(path) as arena:
            newest = arena.newest_good()
            assert newest is not None
            assert newest == arena.newest(), "what is sealed is whole"
            for step in range(done + 1, newest.step + 1):
                training.train(step)
            done = newest.step
            head = arena.head(newest)
            other = Training(seed=2)
            other.state.load(head.layout, arena.blocks(head), head.small)
        assert_same(other.state, training.state)


@pytest.mark.gpu
def test_cuda_tensors_go_through_pinned_memory(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state = ProtectedState(model=model, optimizer=optimizer)

    def forward_backward() -> None:
        model(torch.randn(64, 512, device="cuda")).square().mean().backward()

    forward_backward()
    optimizer.step()
    with (
        make_arena(tmp_path / "a", state.layout()) as arena,
        Capture(arena, state, validate=True) as capture,
    ):
        for step in range(1, 6):
            before = contents(state)[0]
            capture.begin(Step(step), G)
            forward_backward()
            capture.gate()
            optimizer.step()
            optimizer.zero_grad()
            head = arena.head(arena.find(Step(step)))
            assert any(not torch.equal(t, before[n]) for n, t in contents(state)[0].items())
            state.load(head.layout, arena.blocks(head), head.small)
            assert all(torch.equal(t, before[n]) for n, t in contents(state)[0].items())
