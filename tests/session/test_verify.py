"""session.verify(): bits that flipped between two steps are named, and repaired where asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ftkit.core.errors import UsageError
from tests.drills.jobs import Run, run
from tests.session.alone import alone, net

SCRIPT = Path(__file__).parent / "verifying.py"


def test_it_belongs_between_two_steps_and_after_protect() -> None:
    from tests.session.alone import SLOTS, Points, learn

    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with alone() as session:
        with pytest.raises(UsageError, match="before verify"):
            session.verify()
        session.protect(model=model, optimizer=optimizer)
        for step in session.steps(Points(), slots=SLOTS, slot_size=2, until=2):
            with step:
                learn(model, step)
                with pytest.raises(UsageError, match="between two steps"):
                    session.verify()
                optimizer.step()
            found = session.verify(repair=True)
            assert found.equal
            assert found.step == step.index
            assert not found.repaired


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    done = run(tmp_path_factory.mktemp("verify") / "run", SCRIPT, ["calm"], nproc=1)
    assert done.stop.code == 0, done.log
    return done


def seen(done: Run) -> list[Any]:
    told = {e["seen"] for e in done.of("final")}
    assert len(told) == 1, "all ranks are told the same"
    found: list[Any] = json.loads(told.pop())
    return found


@pytest.mark.multiproc
def test_a_flipped_bit_is_named_by_rank_and_tensor_and_repaired(calm: Run, tmp_path: Path) -> None:
    done = run(tmp_path / "run", SCRIPT, ["flips"], nproc=3)
    assert done.stop.code == 0, done.log
    moment, weight = "optimizer.0/state/model/0.weight/exp_avg", "model/0.weight"
    first, second = seen(done)
    assert first == {
        "step": 4,
        "damaged": [[1, 1, weight], [1, 1, moment]],
        "undecided": [],
        "repaired": True,
        "refusal": "",
    }, "these two and nothing else"
    assert seen(calm) == []
    assert {(e["damaged"], e["tensor"]) for e in done.of("diverged")} == {(1, moment), (1, weight)}
    # Three that all differ: nobody can say who is right, and nothing is touched.
    assert (second["undecided"], second["damaged"], second["repaired"]) == ([weight], [], False)
    assert second["refusal"] == (
        "refused: no majority for model/0.weight: "
        "ranks [0] and ranks [1] and ranks [2] differ, with 1 votes each"
    )
    assert done.params == calm.params, "as if it had not happened"


@pytest.mark.multiproc
def test_a_rank_whose_repair_is_cut_short_leaves_and_comes_back_whole(
    calm: Run, tmp_path: Path
) -> None:
    done = run(tmp_path / "run", SCRIPT, ["cut"], nproc=3)
    assert done.stop.code == 0, done.log
    assert "was cut short" in done.log
    assert {e["seat"] for e in done.of("exit") if e["code"] != 0} == {1, 2}
    assert done.params == calm.params
