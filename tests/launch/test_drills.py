"""Which drill a seed makes, and who strikes outside the ranks."""

from pathlib import Path
from typing import Any

from ftkit.core.trace import read_run
from ftkit.launch.drills import KILL_COORDINATOR, CoordinatorKiller, choose


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
    killer = CoordinatorKiller(drill, tmp_path)
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
