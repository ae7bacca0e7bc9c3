"""A job's description, the times that follow from one number, and the engine that is chosen."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftkit.core.errors import ProtocolError, UsageError
from ftkit.launch.config import JobConfig, Times, default_engine, new_job_id, new_secret


@given(st.floats(min_value=1.0, max_value=1e6), st.integers(1, 10_000))
def test_the_chain_of_times_is_in_order(max_stall_s: float, nodes: int) -> None:
    try:
        times = Times.derive(max_stall_s, nodes)
    except UsageError:
        assert nodes > 400
        return
    assert 0 < times.heartbeat_s <= times.tick_s <= times.report_s <= times.halt_s <= times.stall_s
    # A node is lost, and others are asked about it, only after more than one report is missing.
    assert 3 * times.report_s <= times.node_s
    assert times.stall_s == max_stall_s


def test_more_nodes_than_the_coordinator_can_hear_in_time_are_refused_with_what_would_do() -> None:
    with pytest.raises(UsageError, match=r"too short for 5000 nodes: .* 8.0 s, so give 12 or more"):
        Times.derive(10.0, 5000)
    assert Times.derive(12.0, 5000).report_s == 8.0
    assert Times.derive(30.0, 10_000).report_s == 16.0


@pytest.mark.parametrize("bad", [0.1, 0.0, -1.0, math.nan, math.inf])
def test_a_stall_no_machine_can_keep_is_refused_with_its_number(bad: float) -> None:
    with pytest.raises(UsageError, match=f"--max-stall: max_stall_s is {bad}, must be at least 1"):
        Times.derive(bad)


def test_a_job_comes_back_from_json_as_it_was() -> None:
    config = JobConfig(
        job="abc", command=("python", "a b.py"), nodes=3, nproc=2, env={"A": "1"}, cwd="/here"
    )
    assert JobConfig.from_json(config.to_json()) == config
    assert config.seats == 6


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"job": "a"}', '{"job": "a", "command": ["x"], "colour": 1}', "null"]
)
def test_anything_else_is_no_job(text: str) -> None:
    with pytest.raises(ProtocolError, match="not a job's configuration"):
        JobConfig.from_json(text)


def test_a_job_of_nobody_or_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="count from 1, got 1 and 0"):
        JobConfig(job="a", command=("x",), nproc=0)
    with pytest.raises(UsageError, match="--spare-nodes is -1"):
        JobConfig(job="j", command=("x",), spare_nodes=-1)
    with pytest.raises(UsageError, match="no command"):
        JobConfig(job="a", command=())


def test_names_and_secrets_do_not_repeat() -> None:
    assert len({new_job_id() for _ in range(100)}) == 100
    assert len(bytes.fromhex(new_secret())) == 32
    assert new_secret() != new_secret()


@pytest.mark.parametrize(
    ("environ", "engine"),
    [
        ({}, "embedded"),
        ({"RAY_ADDRESS": ""}, "embedded"),
        ({"RAY_ADDRESS": "local"}, "embedded"),
        ({"RAY_ADDRESS": "http://127.0.0.1:8265"}, "embedded"),
        ({"RAY_ADDRESS": "ray://10.0.0.1:10001"}, "embedded"),
        ({"RAY_ADDRESS": "auto"}, "ray"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "ray"),
        ({"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {}})}, "ray"),
    ],
)
def test_ray_is_used_where_there_is_a_cluster_to_join(environ: dict[str, str], engine: str) -> None:
    assert default_engine(environ) == engine


def test_parity_over_too_few_nodes_is_refused_with_advice() -> None:
    with pytest.raises(
        UsageError, match=r"parity 3\+1 needs 4 nodes and there are 3: ask for 2\+1"
    ):
        JobConfig(job="a", command=("x",), nodes=3, parity="3+1")
    with pytest.raises(UsageError, match="--parity is k"):
        JobConfig(job="a", command=("x",), nodes=3, parity="two")
    assert JobConfig(job="a", command=("x",), nodes=3, parity="2+1").code == (2, 1)
    assert JobConfig(job="a", command=("x",), parity="").code is None
    assert JobConfig(job="a", command=("x",), parity="4+0").code is None


def test_checkpoints_need_an_interval_that_is_one_and_a_place() -> None:
    with pytest.raises(UsageError, match="--checkpoint-every is -1"):
        JobConfig(job="a", command=("x",), checkpoint_dir="/d", checkpoint_every=-1)
    with pytest.raises(UsageError, match="needs a --checkpoint-dir"):
        JobConfig(job="a", command=("x",), checkpoint_every=5)
    with pytest.raises(UsageError, match="--fresh goes with --checkpoint-dir"):
        JobConfig(job="a", command=("x",), checkpoint_fresh=True)
    config = JobConfig(job="a", command=("x",), checkpoint_dir="/d", checkpoint_ignore=("ab",))
    assert JobConfig.from_json(config.to_json()) == config
