"""A page in Chromium, as Qt carries it in a wheel: what it says, what breaks, and a picture of it.

    python browser.py ADDRESS WAIT_FOR [PICTURE.png [WIDTH HEIGHT]]

An own process, since Qt wants the main thread. It waits for text, at most 30 s, and prints JSON:
`text` and `html` of the page, `console` with what its scripts complained of. HEIGHT 0: the page's.
"""

import json
import os
import sys
import time
from typing import Any

LIMIT_S = 30.0


def look(address: str, wait_for: str, picture: str, width: int, height: int) -> dict[str, Any]:
    """Show the page until it says `wait_for`; take its picture, if a path is given."""
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu --disable-dev-shm-usage"
    from PySide6.QtCore import QUrl
    from PySide6.QtWebEngineCore import QWebEnginePage
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    console: list[str] = []

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(
            self, level: Any, message: str, line: int, source: str
        ) -> None:
            console.append(f"{message} ({source}:{line})")

    application = QApplication([])

    def ask(script: str) -> Any:
        answers: list[Any] = []
        page.runJavaScript(script, answers.append)
        until = time.monotonic() + LIMIT_S
        while not answers and time.monotonic() < until:
            application.processEvents()
            time.sleep(0.01)
        return answers[0] if answers else None

    view = QWebEngineView()
    page = Page(view)
    view.setPage(page)
    view.resize(width, height or 900)
    view.show()
    view.load(QUrl(address))
    text, until = "", time.monotonic() + LIMIT_S
    while wait_for not in text and time.monotonic() < until:
        text = ask("document.body ? document.body.innerText : ''") or ""
    if picture:
        if not height:
            view.resize(width, int(ask("document.documentElement.scrollHeight")))
        pause = time.monotonic() + 1.0  # until it is painted
        while time.monotonic() < pause:
            application.processEvents()
            time.sleep(0.01)
        view.grab().save(picture)
    found = {
        "text": text,
        "html": ask("document.documentElement.outerHTML") or "",
        "console": console,
    }
    page.deleteLater()  # before its profile, or Qt complains
    application.processEvents()
    return found


if __name__ == "__main__":
    address, wait_for, picture, width, height = (
        *sys.argv[1:],
        *["", "1280", "0"][len(sys.argv) - 3 :],
    )
    print(json.dumps(look(address, wait_for, picture, int(width), int(height))))
    sys.stdout.flush()
    os._exit(0)  # Qt's own end may take long, and has nothing to say
