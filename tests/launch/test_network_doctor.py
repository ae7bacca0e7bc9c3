"""`ftkit doctor network`: the matrix, the pairs that cannot meet, the ring."""

import json
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not listed

from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.group import Group
from ftkit.core.errors import UsageError, WireError
from ftkit.launch import network_doctor
from ftkit.launch.cli import main
from ftkit.launch.network_doctor import Diagnosis, _diagnose, compare_clocks, examine, speed


def test_rows_become_a_matrix_and_a_ring_around_what_cannot_be_reached():
    rows = [
        {
            "host": "a",
            "sent": {"1": 0.0, "2": 1e9, "3": 1e9},
            "read": {"1": 0.0},
            "clock": [0.0, 0.001],
        },
        {"host": "b", "sent": {"0": 0.0, "2": 1e9, "3": 5e8}, "read": {}, "clock": [0.0, 0.001]},
        {"host": "c", "sent": {"0": 1e9, "1": 1e9, "3": 1e9}, "read": {}, "clock": [0.0, 0.001]},
        {
            "host": "d",
            "sent": {"0": 1e9, "1": 1e9, "2": None},
            "read": {"2": 7e9},
            "clock": [0.0, 0.001],
        },
    ]
    found = _diagnose(rows)
    assert found.unreachable == [(0, 1)]
    assert found.rates[2, 3] == 1e9  # what was sent counts, where both are known
    assert not found.by_memory
    ring = set(zip(found.ring.order, (*found.ring.order[1:], found.ring.order[0]), strict=True))
    assert not {(0, 1), (1, 0), (1, 3)} & ring
    told = found.to_json()
    assert json.loads(json.dumps(told))["unreachable"] == [[0, 1]]
    assert told["slowest"] == 1e9


def test_a_clock_that_is_off_is_said_beyond_what_the_exchange_may_be_wrong_by():
    rows: list[dict[str, Any]] = [
        {"host": h, "sent": {}, "read": {}, "clock": clock}
        for h, clock in (("a", [0.0, 0.0]), ("b", [0.2, 0.01]), ("c", [-0.2, 0.19]), ("d", [-9, 1]))
    ]
    found = _diagnose(rows)
    assert found.skewed == [(1, 0.2), (3, -9.0)]
    told: Any = found.to_json()["clocks"]
    assert told[1] == {"offset_s": 0.2, "error_s": 0.01}


def test_clocks_are_compared_with_node_0s():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    found, stores = {}, []

    def node(rank, ahead):
        store = TCPStore("127.0.0.1", port, 3, is_master=rank == 0)
        stores.append(store)  # node 0's has to stay until all have read
        found[rank] = compare_clocks(store, rank, 3, wall=lambda: time.time() + ahead)

    threads = [threading.Thread(target=node, args=(r, a)) for r, a in enumerate((1.0, 1.0, 4.5))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found[0] == (0.0, 0.0)
    assert abs(found[1][0]) <= found[1][1] + 1e-3
    assert abs(found[2][0] - 3.5) <= found[2][1] + 1e-3


def test_memory_is_where_nothing_was_sent():
    rows = [
        {"host": "a", "sent": {"1": None}, "read": {"1": 3e9}, "clock": [0.0, 0.001]},
        {"host": "a", "sent": {"0": None}, "read": {"0": 4e9}, "clock": [0.0, 0.001]},
    ]
    found = _diagnose(rows)
    assert found.by_memory == {(0, 1), (1, 0)}
    assert found.rates[1, 0] == 3e9
    assert found.unreachable == []


@pytest.mark.parametrize(
    ("rate", "text"), [(float("nan"), "?"), (0.0, "none"), (2.5e6, "2.5 MB/s"), (3e9, "3.00 GB/s")]
)
def test_rates_for_people(rate, text):
    assert speed(rate) == text


def test_what_cannot_work_is_refused():
    config = CollectivesConfig()
    with pytest.raises(UsageError, match="--master"):
        examine(nodes=2, nproc=1, node_rank=0, master="", host="", config=config)
    with pytest.raises(UsageError, match="two ends"):
        examine(nodes=1, nproc=1, node_rank=0, master="", host="", config=config)
    with pytest.raises(UsageError, match="--node-rank counts the 2 nodes from 0"):
        examine(nodes=2, nproc=1, node_rank=2, master="a:1", host="", config=config)
    with pytest.raises(UsageError, match=r"--master no\.such\.host\.invalid cannot be reached"):
        examine(
            nodes=2, nproc=1, node_rank=1, master="no.such.host.invalid:1", host="", config=config
        )
    with pytest.raises(UsageError, match=r"--host 192\.0\.2\.1 is no address of this machine"):
        examine(nodes=1, nproc=2, node_rank=0, master="", host="192.0.2.1", config=config)
    with pytest.raises(UsageError, match="give --nodes, too"):
        examine(nodes=1, nproc=2, node_rank=0, master="a:1", host="", config=config)
    result = CliRunner().invoke(main, ["doctor", "network", "--connections", "0"])
    assert result.exit_code == 64


@pytest.mark.multiproc
def test_two_processes_of_this_machine():
    result = subprocess.run(
        [sys.executable, "-m", "ftkit.launch.cli", "doctor", "network", "--nproc", "2",
         "--seconds", "0.05", "--transport", "tcp", "--connections", "2", "--json"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    rates = np.array(told["rates"], dtype=float)
    assert (rates[~np.eye(2, dtype=bool)] > 1e6).all()
    assert sorted(told["ring"]) == [0, 1]
    assert told["unreachable"] == []


@pytest.mark.multiproc
def test_a_pair_that_cannot_connect_is_named_and_the_others_are_measured(monkeypatch):
    monkeypatch.setattr(network_doctor, "REACH_S", 0.5)
    dial = Group._dial

    def cut(group, member, deadline):
        if {group.member, member.member} == {0, 2}:
            raise WireError("no route to host")
        dial(group, member, deadline)

    monkeypatch.setattr(Group, "_dial", cut)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found: dict[int, Diagnosis | None] = {}

    def part(rank):
        found[rank] = examine(
            nodes=3, nproc=1, node_rank=rank, master=f"127.0.0.1:{port}",
            host=f"127.0.0.{rank + 1}", config=CollectivesConfig(transport=Transport.TCP, probe_s=0.05),
        )  # fmt: skip

    threads = [threading.Thread(target=part, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[1] is found[2] is None
    result = found[0]
    assert result is not None
    assert result.unreachable == [(0, 2)]
    assert result.rates[0, 1] > 1e6
    assert result.hosts == ("127.0.0.1", "127.0.0.2", "127.0.0.3")
