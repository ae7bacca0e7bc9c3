"""Two ranks whose layers move, without a job: what is switched, what is dropped, and what is proved."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ftkit.checkpoint.arena import arena_path
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.provision import create_arena
from ftkit.checkpoint.shadow import Owned, hash_of
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.ids import Generation, JobId, Seat, Step
from ftkit.recovery.vote import Ballot
from ftkit.session.recutter import Recutter

BOUNDS, UNTIL = (0, 3, 4), 1000


class Rank:
    """A stage in training, and the recutter of its rank; all that a job would be is made up."""

    def __init__(self, rank: int, folder: Path, meet: Callable[[int, bytes], list[bytes]]) -> None:
        torch.manual_seed(rank)
        self.rank, self.events = rank, list[tuple[str, dict[str, Any]]]()
        self.held = range(BOUNDS[rank], BOUNDS[rank + 1])
        self.model = nn.ModuleDict({str(i): nn.Linear(6, 6) for i in self.held})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state = ProtectedState(model=self.model, optimizer=[self.optimizer])
        self.train()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.train()
        layout = self.state.layout()
        self.arena = create_arena(
            arena_path(JobId("j"), Seat(rank), folder),
            data_bytes=layout.total_bytes,
            meta_bytes=layout.meta_bytes,
        )
        self.capture = Capture(self.arena, self.state)
        self.near: list[Any] = []
        group = SimpleNamespace(
            rank=rank,
            world=SimpleNamespace(generation=Generation(1)),
            exchange=lambda data: SimpleNamespace(wait=lambda: meet(rank, data)),
        )
        parts: Any = SimpleNamespace(
            group=group,
            env=SimpleNamespace(host="127.0.0.1", secret="ab" * 16),
            stall_s=20.0,
            trace=SimpleNamespace(event=lambda kind, **more: self.events.append((kind, more))),
            injector=SimpleNamespace(at=lambda *where, **more: None),
            recorder=SimpleNamespace(allowed=lambda seconds: contextlib.nullcontext()),
            membership=SimpleNamespace(step=0),
        )
        self.layers: Any = SimpleNamespace(
            module=lambda i: self.model[str(i)], on_gpu=False, target=None
        )
        snapshots: Any = SimpleNamespace(
            owned=lambda modules, optimizer: Owned.of(self.state, modules, optimizer),
            optimizer=self.optimizer,
            arena=self.arena.path,
            replicated=lambda: {i.name: i.tensor for i in self.state.picture().live},
        )
        worlds: Any = SimpleNamespace(switch_s=0.0, recut=self.recut)
        layers: Any = self.layers
        self.recutter = Recutter(parts, layers, snapshots, worlds, slots=4)
        self.layers.on_cut(BOUNDS)

    def recut(self, step: int, near: list[Any]) -> Any:
        self.near = near
        self.layers.on_cut(self.layers.target)
        return SimpleNamespace(moved=0)

    def train(self) -> None:
        x = torch.randn(3, 6)
        for layer in self.model.values():
            x = layer(x)
        x.square().sum().backward()

    def ballot(self, step: int, prepared: int = 0) -> Ballot:
        return Ballot(
            generation=Generation(1),
            step=Step(step),
            prepared=Generation(prepared),
            costs=dict.fromkeys(self.held, 1.0),
            move=self.recutter.move,
            stand=self.recutter.stand(step),
        )

    def close(self) -> None:
        self.recutter.close()
        self.capture.close()
        self.arena.close()

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [more for name, more in self.events if name == kind]


class Job:
    """Steps of two ranks, one after another."""

    def __init__(self, folder: Path) -> None:
        self._barrier = threading.Barrier(2)
        self._said: list[bytes] = [b"", b""]
        self.ranks = [Rank(r, folder, self._meet) for r in range(2)]
        self.step = 0

    def _meet(self, rank: int, data: bytes) -> list[bytes]:
        self._said[rank] = data
        self._barrier.wait(20)
        said = list(self._said)
        self._barrier.wait(20)
        return said

    def play(self, *, prepared: int = 0, twice: bool = False) -> None:
        """One step: vote, optimizers, commit, and what is due between two steps."""
        self.step += 1
        ballots = [r.ballot(self.step, prepared) for r in self.ranks]
        for r in self.ranks:
            r.recutter.counted(self.step, ballots, until=UNTIL, growing=False)
            r.capture.gate()
            for _ in range(1 + twice):
                r.recutter.before_optimizer(r.optimizer)
                r.optimizer.step()
            r.optimizer.zero_grad()
            r.capture.begin(Step(self.step), Generation(1))
            r.recutter.committed(self.step)
        threads = [
            threading.Thread(target=r.recutter.between, args=(self.step,), kwargs={"until": UNTIL})
            for r in self.ranks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for r in self.ranks:
            r.train()

    def until(self, kind: str, steps: int = 200) -> None:
        while not self.ranks[1].told(kind):
            self.play()
            time.sleep(0.002)
            assert self.step < steps, self.ranks[1].events


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job(tmp_path)
    yield made
    for rank in made.ranks:
        rank.close()


def hashes(rank: Rank, layer: int) -> dict[str, int]:
    mark = f"/{layer}."
    return {i.name: hash_of(i.tensor) for i in rank.state.picture().live if mark in i.name}


def test_a_layer_is_there_before_the_switch(job: Job) -> None:
    job.until("recut-begins")
    assert job.step == 8 + 2 * 8 + 1, "proposed, and agreed on by the next vote"
    owner, target = job.ranks
    seen = dict[str, int]()
    # As the owner has it at the switch: it trains on in this test.
    owner.layers.on_cut = _before(owner.layers.on_cut, lambda: seen.update(hashes(owner, 2)))
    job.until("recut")
    (done,) = target.told("recut")
    assert (done["before"], done["bounds"], done["layers"]) == ([0, 3, 4], [0, 2, 4], [2])
    assert (done["late_bytes"], done["unproved"]) == (0, [])
    (shadow,) = target.near
    assert {e.name for e in shadow.entries()} == set(seen)
    assert shadow.hashes() == seen
    assert not owner.near
    assert not owner.told("recut-dropped")


def _before(call: Callable[[Any], None], first: Callable[[], None]) -> Callable[[Any], None]:
    def both(bounds: Any) -> None:
        first()
        call(bounds)

    return both


def test_what_is_not_the_same_is_not_offered(job: Job) -> None:
    """The target's copy goes wrong by one bit after it arrived: a flip in its memory."""
    job.until("recut-begins")
    (line,) = job.ranks[1].recutter._incoming
    while not line.applied:
        time.sleep(0.002)
    bias = next(n for n in line.shadow.tensors if n.endswith("2.bias") and "state" not in n)
    with torch.no_grad():
        line.shadow.tensors[bias][0] += 1.0
    job.until("recut")
    (done,) = job.ranks[1].told("recut")
    assert done["unproved"] == [bias]
    assert bias not in {e.name for e in job.ranks[1].near[0].entries()}


