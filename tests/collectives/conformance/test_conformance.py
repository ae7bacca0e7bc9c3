"""Every collective on ftkit and on gloo, side by side in the same processes: the same results,
the same errors at the same place, for every dtype, reduction, shape and layout."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="index,comparison-overlap,arg-type,union-attr,attr-defined"

from datetime import timedelta

import pytest
import torch

from tests.collectives.crew import Crew
from tests.collectives.scratch import scratch_path

from . import (
    built_on,
    case,
    groups,
    known,
    meshes,
    moving,
    point_to_point,
    reducing,
    refused,
    training,
)

pytestmark = pytest.mark.multiproc

SUITES = {
    "reducing": reducing,
    "moving": moving,
    "point_to_point": point_to_point,
    "built_on": built_on,
    "refused": refused,
    "groups": groups,
    "training": training,
    "meshes": meshes,
}
CALLS = ["reducing", "moving", "point_to_point", "built_on", "refused", "groups"]
#: What to run with how many ranks, over which transport, and how many cases it has at least:
#: fewer would mean that a suite lost some without anybody's notice.
RUNS = [
    (2, "tcp", [*CALLS, "training"], 1300),
    (3, "auto", CALLS, 1300),
    (4, "auto", ["meshes"], 11),
]


def side_by_side(rank, size, talk, path, transport, suites):
    import torch.distributed as dist

    from ftkit.collectives.backend import register
    from ftkit.collectives.config import CollectivesConfig, Transport

    register()
    dist.init_process_group(
        "ftkit",
        store=dist.FileStore(path, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
        pg_options=CollectivesConfig(transport=Transport(transport)),
    )
    gloo = case.Side("gloo", dist.new_group(backend="gloo", timeout=timedelta(seconds=20)))
    ours = case.Side("ftkit", dist.new_group(backend="ftkit"))
    count = 0
    found: list[case.Difference] = []
    for name in suites:
        more, differences = case.differences(SUITES[name].cases(size), gloo, ours)
        count, found = count + more, found + differences
    dist.destroy_process_group()
    return count, found


@pytest.mark.parametrize(("size", "transport", "suites", "cases_min"), RUNS)
def test_ftkit_does_what_gloo_does(size, transport, suites, cases_min):
    with Crew(side_by_side, size, scratch_path(), transport, suites) as crew:
        results = crew.results()
    everywhere = []
    for count, found in results:
        assert count >= cases_min
        assert not (new := known.unexplained(found)), "\n".join(map(str, new[:20]))
        everywhere += found
    assert not known.unused(everywhere, size)


def test_a_difference_is_seen():
    """The comparison itself: it must tell apart what differs, or the suite proves nothing."""
    same = case.Case("same", lambda side: torch.ones(3))
    for other in [
        lambda side: torch.ones(4),
        lambda side: torch.ones(3).double(),
        lambda side: torch.tensor([1.0, 1.0, 1.0000001]),
        lambda side: [torch.ones(3), torch.ones(3)],
        lambda side: 1 / 0,
    ]:
        assert differs(same, case.Case("other", other))
    assert not differs(same, case.Case("other", lambda side: torch.ones(1, 3)[0]))
    minus = case.Case("minus", lambda side: -torch.zeros(1))
    assert differs(minus, case.Case("plus", lambda side: torch.zeros(1))), "-0.0 is not 0.0"


class _Alone:
    place, translated = "call", False


def differs(a, b):
    return case.compare(a, case.outcome(a, _Alone()), case.outcome(b, _Alone()))
