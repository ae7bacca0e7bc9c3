"""The CUDA lane. Its decisions and its life are tested with gloo standing in for NCCL; what
needs a device is marked so."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="arg-type,attr-defined,call-arg"

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ftkit.collectives.nccl import NcclLane, Way, build_nccl, way
from ftkit.core.errors import GenerationAborted, UsageError
from ftkit.core.ids import Generation

from .crew import Crew
from .scratch import scratch_path
from .worlds import in_one_process, world


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
        self.let_go = threading.Event()

    def build(self, store, rank, size, timeout):
        self.built.append((rank, size))
        made = dist.ProcessGroup(store, rank, size)
        backend = dist.ProcessGroupGloo(store, rank, size, timeout)
        made._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        made._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        made._set_group_name("stand-in")
        return _Abortable(made, self)


class _Abortable:
    def __init__(self, made, fake):
        self._made, self._fake = made, fake

    def __getattr__(self, name):
        return getattr(self._made, name)

    def abort(self):
        assert self._fake.let_go.wait(10)  # NCCL's may block as long as it likes
        self._fake.aborted.set()


def test_each_generation_has_a_communicator_of_its_own():
    groups = in_one_process(3)
    fakes = [GlooInPlaceOfNccl() for _ in groups]
    lanes = [
        NcclLane(group, group.channel, timedelta(seconds=10), fake.build)
        for group, fake in zip(groups, fakes, strict=True)
    ]

    def total(rank):
        tensor = torch.full((5,), 2.0**rank)
        lanes[rank].call("allreduce", [tensor], dist.AllreduceOptions()).wait()
        return tensor[0].item()

    def edit(generation, ranks):
        addresses = {r: groups[r].address for r in ranks}
        return lambda rank: groups[rank].edit(world(generation, addresses), timeout_s=10)

    with ThreadPoolExecutor(3) as threads:

        def everyone(do, ranks=(0, 1, 2)):
            return list(threads.map(do, ranks))

        assert everyone(total) == [7.0] * 3
        assert everyone(total) == [7.0] * 3
        assert [len(fake.built) for fake in fakes] == [1] * 3, "one a generation"
        everyone(edit(2, (0, 1, 2)))
        assert everyone(total) == [7.0] * 3
        assert [len(fake.built) for fake in fakes] == [1] * 3, "the same members: it is kept"
        groups[0].abort(Generation(2), "drill")
        with pytest.raises(GenerationAborted):
            groups[1].barrier().wait(10)  # the news is through, though the aborts still block
        assert not any(fake.aborted.is_set() for fake in fakes)
        for fake in fakes:
            fake.let_go.set()
        assert all(fake.aborted.wait(10) for fake in fakes), "a fault aborts it, at each member"
        everyone(edit(3, (0, 1)), (0, 1))
        assert everyone(total, (0, 1)) == [3.0] * 2
        assert [fake.built[1:] for fake in fakes] == [[(0, 2)], [(1, 2)], []], "built anew"
    for lane in lanes:
        lane.close()
    for group in groups:
        group.close()


def test_a_communicator_whose_generation_ends_while_it_is_built_is_aborted_and_not_used():
    (group,) = in_one_process(1)
    fake = GlooInPlaceOfNccl()
    fake.let_go.set()

    def build(store, rank, size, timeout):
        group.abort(Generation(1), "drill")
        group._engine.barrier()  # the news is through
        return fake.build(store, rank, size, timeout)

    lane = NcclLane(group, group.channel, timedelta(seconds=10), build)
    with pytest.raises(GenerationAborted, match="generation 1 ended"):
        lane.call("allreduce", [torch.ones(1)], dist.AllreduceOptions())
    assert fake.aborted.wait(10)
    group.edit(world(2, {0: group.address}), timeout_s=10)
    lane._build = fake.build
    lane.call("allreduce", [torch.ones(1)], dist.AllreduceOptions()).wait()
    lane.close()
    group.close()


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