def test_newcomers_end_it_and_later_it_begins_again(job: Job) -> None:
    job.until("recut-begins")
    job.play(prepared=2)
    for rank in job.ranks:
        (dropped,) = rank.told("recut-dropped")
        assert "about to grow" in dropped["reason"]
        assert rank.recutter.move == 0
    for _ in range(100):
        job.play(prepared=2)
    assert len(job.ranks[0].told("recut-begins")) == 1, "not while they are about to be let in"
    job.until("recut", 400)


def test_a_line_that_breaks_ends_it_on_all_ranks(job: Job) -> None:
    job.until("recut-begins")
    job.ranks[0].recutter._owned[0][1].fail("the cable was pulled")
    job.play()
    reasons = [rank.told("recut-dropped")[0]["reason"] for rank in job.ranks]
    assert reasons == ["ranks [0] gave it up: the cable was pulled", "ranks [0] gave it up"]
    job.until("recut", 400)


def test_optimizers_that_step_twice_cannot_be_followed(job: Job) -> None:
    job.until("recut-begins")
    job.play(twice=True)
    if job.ranks[0].told("recut"):  # all was there already, and this step was the last
        assert job.ranks[1].told("recut")[0]["unproved"]
    else:
        job.play()
        assert "more than once" in job.ranks[0].told("recut-dropped")[0]["reason"]


def test_another_world_ends_it(job: Job) -> None:
    job.until("recut-begins")
    for rank in job.ranks:
        rank.layers.on_cut(BOUNDS)
        assert rank.told("recut-dropped")[0]["reason"] == "the world has changed"
        assert rank.recutter.move == 0


def test_layers_on_a_gpu_are_left_alone(job: Job) -> None:
    for rank in job.ranks:
        rank.layers.on_gpu = True
    for _ in range(60):
        job.play()
    assert not job.ranks[0].events


def test_an_optimizer_that_cannot_be_replayed_moves_at_the_switch(job: Job) -> None:
    owner = job.ranks[0]
    job.play()
    for state in owner.optimizer.state.values():
        state["seen"] = 1
    job.until("recut")
    (begun,) = owner.told("recut-begins")
    assert "move at the switch" in begun["reason"]
    assert not job.ranks[1].near
