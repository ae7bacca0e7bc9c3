"""What is made of a node's checks, beside its history and its peers."""

import pytest

from ftkit.core.errors import ProtocolError
from ftkit.detection.node_health import (
    Check,
    Health,
    NodeResult,
    against_history,
    against_peers,
    complaints,
)


def result(node: str = "a", **checks: Check) -> NodeResult:
    return NodeResult(node=node, at=1.0, checks=tuple(checks.values()))


def rate(value: float, *, unit: str = "GB/s", name: str = "memory") -> Check:
    return Check(name=name, health=Health.OK, value=value, unit=unit)


def product(digest: str) -> Check:
    return Check(name="gemm", health=Health.OK, digest=digest)


def health(found: NodeResult) -> list[Health]:
    return [c.health for c in found.checks]


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(10.0, "ok"), (20.0, "ok"), (9.51, "ok"), (9.4, "warning"), (5.1, "warning"), (4.9, "failed")],
)
def test_a_rate_is_compared_with_the_nodes_own_median(value: float, wanted: str) -> None:
    before = [result(x=rate(v)) for v in (1.0, 10.0, 9.0, 10.0, 11.0, 10.0)]
    before += [result("b", x=rate(99.0))] * 9
    found = against_history(result(x=rate(value)), before)
    assert health(found) == [Health(wanted)]
    assert bool(complaints([found], least=Health.WARNING)) == (wanted != "ok")


def test_seconds_are_better_the_fewer_and_bare_numbers_are_not_compared() -> None:
    before = [result(x=rate(2.0, unit="s"), y=rate(8.0, unit="", name="cpu"))]
    now = result(x=rate(2.2, unit="s"), y=rate(1.0, unit="", name="cpu"))
    assert health(against_history(now, before)) == [Health.WARNING, Health.OK]
    assert health(against_history(result(x=rate(1.0, unit="s")), before)) == [Health.OK]
    assert health(against_history(result(x=rate(4.1, unit="s")), before)) == [Health.FAILED]


def test_a_first_result_is_what_it_is() -> None:
    now = result(x=rate(1.0), y=product("1"))
    assert against_history(now, []) == now


def test_what_computes_something_else_than_it_did_has_failed() -> None:
    found = against_history(result(x=product("2")), [result(x=product("1"))])
    assert health(found) == [Health.FAILED]
    assert "something else than it did" in complaints([found])[0]


def test_peers_vote_on_what_is_right() -> None:
    results = [result(n, x=product("2" if n == "c" else "1")) for n in "abcd"]
    assert [r.node for r in against_peers(results) if r.failed] == ["c"]
    tied = [result("a", x=product("1")), result("b", x=product("2"))]
    assert [r.node for r in against_peers(tied) if r.failed] == ["a", "b"]
    assert "nobody can tell" in complaints(against_peers(tied))[0]
    alike = [result(n, x=product("1")) for n in "ab"]
    assert against_peers(alike) == alike


def test_results_cross_a_file() -> None:
    one = result(x=rate(3.0), y=Check(name="gpu", health=Health.ABSENT))
    assert NodeResult.from_json(one.to_json()) == one
    for wrong in (
        3,
        {},
        {"node": "a", "at": 1, "checks": [{"name": "x"}]},
        {"node": "a", "at": "x", "checks": []},
    ):
        with pytest.raises(ProtocolError):
            NodeResult.from_json(wrong)
