"""DCP between real ranks over our store: sharded and replicated state, other worlds, damage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ftkit.checkpoint import FtkitStorageReader
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.core.ids import Step

pytestmark = pytest.mark.multiproc

ROOT = Path(__file__).resolve().parents[3]

RANK = """
import json, sys
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from ftkit.checkpoint import FtkitStorageReader, FtkitStorageWriter
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.local_store import LocalStore

root, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[4], world), rank=rank,
                        world_size=world)
mesh = init_device_mesh("cpu", (world,))

def state(seed):
    torch.manual_seed(seed)
    return {
        "model": {
            "rows": distribute_tensor(torch.randn(7, 3), mesh, [Shard(0)]),
            "columns": distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)]),
            "one": distribute_tensor(torch.randn(1, 3), mesh, [Shard(0)]),
            "same": distribute_tensor(torch.randn(5), mesh, [Replicate()]),
            "plain": torch.randn(3),
        },
        "step": seed,
    }

def whole(found):
    return {k: v.full_tensor().tolist() if isinstance(v, DTensor) else v.tolist()
            for k, v in found["model"].items()} | {"step": found["step"]}

answers = {}

def stage(name, action):
    try:
        answers[name] = action()
    except CheckpointException as error:
        answers[name] = {"failed": sorted(error.failures), "what": [
            [type(f[0]).__name__, str(f[0])] for f in error.failures.values()]}

def save(step, more={}):
    dcp.save(state(step) | more, storage_writer=FtkitStorageWriter(root, step=step))
    return whole(state(step))

def load(**options):
    found, reader = state(5), FtkitStorageReader(root, **options)
    dcp.load(found, storage_reader=reader)
    return whole(found) | {"from": reader.step}

def save_async():
    future = dcp.async_save(state(3), storage_writer=FtkitStorageWriter(root, step=3))
    future.result()

def flip():
    "One bit of the chunk that only rank 1 needs."
    rows = open_checkpoint(LocalStore(root)).chunks["model/rows"]
    file = root / "step-3" / next(r.file for r in rows if r.offsets == (4, 0))
    data = bytearray(file.read_bytes())
    data[9] ^= 1
    file.write_bytes(data)
    return str(file)

stage("saved 1", lambda: save(1))
stage("saved 2", lambda: save(2))
stage("loaded", load)
stage("refused", lambda: save(9, {"mine": object()} if rank == 1 else {}))
answers["committed"] = (root / "step-9" / "commit.json").exists()
dist.barrier()
stage("async", save_async)
stage("loaded async", load)
dist.barrier()
if rank == 0:
    answers["flipped"] = flip()
dist.barrier()
stage("damaged", load)
stage("fallback", lambda: load(fallback=True))
print(json.dumps(answers), flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The root, and what each of two ranks saw: one start of processes for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, folder / "root", str(rank), "2", folder / "store"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, (_, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, err
    return folder / "root", [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_two_ranks_save_and_load_what_they_saved(told):
    root, ranks = told
    for rank in ranks:
        assert rank["loaded"] == ranks[0]["saved 2"] | {"from": 2}
    found = open_checkpoint(LocalStore(root), Step(2), verify=True)
    # Replicated tensors once, sharded ones by each owner, and no box for an empty shard.
    held = {n: sorted(r.offsets for r in rows) for n, rows in found.chunks.items()}
    assert held["model/rows"] == [(0, 0), (4, 0)]
    assert held["model/columns"] == [(0, 0), (0, 3)]
    assert held["model/one"] == [(0, 0)]
    assert held["model/same"] == [(0,)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_world_of_one_loads_what_two_ranks_saved(told):
    root, ranks = told
    saved = ranks[0]["saved 2"]
    state = {
        "model": {k: torch.zeros_like(torch.tensor(v)) for k, v in saved.items() if k != "step"}
    }
    dcp.load(state, storage_reader=FtkitStorageReader(root, step=2))
    assert {k: v.tolist() for k, v in state["model"].items()} | {"step": 2} == saved


def test_one_rank_that_cannot_store_its_state_stops_the_save_on_all(told):
    root, ranks = told
    for rank in ranks:
        assert rank["refused"]["failed"] == [1]
        ((kind, message),) = rank["refused"]["what"]
        assert kind == "UsageError"
        assert "mine is a object" in message
        assert not rank["committed"]
    assert json.loads((root / "lease.json").read_text()) == {}, "it was given up"


def test_two_ranks_save_asynchronously(told):
    _, ranks = told
    for rank in ranks:
        assert (rank["loaded async"]["from"], rank["loaded async"]["step"]) == (3, 3)


def test_damage_that_one_rank_meets_raises_on_all_or_takes_all_back(told):
    _, ranks = told
    for rank in ranks:
        assert rank["damaged"]["failed"] == [1]
        ((kind, message),) = rank["damaged"]["what"]
        assert kind == "IntegrityError"
        assert ranks[0]["flipped"] in message
        assert rank["fallback"] == ranks[0]["saved 2"] | {"from": 2}
