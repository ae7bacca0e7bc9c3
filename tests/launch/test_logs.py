"""What ftkit's own processes say."""

import logging
from collections.abc import Iterator

import pytest

from ftkit.launch.logs import log_to_stderr


@pytest.fixture
def ours() -> Iterator[logging.Logger]:
    logger = logging.getLogger("ftkit")
    before = logger.level
    yield logger.getChild("launch.test")
    logger.setLevel(before)


@pytest.mark.parametrize(("quiet", "said"), [(False, ["odd", "broken"]), (True, ["broken"])])
def test_quiet_is_for_warnings_and_never_for_errors(
    quiet: bool, said: list[str], ours: logging.Logger, caplog: pytest.LogCaptureFixture
) -> None:
    log_to_stderr(quiet=quiet)
    ours.info("fine")
    ours.warning("odd")
    ours.error("broken")
    assert caplog.messages == said
