"""Which drill a seed makes, and who strikes outside the ranks."""

from pathlib import Path
from typing import Any

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import KILL_COORDINATOR
from ftkit.core.trace import read_run
from ftkit.launch.drill_command import DEMO_STEPS_MIN, demo, run_drills
from ftkit.launch.drill_plan import choose
from ftkit.launch.drills import CoordinatorKiller


class Struck:
    """An engine that only counts."""

    def __init__(self) -> None:
        self.kills = 0

    def kill_coordinator(self) -> None:
        self.kills += 1


def test_the_coordinator_is_killed_once_and_no_event_is_read_twice(tmp_path: Path) -> None:
    drill = choose(KILL_COORDINATOR, None, seed=1, nproc=3, steps=15)
    assert drill.step == 3
    events = tmp_path / "events" / "seat-0.jsonl"
    events.parent.mkdir()
    line = '{"mono": 1.0, "kind": "commit", "step": %d}\n'
    engine: Any = Struck()
    killer = CoordinatorKiller(drill.step, tmp_path)
    killer.poll(engine)
    events.write_text(line % 2)
    killer.poll(engine)
    # Whoever read the first line again would find another one there.
    events.write_text(line % 9)
    killer.poll(engine)
    assert engine.kills == 0
    events.write_text(line % 9 + line % 4)
    killer.poll(engine)
    killer.poll(engine)
    assert engine.kills == 1
    assert [e["step"] for e in read_run(tmp_path) if e["kind"] == "drill"] == [3]


def test_a_copy_is_cut_over_no_more_ranks_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--sharded 9"):
        run_drills(
            "kill", at=None, seed=1, count=1, run_dir=tmp_path, as_json=True, nproc=4, sharded=9
        )


GIVEN: dict[str, Any] = {
    "nproc": 3,
    "nodes": 1,
    "engine": "embedded",
    "max_stall_s": 30.0,
    "script": None,
    "data": None,
}


def test_the_demo_is_as_long_as_it_was_asked_to_be() -> None:
    job, drill = demo(seed=0, steps=DEMO_STEPS_MIN, **GIVEN)
    assert job.command[4:6] == ("--steps", str(DEMO_STEPS_MIN))
    assert drill.step <= DEMO_STEPS_MIN / 5
    with pytest.raises(UsageError, match=f"needs --steps {DEMO_STEPS_MIN} or more, got 30"):
        demo(seed=0, steps=30, **GIVEN)


def test_the_demos_seed_decides_the_job_and_who_is_lost_where() -> None:
    made = [demo(seed=seed, steps=240, **GIVEN) for seed in range(20)]
    assert [job.command[-2:] for job, _ in made] == [("--seed", str(n)) for n in range(20)]
    assert {drill.seat for _, drill in made} == {0, 1, 2}
    assert len({drill.step for _, drill in made}) > 10
    assert demo(seed=7, steps=240, **GIVEN) == made[7]


def test_a_script_of_the_users_has_its_own_length_and_seed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.touch()
    job, _ = demo(seed=3, steps=30, **GIVEN | {"script": str(script)})
    assert job.command[-1] == str(script)
