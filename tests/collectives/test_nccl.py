"""The CUDA lane. Its decisions and its life are tested with gloo standing in for NCCL; what
needs a device is marked so."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="arg-type,attr-defined,call-arg"

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ftkit.collectives.nccl import NcclLane, Way, build_nccl, way
from ftkit.core.errors import UsageError
from ftkit.core.ids import Generation

from .crew import Crew
from .scratch import scratch_path
from .worlds import join, world


@pytest.mark.parametrize(
    ("old", "new", "aborted", "can_shrink", "expected"),
    [
        ((), (1, 2), False, True, Way.BUILD),
        ((1, 2), (1, 2), False, False, Way.KEEP),
        ((1, 2), (1, 2), True, True, Way.BUILD),
        ((1, 2, 3), (1, 3), False, True, Way.SHRINK),
        ((1, 2, 3), (1, 3), False, False, Way.BUILD),
        ((1, 2, 3), (1, 3), True, True, Way.BUILD),
        ((1, 2, 3), (3, 1), False, True, Way.BUILD),
        ((1, 2), (1, 2, 3), False, True, Way.BUILD),
        ((1, 2, 3), (1, 4), False, True, Way.BUILD),
    ],
)
def test_the_way_to_the_next_communicator(old, new, aborted, can_shrink, expected):
    assert way(old, new, aborted=aborted, can_shrink=can_shrink) is expected


@pytest.mark.skipif(dist.is_nccl_available(), reason="this torch has NCCL")
def test_without_nccl_the_error_says_so():
    with pytest.raises(UsageError, match="NCCL"):
        build_nccl(dist.HashStore(), 0, 1, timedelta(seconds=1))


class GlooInPlaceOfNccl:
    """A fake: counts what is built, and aborts by a flag, where gloo cannot abort at all."""

    def __init__(self) -> None:
        self.built: list[tuple[int, int]] = []
        self.aborted = threading.Event()

    def build(self, store, rank, size, timeout):
        self.built.append((rank, size))
        made = dist.ProcessGroup(store, rank, size)
        backend = dist.ProcessGroupGloo(store, rank, size, timeout)
        made._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        made._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        made._set_group_name("stand-in")
        return _Abortable(made, self.aborted)


class _Abortable:
    def __init__(self, made, aborted):
        self._made, self._aborted = made, aborted

    def __getattr__(self, name):
        return getattr(self._made, name)

    def abort(self):
        time.sleep(0.2)  # the communication thread must not wait for this
        self._aborted.set()


def lane_through_generations(rank, size, talk):
    group, _, addresses = join(rank, talk, "auto")
    fake = GlooInPlaceOfNccl()
    lane = NcclLane(group, group.channel, timedelta(seconds=10), fake.build)

    def total():
        tensor = torch.full((5,), 2.0**rank)
        lane.call("allreduce", [tensor], dist.AllreduceOptions()).wait()
        return tensor[0].item()

    sums = [total(), total()]
    assert len(fake.built) == 1, "one communicator a generation"
    group.edit(world(2, addresses), timeout_s=10)
    sums.append(total())
    assert len(fake.built) == 1, "the same members without a fault: it is kept"
    talk.everyone("before the fault")
    if rank == 0:
        group.abort(Generation(2), "drill")
    assert fake.aborted.wait(10), "a fault aborts it"
    if rank == 2:
        group.close()
        talk.everyone("left")
        return sums, fake.built
    talk.everyone("left")
    del addresses[2]
    group.edit(world(3, addresses), timeout_s=10)
    sums.append(total())
    assert fake.built[1:] == [(rank, 2)], "after a fault it is built anew, of who is left"
    group.barrier().wait(10)
    lane.close()
    group.close()
    return sums, fake.built


@pytest.mark.multiproc
def test_each_generation_has_a_communicator_of_its_own():
    with Crew(lane_through_generations, 3) as crew:
        results = crew.results()
    assert [sums for sums, _ in results] == [[7.0] * 3 + [3.0]] * 2 + [[7.0] * 3]


def on_a_device(rank, size, talk, path):
    from ftkit.collectives.backend import register

    register()
    torch.cuda.set_device(rank)
    dist.init_process_group("ftkit", store=dist.FileStore(path, size), rank=rank, world_size=size)
    tensor = torch.full((1000,), float(rank + 1), device="cuda")
    dist.all_reduce(tensor)
    assert tensor.eq(sum(range(1, size + 1))).all()
    whole = torch.empty(2 * size, device="cuda")
    dist.all_gather_single(whole, torch.full((2,), float(rank), device="cuda"))
    assert whole.tolist() == [float(r) for r in range(size) for _ in range(2)]
    part = torch.empty(2, device="cuda")
    dist.reduce_scatter_single(part, torch.ones(2 * size, device="cuda"))
    assert part.eq(size).all()
    on_cpu = torch.ones(3)
    dist.all_reduce(on_cpu)
    assert on_cpu.eq(size).all(), "CPU tensors go over the same group's links"
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Linear(4, 4).cuda(), device_ids=[rank]
    )
    model(torch.ones(2, 4, device="cuda")).sum().backward()
    torch.cuda.synchronize()
    dist.destroy_process_group()
    return "fine"


@pytest.mark.gpu
@pytest.mark.multiproc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_tensors_go_over_nccl():
    size = torch.cuda.device_count()
    with Crew(on_a_device, size, scratch_path()) as crew:
        assert crew.results() == ["fine"] * size
