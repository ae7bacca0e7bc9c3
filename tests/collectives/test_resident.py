"""Resident memory: what a process of the same host sees of it, and when it is gone."""

# mypy: allow-untyped-calls

import gc
import os

import numpy as np
import pytest
import torch

from ftkit.collectives.resident import Mappings, Place, Pool, allocate, find, resident


def place_of(address, nbytes) -> Place:
    place = find(address, nbytes)
    assert place is not None
    return place


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_a_mapping_shows_what_the_owner_writes():
    data = allocate(10_000)
    place = place_of(data.ctypes.data + 5000, 100)
    view = Mappings(os.getpid()).view(place, 100)
    data[5000:5100] = np.arange(100)
    assert view is not None
    assert view.ctypes.data != data.ctypes.data + 5000
    assert (view == np.arange(100)).all()


def test_private_memory_and_what_reaches_past_the_end_has_no_place():
    data = allocate(4096)
    assert find(data.ctypes.data, 4096) is not None
    assert find(data.ctypes.data + 1, 4096) is None
    assert find(data.ctypes.data - 1, 1) is None
    assert find(np.zeros(8).ctypes.data, 8) is None


def test_memory_ends_with_the_last_view_and_peers_then_read_zeros():
    before = open_descriptors()
    tensor = resident(1000, dtype=torch.int64)
    address = tensor.data_ptr()
    tensor.fill_(7)
    part = tensor[10:20]
    view = Mappings(os.getpid()).view(place_of(address, 8000), 8000)
    del tensor
    gc.collect()
    assert view is not None
    assert find(address, 8000) is not None
    assert view.view(np.int64).tolist() == [7] * 1000
    del part
    gc.collect()
    assert find(address, 8000) is None
    assert not view.any()
    assert open_descriptors() == before


def test_a_forked_child_that_drops_its_tensors_does_not_empty_its_parents(monkeypatch):
    tensor = resident(100)
    tensor.fill_(7)
    parents = Mappings(os.getpid()).view(place_of(tensor.data_ptr(), 400), 400)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    del tensor
    gc.collect()
    assert parents is not None
    assert parents.view(np.float32).tolist() == [7.0] * 100


def test_a_descriptor_that_is_something_else_by_now_is_not_mapped(tmp_path):
    data = allocate(4096)
    place = place_of(data.ctypes.data, 4096)
    mappings = Mappings(os.getpid())
    assert mappings.view(place._replace(serial=place.serial + 1), 16) is None
    assert mappings.view(place._replace(offset=4090), 16) is None
    with (tmp_path / "plain").open("w+b") as file:
        file.write(bytes(4096))
        file.flush()
        plain = Place(file.fileno(), os.fstat(file.fileno()).st_ino, 0)
        # It could be cut short, and reading it would then kill us.
        assert mappings.view(plain, 16) is None
    assert Mappings(2**22 + 1).view(place, 16) is None


def test_a_pool_cuts_aligned_buffers_from_few_slabs():
    before = open_descriptors()
    pool = Pool(1 << 20)
    buffers = [pool.take(nbytes) for nbytes in (1, 100, 4096, 1 << 19, 1 << 19, 3 << 20)]
    assert open_descriptors() - before == 3
    assert all(b.ctypes.data % 64 == 0 and not b.any() for b in buffers)
    for number, buffer in enumerate(buffers):
        buffer[:] = number
    assert all((b == number).all() for number, b in enumerate(buffers))


@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_a_resident_tensor_is_a_tensor(shape):
    tensor = resident(*shape, dtype=torch.bfloat16)
    assert tensor.shape == shape
    assert tensor.dtype is torch.bfloat16
    assert not tensor.any()
