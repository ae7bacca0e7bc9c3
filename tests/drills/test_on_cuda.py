"""A job whose model is on a GPU loses a rank, and then all of them."""

from pathlib import Path

import pytest
import torch

from ftkit.core.fault_plan import Kind, PlannedFault, Point
from ftkit.launch.checker import Answer
from tests.drills.jobs import HERE, STEPS, Run, fault, judge, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multiproc,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SCRIPT = HERE / "training_on_cuda.py"
ARGUMENTS = [str(STEPS), "cuda"]
#: Without it cuBLAS may add in another order each time.
SETTINGS = {"env": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("reference"), SCRIPT, ARGUMENTS, settings=SETTINGS)


@pytest.mark.parametrize(
    "faults",
    [
        [fault(Kind.KILL, Point.BACKWARD, 1, 40)],
        [fault(Kind.KILL, Point.ALL_REDUCE, 0, 60)],
        [fault(Kind.KILL, Point.BACKWARD, seat, 50) for seat in (0, 1)],
    ],
    ids=["one rank", "rank 0", "all ranks"],
)
def test_what_a_gpu_held_is_there_again(
    tmp_path: Path, reference: Run, faults: list[PlannedFault]
) -> None:
    assert len(reference.params) == 1, reference.log
    done = run(tmp_path / "run", SCRIPT, ARGUMENTS, faults=faults, settings=SETTINGS)
    outcome = judge(done, reference, seats=2)
    assert outcome.outcome is not Answer.FAIL, (outcome, done.log)
    assert len(done.of("spawn")) == 2 + len(faults)
    assert done.params == reference.params, "bit for bit"


@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_a_rank_with_a_communicator_of_nccl_is_there_again(tmp_path: Path, kind: str) -> None:
    """In a world of one, where nothing is sent: NCCL takes a GPU for each rank."""
    words = [*ARGUMENTS, kind]
    whole = run(tmp_path / "reference", SCRIPT, words, nproc=1, settings=SETTINGS)
    assert len(whole.params) == 1, whole.log
    faults = [fault(Kind.KILL, Point.FORWARD, 0, 40)]
    done = run(tmp_path / "run", SCRIPT, words, nproc=1, faults=faults, settings=SETTINGS)
    assert len(done.of("spawn")) == 2
    assert done.params == whole.params, done.log
