"""A member dies in the middle of a collective, by SIGKILL: raised, run again, or left out."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="arg-type,union-attr,attr-defined"

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ftkit.collectives.config import CollectivesConfig, OnLoss
from ftkit.core.errors import GenerationAborted, UsageError

from .crew import Crew
from .scratch import scratch_path

pytestmark = pytest.mark.multiproc

N = 3_000_000


def begin(rank, size, path, on_loss, transport="auto"):
    from ftkit.collectives.backend import register
    from ftkit.collectives.config import Transport

    register()
    dist.init_process_group(
        "ftkit",
        store=dist.FileStore(path, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=20),
        pg_options=CollectivesConfig(on_loss=on_loss, transport=Transport(transport)),
    )


def reduce_until_someone_dies(rank, size, talk, path, on_loss, transport):
    """Each rank brings 2**rank, so that a sum says whose terms are in it."""
    begin(rank, size, path, on_loss, transport)
    sums: list[float] = []
    while not sums or sums[-1] == sums[0] or len(sums) < 3:
        if len(sums) == 2:
            talk.say("ready")
        tensors = [torch.full((N,), float(2**rank)), torch.full((5,), float(2**rank))]
        works = [dist.all_reduce(t, async_op=True) for t in tensors]
        for work in works:
            work.wait()
        assert tensors[0].min() == tensors[0].max(), "one operation, one set of ranks"
        assert tensors[1].min() == tensors[1].max()
        sums += [tensors[0][0].item(), tensors[1][0].item()]
    after = torch.full((7,), float(2**rank))
    dist.all_reduce(after)
    box = [rank, "from member 2"] if dist.get_rank() == 1 else [None, None]
    dist.broadcast_object_list(box, src=1)
    dist.barrier()
    size_after = dist.get_world_size()
    dist.destroy_process_group()
    return sums, after[0].item(), box, size_after


@pytest.mark.parametrize(
    ("on_loss", "transport", "in_the_middle", "factor"),
    [(OnLoss.RETRY, "auto", 1, 1), (OnLoss.LEAVE_OUT, "tcp", 4 / 3, 1)],
)
def test_the_survivors_run_it_again_without_the_dead(on_loss, transport, in_the_middle, factor):
    with Crew(
        reduce_until_someone_dies, 4, scratch_path(), on_loss, transport, timeout_s=30
    ) as crew:
        for rank in range(4):
            assert crew.hear(rank) == "ready"
        threading.Event().wait(0.3)  # let them be somewhere in the middle of a reduction
        crew.kill(1)
        results = crew.results([0, 2, 3])
    everybodys, survivors = 15.0, 13.0
    for sums, after, box, size_after in results:
        assert sums == results[0][0], "all survivors saw the same results"
        scaled = pytest.approx(survivors * in_the_middle)
        assert all(s in (everybodys, survivors) or s == scaled for s in sums)
        assert sums[0] == everybodys
        assert any(s == scaled for s in sums)
        assert after == survivors * factor
        assert box == [2, "from member 2"], "ranks are those of the smaller world"
        assert size_after == 3


def reduce_for_ever():
    while True:
        dist.all_reduce(torch.ones(N))


def raises(rank, size, talk, path):
    begin(rank, size, path, OnLoss.RAISE)
    talk.say("ready")
    with pytest.raises(GenerationAborted, match="member 1"):
        reduce_for_ever()
    with pytest.raises(UsageError, match="mends itself"):
        dist.new_group(pg_options=CollectivesConfig(on_loss=OnLoss.RETRY))
    dist.destroy_process_group()
    return "raised"


def test_by_default_a_loss_is_raised():
    with Crew(raises, 3, scratch_path()) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "ready"
        threading.Event().wait(0.1)
        crew.kill(1)
        assert crew.results([0, 2]) == ["raised"] * 2


def what_cannot_run_again(rank, size, talk, path):
    begin(rank, size, path, OnLoss.RETRY)
    pair, trio = dist.new_group([0, 2]), dist.new_group([0, 1, 2])
    strict = dist.new_group([0, 2], pg_options=CollectivesConfig(on_loss=OnLoss.RAISE))
    dist.barrier()
    talk.say("ready")
    talk.hear()
    if rank == 1:
        threading.Event().wait(60)
    outs = [torch.zeros(N) for _ in range(size)]
    works = {
        "all_gather": dist.all_gather(outs, torch.ones(N), async_op=True),
        "a lost root": dist.broadcast(torch.ones(N), 1, async_op=True),
        "a lost member": dist.all_reduce(torch.ones(N), group=trio, async_op=True),
        "a message": dist.irecv(torch.zeros(1), 1),
    }
    mended = torch.ones(N)
    work = dist.all_reduce(mended, async_op=True)
    talk.say("issued")
    errors = {}
    for name, failing in works.items():
        with pytest.raises(GenerationAborted) as error:
            failing.wait()
        errors[name] = str(error.value)
    work.wait()
    assert mended.eq(2).all(), "what was issued behind them runs"
    with pytest.raises(GenerationAborted):
        dist.all_reduce(torch.ones(1), group=trio)
    for group in (pair, strict):
        tensor = torch.ones(4)
        dist.all_reduce(tensor, group=group)
        assert tensor.eq(2).all(), "a group of survivors goes on"
    dist.barrier()
    dist.destroy_process_group()
    return errors


def test_what_has_a_place_for_the_dead_is_raised():
    with Crew(what_cannot_run_again, 3, scratch_path()) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "ready"
        for rank in range(3):
            crew.say(rank, "go")
        for rank in (0, 2):
            assert crew.hear(rank) == "issued"
        crew.kill(1)
        for errors in crew.results([0, 2]):
            assert "place for every rank" in errors["all_gather"]
            assert "root of broadcast, member 1" in errors["a lost root"]
            assert "[1]" in errors["a lost member"]


def a_minority(rank, size, talk, path):
    begin(rank, size, path, OnLoss.RETRY)
    talk.say("ready")
    with pytest.raises(GenerationAborted, match="no majority"):
        reduce_for_ever()
    with pytest.raises(GenerationAborted, match="no majority"):
        dist.barrier()
    dist.destroy_process_group()
    return "stopped"


def test_a_minority_does_not_go_on():
    with Crew(a_minority, 2, scratch_path()) as crew:
        for rank in range(2):
            assert crew.hear(rank) == "ready"
        threading.Event().wait(0.1)
        crew.kill(0)  # of two halves, the one that has the lowest member may go on
        assert crew.results([1]) == ["stopped"]


def ddp_trains_on(rank, size, talk, path):
    begin(rank, size, path, OnLoss.LEAVE_OUT)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 8)),
        bucket_cap_mb=0.05,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    talk.say("ready")
    steps_after, last = 0, 0.0
    while steps_after < 4:
        model(torch.randn(16, 64)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        # One may see the smaller world a step before the other: they count together.
        smaller = torch.tensor([int(dist.get_world_size() < size)])
        dist.all_reduce(smaller, dist.ReduceOp.MIN)
        steps_after += int(smaller)
    for parameter in model.parameters():
        last = parameter.detach().double().sum().item()
        box = torch.tensor([last, -last], dtype=torch.float64)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        assert box[0] == -box[1], "parameters are the same on all survivors"
    dist.destroy_process_group()
    return last


def test_ddp_trains_on_without_the_dead_and_nobody_sees_an_exception():
    with Crew(ddp_trains_on, 3, scratch_path()) as crew:
        for rank in range(3):
            assert crew.hear(rank) == "ready"
        threading.Event().wait(0.2)
        crew.kill(1)
        first, second = crew.results([0, 2])
        assert first == second
