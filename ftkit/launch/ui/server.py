"""UiServer: the page and its data over HTTP, to this machine or to whoever has the token.

    GET /                      the page
    GET /style.css, /ui.js     what it is made of; nothing of a run is in them
    GET /view?seen=REVISION    the run as JSON; needs the token, where there is one

A page is shown numbers and no secrets, yet it is nobody else's business: without a token only this
machine is listened to, and a request must be addressed to it by name, so that no other site's
script can reach it through a name of its own (DNS rebinding).
"""

import hmac
import ipaddress
import json
import logging
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ftkit.launch.html_page import STYLE

logger = logging.getLogger(__name__)

#: Of a request that is not sent to its end, so long.
_TIMEOUT_S = 10
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class UiServer(ThreadingHTTPServer):
    """Serves one run. `serve_forever` blocks; `server_close` ends it."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(
        self,
        answer: Callable[[int], dict[str, object]],
        host: str,
        port: int,
        *,
        token: str = "",
    ) -> None:
        """Begin to listen. OSError when the address cannot be had; port 0 takes any.

        Args:
          answer: revision that was seen -> the view as JSON; called in several threads.
          host: where to listen.
          port: the same.
          token: must be told by whoever asks for the view. Without one, `host` must be loopback.
        """
        if not (token or is_loopback(host)):
            raise ValueError(f"listening at {host} takes a token")
        self.answer, self.token = answer, token
        static = files("ftkit.launch.ui") / "static"
        self.pages = {
            "/": ("text/html", (static / "index.html").read_bytes()),
            "/ui.js": ("text/javascript", (static / "ui.js").read_bytes()),
            "/style.css": ("text/css", STYLE.encode() + (static / "ui.css").read_bytes()),
        }
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that closes its tab in the middle of an answer is no error."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            logger.error("a request of %s failed: %r", client_address, error)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: UiServer
    server_version, sys_version = "ftkit", ""
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_S

    def do_GET(self) -> None:
        try:
            url, meant_for_us = urlsplit(self.path), self._meant_for_us()
        except ValueError as error:
            self._say(HTTPStatus.BAD_REQUEST, f"no address: {error}")
            return
        if not meant_for_us:
            self._say(HTTPStatus.FORBIDDEN, "ask for this page at localhost or 127.0.0.1")
        elif url.path in self.server.pages:
            self._send(HTTPStatus.OK, *self.server.pages[url.path])
        elif url.path != "/view":
            self._say(HTTPStatus.NOT_FOUND, "there are /, /view, /style.css and /ui.js here")
        elif not self._may_look():
            self._say(
                HTTPStatus.UNAUTHORIZED,
                "the token is missing or wrong: open the address that ftkit ui printed",
            )
        else:
            self._view(parse_qs(url.query).get("seen", ["0"])[0])

    def _view(self, seen: str) -> None:
        if not (seen.isascii() and seen.isdigit() and len(seen) < 20):
            self._say(HTTPStatus.BAD_REQUEST, f"seen must be a number of a revision, not {seen!r}")
            return
        try:
            view = self.server.answer(int(seen))
        except OSError as error:
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, f"the run cannot be read: {error}")
            return
        self._send(HTTPStatus.OK, "application/json", json.dumps(view).encode())

    def _meant_for_us(self) -> bool:
        if self.server.token:
            return True  # who has it knows where it came from
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        return name is not None and is_loopback(name)

    def _may_look(self) -> bool:
        told = self.headers.get("Authorization", "").encode()
        wanted = f"Bearer {self.server.token}".encode()
        return not self.server.token or hmac.compare_digest(told, wanted)

    def _say(self, status: HTTPStatus, words: str) -> None:
        self._send(status, "text/plain", (words + "\n").encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        logger.debug(format, *args)
