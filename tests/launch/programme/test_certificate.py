"""The certificate claims what was seen, and no more."""

import json

import pytest

from ftkit.core.samples import wilson
from ftkit.launch.programme.certificate import certify
from ftkit.launch.programme.certificate_view import html, text
from ftkit.launch.programme.record import Survival
from tests.launch.programme.jobs import drill

DAY = 86400.0
AT = 1_790_000_000.0
HISTORY = [
    *(drill(AT + n * DAY, next_step_s=0.1 * (n + 1), lost_s=1.0) for n in range(20)),
    drill(AT, "stop", outcome=Survival.FAILED, reason="the job ended: <oops>", lost_s=None,
          next_step_s=9.0, node="gamma"),
    drill(AT + DAY, "stop", outcome=Survival.UNKNOWN, reason="it was ended by hand", lost_s=None),
    drill(AT + 2 * DAY, "stop", world=4, versions={"ftkit": "2"}, job="k"),
    drill(AT, outcome=Survival.SKIPPED, reason="12 steps were committed"),
    drill(AT + 9, outcome=Survival.SKIPPED, reason="3 steps were committed"),
]  # fmt: skip


def test_a_line_counts_by_fault() -> None:
    kill, stop = certify(HISTORY).faults
    assert (kill.fault, kill.struck, kill.survived, kill.failed, kill.unknown) == (
        "kill",
        20,
        20,
        0,
        0,
    )
    assert kill.interval == wilson(20, 20)
    assert kill.next_step_s is not None
    assert (kill.next_step_s.p50, kill.next_step_s.p95) == pytest.approx((1.0, 1.9))
    assert (kill.first, kill.last, kill.jobs) == (AT, AT + 19 * DAY, 1)
    assert (stop.struck, stop.survived, stop.failed, stop.unknown) == (3, 1, 1, 1)
    # What is not known counts as not survived, and only survivors have times.
    assert stop.interval == wilson(1, 3)
    assert stop.next_step_s is not None
    assert (stop.next_step_s.count, stop.next_step_s.most) == (1, 0.4)
    assert [(s.world, dict(s.versions)["ftkit"], s.drills) for s in stop.settings] == [
        (3, "1", 2),
        (4, "2", 1),
    ]
    assert [why for _, why in stop.failures] == [
        "failed: the job ended: <oops>",
        "unknown: it was ended by hand",
    ]


def test_intervals_without_a_drill_stand_apart() -> None:
    done = certify(HISTORY)
    assert (done.skipped, done.skips) == (2, (("# steps were committed", 2),))
    assert done.nodes == ("beta", "gamma")


def test_a_drill_in_two_histories_counts_once() -> None:
    assert certify(HISTORY + HISTORY) == certify(HISTORY)


def test_the_text_shows_it_all() -> None:
    shown = text(certify(HISTORY))
    for words in (
        "83.9 to 100.0 %",
        "2026-09-21",
        "not survived: stop, 2026-09-21 14:13:20 UTC: failed: the job ended: <oops>",
        "1 drill of a job of 4 ranks on 3 nodes (embedded; ftkit 2)",
        "2 intervals without a drill: 2 times # steps were committed",
        "* of fewer than 20 drills: the slowest.",
    ):
        assert words in shown
    (row,) = [line for line in shown.splitlines() if line.startswith("kill  ")]
    assert "1.90 s " in row


def test_the_page_shows_it_all_and_quotes_nobody_s_tags() -> None:
    page = html(certify(HISTORY))
    assert "&lt;oops&gt;" in page
    assert "<oops>" not in page
    assert "83.9 to 100.0 %" in page
    assert "<script" not in page
    assert "http" not in page


def test_of_nothing_nothing_is_claimed() -> None:
    for told in (text(certify([])), html(certify([]))):
        assert "nothing is known" in told
        assert "%" not in told.split("</style>")[-1]
    only_skipped = text(certify(HISTORY[-2:]))
    assert "nothing is known" in only_skipped
    assert "2 intervals" in only_skipped


def test_as_json() -> None:
    told = json.loads(json.dumps(certify(HISTORY).to_json()))
    assert told["drills"][0]["next_step_s"]["p95"] == pytest.approx(1.9)
    assert told["drills"][1]["settings"][1]["versions"] == {"ftkit": "2"}
    assert told["skipped"] == 2
