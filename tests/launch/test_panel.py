"""Each detector of the panel is told what it hears of, and of nothing it knows is it kept in the dark."""

import inspect
from types import CodeType
from typing import get_args

import pytest

from ftkit.detection.observations import Observation
from ftkit.launch.config import JobConfig
from ftkit.launch.judge import Judge

KINDS = {kind.__name__: kind for kind in get_args(Observation)}


def told_apart(detector: object) -> set[type]:
    """The kinds of observations that its `ingest`, or that of a part of it, names."""
    names = set[str]()
    for part in (detector, *vars(detector).values()):
        ingest = getattr(part, "ingest", None)
        code = getattr(inspect.unwrap(ingest), "__code__", None) if ingest else None
        if isinstance(code, CodeType):
            names |= set(code.co_names)
    return {KINDS[name] for name in names & KINDS.keys()}


PANEL = Judge(JobConfig(job="j", command=("x",)))._panel._members


@pytest.mark.parametrize("detector", PANEL, ids=lambda d: type(d).__name__)
def test_a_detector_hears_of_all_that_it_takes_in(detector) -> None:
    assert told_apart(detector) == detector.HEARS
