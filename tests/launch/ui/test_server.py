"""The server: what it gives to whom, and what it refuses in words."""

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ftkit.launch.ui.server import UiServer, is_loopback


@contextmanager
def serving(token: str = "") -> Iterator[tuple[str, int]]:
    def answer(seen: int) -> dict[str, object]:
        if seen == 13:
            raise OSError("the disk is away")
        return {"seen": seen}

    with UiServer(answer, "127.0.0.1", 0, token=token) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield "127.0.0.1", server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def get(address: tuple[str, int], path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection(*address, timeout=10)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()
    finally:
        connection.close()


def test_the_page_and_all_it_is_made_of_come_from_here() -> None:
    with serving() as address:
        status, headers, page = get(address, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "://" not in page
        for path in ("/style.css", "/ui.js"):
            assert path[1:] in page
            status, headers, text = get(address, path)
            assert status == 200
            assert "://" not in text
        assert get(address, "/view?seen=5")[2] == json.dumps({"seen": 5})


@pytest.mark.parametrize(
    ("path", "headers", "status", "words"),
    [
        ("/etc/passwd", {}, 404, "there are /, /view"),
        ("/../server.py", {}, 404, "there are /, /view"),
        ("/view?seen=x", {}, 400, "seen must be a number"),
        ("/view?seen=-1", {}, 400, "seen must be a number"),
        ("/view?seen=13", {}, 500, "the run cannot be read: the disk is away"),
        ("/", {"Host": "evil.example"}, 403, "localhost or 127.0.0.1"),
        ("/view", {"Host": "evil.example:80"}, 403, "localhost or 127.0.0.1"),
        ("/view", {"Host": "127.0.0.1.evil.example"}, 403, "localhost or 127.0.0.1"),
        ("/view", {"Host": "[::"}, 400, "no address"),
    ],
)
def test_what_is_refused(path: str, headers: dict[str, str], status: int, words: str) -> None:
    with serving() as address:
        found, _, text = get(address, path, **headers)
    assert found == status
    assert words in text


@pytest.mark.parametrize("host", ["localhost:8610", "127.0.0.1", "[::1]:99"])
def test_this_machine_is_known_by_its_names(host: str) -> None:
    with serving() as address:
        assert get(address, "/view", Host=host)[0] == 200


@pytest.mark.parametrize(
    ("told", "status"), [("", 401), ("Bearer wrong", 401), ("Bearer é", 401), ("Bearer tok", 200)]
)
def test_a_view_takes_the_token_where_there_is_one(told: str, status: int) -> None:
    with serving("tok") as address:
        assert get(address, "/", Host="node7.example")[0] == 200
        assert get(address, "/view", Host="node7.example", Authorization=told)[0] == status


def test_without_a_token_nobody_else_is_listened_to() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.7", "node7", "")))
    with pytest.raises(ValueError, match="takes a token"):
        UiServer(lambda _: {}, "0.0.0.0", 0)
