"""Stages are lost with all that held them: only a job that allows it goes on, and says what it did."""

import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ftkit.core import exit_codes
from ftkit.launch.engine import Engine
from ftkit.launch.event_tail import EventTail
from ftkit.launch.keeper import FOLDER
from ftkit.launch.report_view import RunView
from ftkit.recovery.protocol import SHARDS_BACK
from tests.drills.jobs import HERE, Run, run

pytestmark = pytest.mark.multiproc

STEPS, STRUCK_AT = 36, 22
EACH_LAYER = "2,2,2,2,2,2,2,2"

Events = list[dict[str, Any]]


@dataclass
class Strike:
    """Ends a node, its agent with all that it holds, once the job has come so far."""

    folder: Path
    node: int
    first: Callable[[], None] = lambda: None
    """Done just before."""
    after: str = "commit"
    """A kind of event that is waited for."""
    events: Events = field(default_factory=list)
    tail: EventTail | None = None
    done: bool = False

    def __call__(self, engine: Engine) -> None:
        if self.done:
            return
        self.tail = self.tail or EventTail(self.folder)
        self.events += self.tail.poll()
        step = max((e["step"] for e in self.events if e["kind"] == "commit"), default=0)
        if step >= STRUCK_AT and any(e["kind"] == self.after for e in self.events):
            self.done = True
            self.first()
            engine.kill_node(self.node)


@pytest.fixture
def shm() -> Iterator[Path]:
    root = Path("/dev/shm") / f"test-{uuid.uuid4().hex[:8]}"
    root.mkdir()
    yield root
    shutil.rmtree(root)


def copies_go(shm: Path, node: int) -> Callable[[], None]:
    """What `node` keeps of others is lost, too."""

    def go() -> None:
        for kept in shm.glob(f"*-n{node}/{FOLDER}/*.arena"):
            kept.unlink()

    return go


def job(strike: Strike, shm: Path, mode: str = "approximate", *, nodes: int = 2) -> Run:
    """Four stages on two nodes, or one on each of three or four."""
    return run(
        strike.folder, HERE / "pipeline.py", [str(STEPS), EACH_LAYER, mode],
        nproc=2 if nodes == 2 else 1, nodes=nodes, max_stall_s=6.0, on_poll=strike, shm_root=shm,
    )  # fmt: skip


def went_on(done: Run, way: str) -> dict[str, Any]:
    """What the one approximation was of a job that did all its steps."""
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    (told,) = done.of("approximate")
    assert told["way"] == way
    loads = [e for e in done.of("restore") if e["generation"] == told["generation"]]
    assert sum(e["approximate"] for e in loads) > 0
    # Nobody else went back, but for what a failure costs a pipeline anyway.
    assert told["step"] >= STRUCK_AT - SHARDS_BACK
    assert {e["step"] for e in done.of("commit")} == set(range(1, STEPS + 1))
    view = RunView()
    for event in done.events:
        view.feed(event)
    (sentence,) = view.approximate
    assert way in sentence
    assert view.to_json()["approximate"] == [sentence]
    return told


def test_lost_stages_go_on_from_the_copies_that_another_node_kept(
    tmp_path: Path, shm: Path
) -> None:
    """The first two: without one neighbour each, and with no other way."""
    strike = Strike(tmp_path / "run", node=0, after="kept")
    done = job(strike, shm)
    told = went_on(done, "stale-shard")
    assert (told["stages"], told["seats"]) == ([0, 1], [0, 1])
    kept = {e["step"] for e in done.of("kept") if e["seat"] in (0, 1) and e["generation"] == 1}
    assert told["step"] - told["age"] in kept
    assert told["age"] > SHARDS_BACK


def test_a_lost_stage_is_averaged_where_nothing_older_is_left(tmp_path: Path, shm: Path) -> None:
    strike = Strike(tmp_path / "run", node=1, first=copies_go(shm, 2))
    done = job(strike, shm, nodes=3)
    told = went_on(done, "checkfree")
    assert told["stages"] == [1]
    averaged = done.of("averaged")
    assert averaged
    assert all(norm > 0 for e in averaged for norm in e["norms"])
    assert len({tuple(e["norms"]) for e in averaged}) == 1


def test_a_lost_first_stage_is_taken_over_by_the_one_that_learned_its_part(
    tmp_path: Path, shm: Path
) -> None:
    """Its node, all it held, and what others kept of it are gone; its embedding was copied."""
    strike = Strike(tmp_path / "run", node=0, first=copies_go(shm, 1))
    done = job(strike, shm, "swapped", nodes=4)
    told = went_on(done, "checkfree+")
    assert told["stages"] == [0]
    over = done.of("taken-over")
    assert over
    assert all(e["learned"] and e["layers"] == [0, 2] for e in over)
    assert [e["made_of"] for e in over if e["made_of"]] == [[[1, 2]]]
    assert [e["copied"] for e in over if e["copied"]] == [[0]]
    losses = {e["step"]: e["loss"] for e in done.of("commit") if e.get("loss") is not None}
    assert losses[STEPS] < 2 * losses[told["step"]], "it did not begin anew"


def test_a_job_that_does_not_allow_it_ends_with_the_reason(tmp_path: Path, shm: Path) -> None:
    strike = Strike(tmp_path / "run", node=1)
    done = job(strike, shm, "fixed")
    assert done.stop.code == exit_codes.UNRECOVERABLE, f"{done.stop}\n{done.log}"
    for words in ("the shards of seats [2, 3] are lost", "allow_approximate=True"):
        assert words in done.stop.reason
    assert not done.of("approximate")
