"""The page in a real browser, where this machine has one."""

import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from ftkit.launch.ui.live_page import LivePage
from ftkit.launch.ui.server import UiServer
from tests.launch.histories import disturbed

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.skipif(not BROWSER, reason="no Chromium on PATH"),
]


def test_the_script_fills_the_page_and_breaks_no_rule_of_its_own(tmp_path: Path) -> None:
    events = tmp_path / "run" / "events"
    events.mkdir(parents=True)
    (events / "all.jsonl").write_text("".join(json.dumps(e) + "\n" for e in disturbed()))
    page = LivePage(tmp_path / "run")
    # Through the token, as it is what the script has to pass on.
    with UiServer(page.answer, "127.0.0.1", 0, token="tok") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/?token=tok"
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            flags += [f"--user-data-dir={tmp_path}/profile", "--enable-logging=stderr"]
            flags += ["--no-first-run", "--disable-background-networking", "--disable-extensions"]
            shown = subprocess.run(
                [BROWSER, *flags, "--virtual-time-budget=3000", "--dump-dom", url],
                capture_output=True,
                text=True,
                timeout=100,
                check=True,
            )
        finally:
            server.shutdown()
            thread.join()
    assert "rank 1 back at step 5" in shown.stdout
    assert shown.stdout.count("<svg") >= 2
    assert ">over<" in shown.stdout
    assert "CONSOLE" not in shown.stderr, shown.stderr
