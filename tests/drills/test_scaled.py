"""consistency="scaled": four ranks, three, four again; the same samples, parameters but for rounding."""

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from ftkit.core.fault_plan import Kind, Point
from tests.drills.jobs import HERE, Run, fault, run
from tests.drills.scaled import SLOT_SIZE, SLOTS, STEPS

pytestmark = pytest.mark.multiproc

JOB = HERE / "scaled.py"

#: What docs/sharded.md states: of the largest parameter, after these steps.
BOUND = 1e-5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same job on one rank, undisturbed."""
    done = run(tmp_path_factory.mktemp("scaled") / "reference", JOB, ["whole"], nproc=1)
    assert done.stop.code == 0, done.log
    return done


def read(done: Run) -> dict[int, list[int]]:
    """The samples of every step, from the last attempt at it that all ranks committed."""
    last = {e["step"]: max(f["generation"] for f in done.of("read") if f["step"] == e["step"])
            for e in done.of("read")}  # fmt: skip
    found: dict[int, list[int]] = {step: [] for step in last}
    for e in done.of("read"):
        if e["generation"] == last[e["step"]]:
            found[e["step"]] += chain(*e["batches"])
    return found


def deviation(done: Run, reference: Run) -> float:
    """The largest difference of a parameter, of the largest parameter."""
    truth: tuple[float, ...]
    mine: tuple[float, ...]
    (truth,) = {tuple(e["values"]) for e in reference.of("parameters")}
    (mine,) = {tuple(e["values"]) for e in done.of("parameters")}
    return max(abs(a - b) for a, b in zip(mine, truth, strict=True)) / max(map(abs, truth))


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_four_three_four(whole: Run, tmp_path: Path, kind: str) -> None:
    faults = [fault(Kind.KILL, Point.BACKWARD, 1, 5)]
    done = run(tmp_path / "run", JOB, [kind], nproc=4, faults=faults)
    assert done.stop.code == 0, f"{done.stop}\n{done.log}"
    sizes = [len(e["members"]) for e in done.of("decision") if "members" in e]
    assert 3 in sizes
    assert sizes[-1] == 4

    truth, mine = read(whole), read(done)
    assert sorted(mine) == list(range(1, STEPS + 1))
    # A rank of a model in shards that has no samples left plays its first one again.
    twice = 4 if kind == "sharded" else 0
    for step, samples in mine.items():
        assert len(truth[step]) == SLOTS * SLOT_SIZE
        assert not Counter(truth[step]) - Counter(samples)
        assert (Counter(samples) - Counter(truth[step])).total() <= twice
    assert deviation(done, whole) < BOUND
