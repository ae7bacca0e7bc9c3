"""Every block of Python in the pages does what the page says, in processes of its own."""

import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.collectives.crew import Crew
from tests.docs.blocks import PAGES, scripts
from tests.docs.settings import SETTINGS, SMALLER, Place

#: Its page is run by tests/checkpoint/ecosystem/test_docs.py, Python and shell together.
ELSEWHERE = {"ecosystem"}

SCRIPTS = {page.stem: scripts(page) for page in PAGES if page.stem not in ELSEWHERE}


def execute(rank: int, size: int, talk: Any, page: str, index: int, folder: str, port: int) -> str:
    """(in a process of its own) Execute script `index` of `page`, in its setting."""
    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    text = SCRIPTS[page][index]
    for shown, smaller in SMALLER.items():
        text = text.replace(shown, smaller)
    setting, _ = SETTINGS[page][index]
    running = setting(Place(rank, size, talk, Path(folder)))
    names = next(running)
    exec(compile(text, f"{page}.md", "exec"), names)  # noqa: S102
    assert next(running, None) is None  # what it looks at afterwards
    return "executed"


def every() -> list[Any]:
    return [
        pytest.param(page, index, size, id=f"{page}-{index}")
        for page, settings in SETTINGS.items()
        for index, (_, size) in enumerate(settings)
    ]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def test_every_script_has_a_setting() -> None:
    shown = {page: len(found) for page, found in SCRIPTS.items() if found}
    assert shown == {page: len(settings) for page, settings in SETTINGS.items()}


def test_whatever_is_made_smaller_is_on_a_page() -> None:
    everything = "".join(text for found in SCRIPTS.values() for text in found)
    assert [shown for shown in SMALLER if shown not in everything] == []


@pytest.mark.multiproc
@pytest.mark.parametrize(("page", "index", "size"), every())
def test_it_runs(page: str, index: int, size: int, tmp_path: Path) -> None:
    if page == "frameworks" and not find_spec("ray"):
        pytest.skip("ray.train is not installed: ftkit[raytrain]")
    with Crew(execute, size, page, index, str(tmp_path), free_port()) as crew:
        assert crew.results() == ["executed"] * size
