"""A stateful stream under faults: every batch counts once, and no more is read than must be."""

from pathlib import Path

import pytest

from ftkit.core.fault_plan import Kind, Point
from tests.drills.jobs import HERE, fault, run
from tests.drills.streaming import SLOTS, Stream, train
from tests.session.alone import alone

STEPS = 100


@pytest.mark.multiproc
def test_a_rank_killed_in_a_step_costs_one_batch_read_again(tmp_path: Path) -> None:
    undisturbed = Stream()
    with alone() as session:
        expected = train(session, undisturbed, STEPS, 1)
    done = run(
        tmp_path,
        HERE / "streaming.py",
        [str(STEPS)],
        faults=[fault(Kind.KILL, Point.BACKWARD, seat=1, step=10)],
    )
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    finals = {e["member"]: e for e in done.of("final")}
    (survivor, newcomer) = sorted(finals)
    assert survivor == 0 < newcomer
    assert done.params == {expected}
    assert finals[survivor]["read"] == undisturbed.read == list(range(1, STEPS * SLOTS + 1))
    (admitted,) = (e for e in done.of("admit") if e["member"] == newcomer)
    # Of the step it was restored to the last batch, for proof; then what comes next.
    first = admitted["step"] * SLOTS
    assert first >= 9 * SLOTS
    assert finals[newcomer]["read"] == list(range(first, STEPS * SLOTS + 1))
