"""Metrics: the text that is scraped, where it is served, and the dashboard that shows it."""

import json
import math
import re
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from ftkit.core.errors import UsageError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.detection.signals import NodeSeen, StepSeen, to_json
from ftkit.launch.config import JobConfig
from ftkit.launch.metrics import CATALOGUE, Metrics, MetricsServer

DOCS = Path(__file__).parents[2] / "docs"

#: A line of the format: a name, labels, a number.
LINE = re.compile(r'([a-z_]+)\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\} (\S+)')


def read(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Every sample, read as strictly as a scraper does."""
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        match = LINE.fullmatch(line)
        assert match, line
        labels = dict(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2]))
        found.setdefault(match[1], []).append((labels, float(match[3])))
    return found


def filled() -> Metrics:
    metrics = Metrics("job-1", NodeId(2))
    facts = {"rss_bytes": 7, "cpu_ticks": 250, "ticks_per_s": 100}
    metrics.take_rows([{"seat": 3, "row": {"step": 9, "generation": 2}, "facts": facts}])
    step = StepSeen(
        member=MemberId(3),
        seat=Seat(3),
        generation=Generation(2),
        step=Step(9),
        at=1.0,
        seconds={"forward": 0.25, "data": 0.5},
        waited_s=0.125,
        loss=math.nan,
        grad_norm=math.inf,
    )
    metrics.take_steps([to_json(step), to_json(step)])
    seen = NodeSeen(
        node=NodeId(2),
        at=1.0,
        available_bytes=10,
        pressure={"io": 0.5},
        disks={"/x": [4, 5]},
    )
    metrics.take_node(seen, {"/x": "checkpoint"})
    metrics.take_tiers({"copies": [{"step": 7}, {"step": 8}], "persister": {"written": 11}})
    metrics.add("ftkit_rank_starts_total", rank=3)
    metrics.add("ftkit_rank_exits_total", rank=3)
    metrics.set("ftkit_agent_coordinator_connected", True)
    return metrics


def test_what_an_agent_knows_is_told_in_base_units() -> None:
    found = read(filled().render())
    assert found.keys() == CATALOGUE.keys(), "the catalogue has what there is, and no more"
    (labels, cpu_s), *_ = found["ftkit_rank_cpu_seconds_total"]
    assert (labels, cpu_s) == ({"job": "job-1", "node": "2", "rank": "3"}, 2.5)
    assert found["ftkit_rank_steps_total"][0][1] == 2
    assert found["ftkit_rank_waiting_seconds_total"][0][1] == 0.25
    phases = {labels["phase"]: s for labels, s in found["ftkit_rank_phase_seconds_total"]}
    assert phases == {"forward": 0.5, "data": 1.0}
    assert math.isnan(found["ftkit_rank_loss_value"][0][1])
    assert found["ftkit_rank_gradient_norm"][0][1] == math.inf
    assert found["ftkit_snapshot_step"][0][1] == 8
    assert found["ftkit_node_disk_next_bytes"][0][0]["disk"] == "checkpoint"


def test_names_follow_the_conventions() -> None:
    for name, (kind, text) in CATALOGUE.items():
        assert re.fullmatch(r"ftkit_[a-z_]+", name)
        assert (kind == "counter") == name.endswith("_total"), name
        assert text.endswith(".")


def test_labels_are_escaped() -> None:
    metrics = Metrics('a"b\\c\nd', NodeId(0))
    ((labels, _),) = read(metrics.render())["ftkit_info"]
    assert labels["job"] == 'a\\"b\\\\c\\nd'


def test_they_are_served_and_nothing_else_is() -> None:
    metrics = filled()
    server = MetricsServer(metrics, "127.0.0.1", 0)
    try:
        root = "http://{}:{}".format(*server.address)
        with urllib.request.urlopen(f"{root}/metrics", timeout=5) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert answer.read().decode() == metrics.render()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{root}/", timeout=5)
        assert refused.value.code == 404
        refused.value.close()
        with pytest.raises(OSError, match="in use"):
            MetricsServer(metrics, *server.address)
    finally:
        server.close()


def test_a_port_that_is_none_is_refused() -> None:
    for port in (-1, 65536):
        with pytest.raises(UsageError, match="--metrics-port"):
            JobConfig(job="j", command=("x",), metrics_port=port)


def test_the_dashboard_is_whole_and_shows_only_what_there_is() -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    panels = board["panels"]
    assert len({p["id"] for p in panels}) == len(panels)
    places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
    assert len(places) == len(panels), "no panel lies over another"
    expressions = [t["expr"] for p in panels for t in p["targets"]]
    expressions += [v["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    named = {name for e in expressions for name in re.findall(r"ftkit_[a-z_]+", e)}
    assert named == CATALOGUE.keys(), "and leaves out nothing"
    for expression in expressions:
        rising = re.findall(r"(rate|increase)\((ftkit_[a-z_]+)", expression)
        assert all(name.endswith("_total") for _, name in rising)


def test_the_page_lists_every_metric() -> None:
    page = (DOCS / "metrics.md").read_text()
    assert set(re.findall(r"^\| `(ftkit_[a-z_]+)`", page, re.MULTILINE)) == CATALOGUE.keys()
