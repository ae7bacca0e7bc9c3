"""The undisturbed run that all drills are compared with, done once."""

import pytest

from tests.drills.jobs import STEPS, TRAINING, Run, run


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The training job on a single rank: the bits do not depend on how many there are."""
    folder = tmp_path_factory.mktemp("drills") / "reference"
    done = run(folder, TRAINING, [str(STEPS)], nproc=1)
    assert done.stop.code == 0, done.log
    assert len(done.params) == 1
    return done
