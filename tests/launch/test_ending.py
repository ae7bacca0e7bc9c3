"""The last checkpoint of a job that is over: when there is one, and when it is waited for no more."""

import pytest

from ftkit.core import exit_codes
from ftkit.core.ids import Generation, NodeId, Seat, Step
from ftkit.core.inventory import Copy, Part
from ftkit.launch.checkpoint_lead import CheckpointLead
from ftkit.launch.checkpointing import Order, Report, Stage
from ftkit.launch.config import PREEMPTED_S
from ftkit.launch.ending import LAST_S, End
from ftkit.recovery.plan import Stop

WELL = Stop(code=0, reason="every rank finished")
TOLD = Stop(code=exit_codes.INTERRUPTED, reason="interrupted")
FAILED = Stop(code=1, reason="a rank failed")


def held(step: int) -> Copy:
    """All of a snapshot, on the only node."""
    return Copy(
        seat=Seat(0),
        node=NodeId(0),
        path="seat-0",
        step=Step(step),
        generation=Generation(1),
        part=Part(layout="a", first=0, end=80, total=80),
    )


class Job:
    """A job of one node, as its coordinator sees it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.lead = CheckpointLead(1, self.tell)
        self.stop: Stop | None = None
        self.running = True
        self.interrupted = False
        self.now = 0.0
        self.newest = 0
        self.trained_to: Step | None = None

    def tell(self, kind: str, /, **more: object) -> None:
        self.events.append((kind, more))

    def over(self) -> bool:
        return self.lead.over

    def look(self, report: Report | None = None) -> Order | None:
        end = None
        if self.stop is not None:
            end = End(
                stop=self.stop,
                trained_to=self.trained_to,
                copies=tuple(held(s) for s in range(max(1, self.newest - 2), self.newest + 1)),
                running=self.running,
                interrupted=self.interrupted,
            )
        self.lead.advance({NodeId(0): report or Report()}, end, now=self.now)
        return self.lead.order

    def end(self, stop: Stop, newest: int) -> None:
        self.stop, self.newest = stop, newest

    def write(self, order: Order | None, *, error: str = "") -> None:
        """The node does what is ordered, or fails."""
        assert order is not None
        self.look(Report(attempt=order.attempt, done=Stage.COMMIT, error=error))

    def told(self, kind: str) -> list[dict[str, object]]:
        return [more for k, more in self.events if k == kind]


@pytest.mark.parametrize("stop", [WELL, TOLD])
def test_the_newest_step_is_written_once_the_ranks_are_gone(stop: Stop) -> None:
    job = Job()
    job.end(stop, newest=45)
    assert job.look() is None
    assert not job.over(), "a rank may still capture"
    job.running = False
    order = job.look()
    assert order is not None
    assert order.step == 45
    job.write(order)
    job.look()
    assert job.over()
    assert job.told("checkpoint-last") == [{"step": 45, "failed": ""}]
    assert job.look() is None


def test_a_step_that_is_on_disk_is_not_written_again() -> None:
    job = Job()
    due = Report(due=(held(40),))
    order = job.look(due)
    job.write(order)
    job.end(WELL, newest=40)
    job.running = False
    assert job.look(due) is None
    assert job.over()
    assert job.told("checkpoint-last") == [{"step": 40, "failed": ""}]


def test_one_that_is_under_way_is_finished_first() -> None:
    job = Job()
    older = job.look(Report(due=(held(40),)))
    job.end(WELL, newest=45)
    job.running = False
    assert job.look() == older
    job.write(older)
    newest = job.look()
    assert newest is not None
    assert newest.step == 45
    job.write(newest)
    job.look()
    assert job.over()


def test_a_failed_job_writes_nothing_more_and_one_without_snapshots_cannot() -> None:
    failed = Job()
    failed.end(FAILED, newest=45)
    failed.running = False
    assert failed.look() is None
    assert failed.over()
    empty = Job()
    empty.end(WELL, newest=0)
    empty.running = False
    assert empty.look() is None
    assert empty.over()
    assert empty.told("checkpoint-last") == [{"step": None, "failed": ""}]


def test_a_last_step_that_went_with_a_node_is_told() -> None:
    job = Job()
    job.write(job.look(Report(due=(held(40),))))
    job.trained_to = Step(45)
    job.end(WELL, newest=40)
    job.running = False
    assert job.look() is None
    assert job.over()
    ((last),) = job.told("checkpoint-last")
    assert last["step"] == 45
    assert "no complete snapshot" in str(last["failed"])


def test_a_disk_that_is_full_at_the_end_is_told_and_not_tried_again() -> None:
    job = Job()
    job.end(WELL, newest=45)
    job.running = False
    job.write(job.look(), error="the disk is full")
    assert job.look() is None
    assert job.over()
    reason = "node 0: the disk is full"
    assert job.told("checkpoint-failed") == [{"step": 45, "reason": reason}]
    assert job.told("checkpoint-last") == [{"step": 45, "failed": reason}]


def test_ctrl_c_ends_the_wait_for_a_job_that_ended_well() -> None:
    job = Job()
    job.end(WELL, newest=45)
    job.running = False
    assert job.look() is not None
    job.interrupted = True
    assert job.look() is None
    assert job.over()
    assert job.told("checkpoint-last") == [{"step": 45, "failed": "interrupted"}]


@pytest.mark.parametrize(("stop", "limit"), [(WELL, LAST_S), (TOLD, PREEMPTED_S)])
def test_a_store_that_is_too_slow_is_waited_for_so_long_and_progress_is_told(
    stop: Stop, limit: float
) -> None:
    job = Job()
    job.interrupted = stop is TOLD
    job.end(stop, newest=45)
    job.running = False
    order = job.look()
    assert order is not None
    for second in range(8):
        job.now = float(second)
        assert job.look(Report(attempt=order.attempt, written=10 * second)) == order
    assert job.told("checkpoint-progress") == [
        {"step": 45, "bytes": 20, "of": 80},
        {"step": 45, "bytes": 60, "of": 80},
    ]
    job.now = limit
    assert job.look() == order
    job.now = limit + 0.1
    assert job.look() is None
    assert job.over()
    ((last),) = job.told("checkpoint-last")
    assert str(last["failed"]).startswith("it was not done")
