"""A rank that forks: its children neither hold its place nor harm it."""

# mypy: allow-untyped-calls

import os
import signal
import time

import pytest
import torch

from ftkit.core.errors import GenerationAborted

from .crew import Crew
from .worlds import in_one_process, join


def in_the_child(groups):
    for group in groups:
        group.close()
        with pytest.raises(GenerationAborted, match="forked"):
            group.barrier().wait(5)
        with pytest.raises(GenerationAborted, match="forked"):
            group.channel.issue_p2p("send", 0, 0, lambda op: None, nbytes=0).wait(5)


@pytest.mark.multiproc
def test_a_child_that_closes_the_group_leaves_its_parent_alone():
    groups = in_one_process(2)
    child = os.fork()
    if not child:
        code = 1
        try:
            in_the_child(groups)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    data = [torch.ones(300_000) for _ in groups]
    for handle in [g.all_reduce(t) for g, t in zip(groups, data, strict=True)]:
        handle.wait(10)
    assert data[0].eq(2).all()
    # A thread whose wake-up call is never taken back would turn without a pause.
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.15
    for group in groups:
        group.close()


def a_loader_and_its_rank(rank, size, talk):
    group, faults, _ = join(rank, talk, "auto")
    child = 0
    if rank == 1:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
    talk.say(child)
    handle = group.all_reduce(torch.ones(1000))
    if rank == 1:
        handle.wait(20)
        time.sleep(60)
    handle.wait(20)
    generation, lost, _, when = faults.wait(10)
    group.close()
    return generation, lost, when


@pytest.mark.multiproc
def test_a_rank_that_dies_is_missed_at_once_though_its_children_live():
    with Crew(a_loader_and_its_rank, 2) as crew:
        crew.swap()
        _, child = crew.hear(0), crew.hear(1)
        try:
            time.sleep(0.2)
            killed = time.monotonic()
            crew.kill(1)
            generation, lost, when = crew.results([0])[0]
        finally:
            os.kill(child, signal.SIGKILL)
    assert (generation, lost) == (1, {1})
    assert when - killed < 2, "not only when the child has ended"
