"""The pages in a real browser, where one is installed (dependency group `browser`)."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from ftkit.core.fault_plan import Kind, Point
from ftkit.launch.cli import main
from ftkit.launch.ui.live_page import LivePage
from ftkit.launch.ui.server import UiServer
from tests.drills.jobs import TRAINING, fault, run
from tests.launch.histories import disturbed

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.skipif(
        not find_spec("PySide6") or not find_spec("PySide6.QtWebEngineCore"),
        reason="no browser: dependency group `browser`",
    ),
]
BROWSER = Path(__file__).parent / "browser.py"


def look(address: str, wait_for: str, picture: Path | None = None) -> Mapping[str, Any]:
    """What a browser makes of a page; see browser.py."""
    more = [] if picture is None else [str(picture)]
    shown = subprocess.run(
        [sys.executable, str(BROWSER), address, wait_for, *more],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    found: Mapping[str, Any] = json.loads(shown.stdout)
    return found


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the live page of a run, with a token, which its script has to pass on."""
    page = LivePage(folder)
    with UiServer(page.answer, "127.0.0.1", 0, token="tok") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/?token=tok"
        finally:
            server.shutdown()
            thread.join()


def test_the_script_fills_the_page_and_breaks_no_rule_of_its_own(tmp_path: Path) -> None:
    events = tmp_path / "run" / "events"
    events.mkdir(parents=True)
    (events / "all.jsonl").write_text("".join(json.dumps(e) + "\n" for e in disturbed()))
    with served(tmp_path / "run") as address:
        shown = look(address, "rank 1 back at step 5")
    assert "rank 1 back at step 5" in shown["text"]
    assert "Run run over" in shown["text"]
    assert shown["html"].count("<svg") >= 2
    assert shown["console"] == []


def test_a_page_that_breaks_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>here</p><script>nowhere.to.be.found()</script>")
    shown = look(page.as_uri(), "here")
    assert "nowhere is not defined" in shown["console"][0]


def test_a_real_run_and_its_report_are_drawn(tmp_path: Path) -> None:
    killed = fault(Kind.KILL, Point.BACKWARD, 1, 20)
    done = run(tmp_path / "run", TRAINING, ["60"], nproc=3, faults=[killed])
    assert done.stop.code == 0
    with served(done.folder) as address:
        live = look(address, "rank 1 back")
    assert live["console"] == []
    assert live["html"].count('<div class="tile ') == 3
    assert "rank 1 killed by SIGKILL" in live["text"]
    assert all(word in live["text"] for word in ("Work by step", "sealed by 3 ranks"))
    out = tmp_path / "report.html"
    wrote = CliRunner().invoke(main, ["report", str(done.folder), "--out", str(out)])
    assert wrote.exit_code == 0, wrote.output
    picture = tmp_path / "report.png"
    report = look(out.as_uri(), "Goodput was", picture)
    assert report["console"] == []
    assert report["html"].count('<rect class="training"') >= 3
    assert "rank 1 killed by SIGKILL in backward of step 20" in report["text"]
    assert picture.stat().st_size > 20_000
