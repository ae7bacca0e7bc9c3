"""A process of its own for every session: here one process has one after another."""

from collections.abc import Iterator

import pytest

from ftkit.session import start


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`ftkit.init()` makes a session of one, which is closed afterwards."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    if start._session is not None:
        start._session.close()
        start._session = None
