"""An unchanged script under `ftkit run`: the rank that hangs or calls something else is named."""

import json
from pathlib import Path

import pytest

from ftkit.core.verdict import Fault
from ftkit.launch.engine import Engine
from tests.drills.jobs import HERE, run

pytestmark = pytest.mark.multiproc


@pytest.mark.parametrize(("how", "fault"), [("hang", Fault.HANG_BLOCKED), ("skip", Fault.DESYNC)])
def test_the_one_at_fault_is_named_with_its_stack(how: str, fault: Fault, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def end_when_kept(engine: Engine) -> None:
        if list(folder.glob("incidents/1/node-0.json")):
            engine.interrupt()

    done = run(folder, HERE / "plain.py", [how, "1"], nproc=3, on_poll=end_when_kept)
    said = [*done.of("suspicion"), *done.of("verdict")]
    assert {(e["fault"], e["seat"]) for e in said if e["seat"] == 1} == {(fault, 1)}
    assert {e["seat"] for e in said} == {1}
    assert done.of("suspicion" if how == "hang" else "verdict"), "long before anybody has to go"
    node = json.loads((folder / "incidents/1/node-0.json").read_text())
    assert "plain.py" in node["stacks"]["1"]["text"]
    assert {r["op"] for r in node["collectives"]["0"]} >= {"all_reduce sum float32"}
