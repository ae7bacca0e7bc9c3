"""DCP between real ranks over our store: sharded and replicated state, other worlds, damage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.local_store import LocalStore
from tests.checkpoint.persist.stories import flip

pytestmark = pytest.mark.multiproc

ROOT = Path(__file__).resolve().parents[3]

RANK = """
import json, os, sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from ftkit.checkpoint import FtkitStorageReader, FtkitStorageWriter

root, doing, rank, world = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[5], world), rank=rank,
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

answer = {}
try:
    if doing == "save":
        for seed in (1, 2):
            dcp.save(state(seed), storage_writer=FtkitStorageWriter(root, step=seed))
        answer = whole(state(2))
    elif doing == "async":
        future = dcp.async_save(state(3), storage_writer=FtkitStorageWriter(root, step=3))
        future.result()
        answer = whole(state(3))
    elif doing == "refused":
        bad = state(1) | ({"mine": object()} if rank == 1 else {})
        dcp.save(bad, storage_writer=FtkitStorageWriter(root, step=9))
    else:
        found = state(5)
        reader = FtkitStorageReader(root, fallback=doing == "fallback")
        dcp.load(found, storage_reader=reader)
        answer = whole(found) | {"from": reader.step}
except CheckpointException as error:
    answer = {"failed": sorted(error.failures), "what": [
        [type(f[0]).__name__, str(f[0])] for f in error.failures.values()]}
print(json.dumps(answer), flush=True)
dist.destroy_process_group()
"""


def ranks(root: Path, doing: str, world: int) -> list[dict]:
    """What each rank of a world answers."""
    store = root.with_name(f"{root.name}-{doing}-{world}")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, root, doing, str(rank), str(world), store],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=100) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, ended, strict=True):
        assert process.returncode == 0, err
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_two_ranks_save_and_worlds_of_two_and_one_load(tmp_path):
    root = tmp_path / "root"
    saved = ranks(root, "save", 2)[0]
    found = open_checkpoint(LocalStore(root), verify=True)
    assert found.step == 2
    # Replicated tensors once, sharded ones by each owner, and no box for an empty shard.
    held = {n: sorted(r.offsets for r in rows) for n, rows in found.chunks.items()}
    assert held["model/rows"] == [(0, 0), (4, 0)]
    assert held["model/columns"] == [(0, 0), (0, 3)]
    assert held["model/one"] == [(0, 0)]
    assert held["model/same"] == [(0,)]
    for world in (2, 1):
        for answer in ranks(root, "load", world):
            assert answer == saved | {"from": 2}

    # A chunk that only rank 1 needs: both ranks raise, or both go back.
    broken = next(r.file for r in found.chunks["model/rows"] if r.offsets == (4, 0))
    file = root / "step-2" / broken
    file.write_bytes(flip(file.read_bytes(), 9))
    for answer in ranks(root, "load", 2):
        assert answer["failed"] == [1]
        ((kind, message),) = answer["what"]
        assert kind == "IntegrityError"
        assert str(file) in message
    torch.manual_seed(1)
    rows = torch.randn(7, 3).tolist()
    for answer in ranks(root, "fallback", 2):
        assert (answer["from"], answer["step"]) == (1, 1)
        assert answer["rows"] == rows


def test_two_ranks_save_asynchronously(tmp_path):
    root = tmp_path / "root"
    saved = ranks(root, "async", 2)[0]
    assert open_checkpoint(LocalStore(root), verify=True).step == 3
    assert saved["step"] == 3


def test_one_rank_that_cannot_store_its_state_stops_the_save_on_all(tmp_path):
    root = tmp_path / "root"
    for answer in ranks(root, "refused", 2):
        assert answer["failed"] == [1]
        assert answer["what"][0][0] == "UsageError"
        assert "mine is a object" in answer["what"][0][1]
    assert not (root / "step-9" / "commit.json").exists()
    assert not (root / "lease.json").exists()
