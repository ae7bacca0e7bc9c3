"""Cases of several groups at once: overlapping, made twice, used from threads, given up."""

# mypy: allow-untyped-calls
# mypy: disable-error-code="arg-type,union-attr"

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from .case import Case, Side


def cases(size: int) -> Iterator[Case]:
    runs: list[Callable[[Side], Any]] = [
        overlapping,
        the_same_ranks_twice,
        from_several_threads,
        made_by_its_members_alone,
        given_up_and_made_again,
        subgroups_by_enumeration,
        of_one,
        split,
        not_a_member,
    ]
    for run in runs:
        yield Case(f"groups: {run.__name__.replace('_', ' ')}", run)


def new(side, ranks, **more):
    return dist.new_group(ranks, backend=side.name, **more)


def total(group, value, n=3):
    tensor = torch.full((n,), float(value))
    dist.all_reduce(tensor, group=group)
    return tensor


def pairs(side):
    return [(a, b) for a in range(side.size) for b in range(a + 1, side.size)]


def overlapping(side: Side):
    groups = {pair: new(side, list(pair)) for pair in pairs(side)}
    outs = []
    for _ in range(3):
        for pair, group in groups.items():
            if side.rank in pair:
                outs.append(total(group, side.rank + 1))
                box = [side.rank]
                dist.broadcast_object_list(box, group=group, group_src=1)
                outs.append(box)
        outs.append(total(side.group, side.rank))
    return outs


def the_same_ranks_twice(side: Side):
    """Two groups of all ranks; their operations are issued in another order on each rank."""
    one, two = new(side, None), new(side, None)
    tensors = [torch.full((1000 + i,), float(side.rank + i)) for i in range(8)]
    order = [(tensors[i], one if i % 2 else two) for i in range(8)]
    if side.rank % 2:
        order = order[1::2] + order[::2]
    for work in [dist.all_reduce(t, group=g, async_op=True) for t, g in order]:
        work.wait()
    return tensors


def from_several_threads(side: Side):
    groups = [new(side, None) for _ in range(3)]
    outs: list[list[torch.Tensor]] = [[] for _ in groups]
    errors = []

    def use(number):
        try:
            for turn in range(8):
                n = 1 + 9_000 * ((turn + number) % 3)
                outs[number].append(total(groups[number], side.rank + turn * number, n))
                whole = torch.zeros(side.size * n)
                dist.all_gather_single(whole, torch.full((n,), 1.0), group=groups[number])
                outs[number].append(whole)
        except Exception as error:  # noqa: BLE001 - shown by the case
            errors.append(error)

    threads = [threading.Thread(target=use, args=(i,)) for i in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return outs


def made_by_its_members_alone(side: Side):
    if side.rank > 1:
        return None
    group = new(side, [0, 1], use_local_synchronization=True)
    return total(group, side.rank + 1)


def given_up_and_made_again(side: Side):
    outs = []
    for turn in range(3):
        group = new(side, [0, 1])
        if side.rank < 2:
            outs.append(total(group, side.rank + turn))
            dist.destroy_process_group(group)
    return outs


def subgroups_by_enumeration(side: Side):
    mine, groups = dist.new_subgroups_by_enumeration(
        [[0, 1], list(range(2, side.size))] if side.size > 2 else [[0], [1]], backend=side.name
    )
    return total(mine, side.rank), len(groups), dist.get_process_group_ranks(mine)


def of_one(side: Side):
    groups = [new(side, [r]) for r in range(side.size)]
    mine = groups[side.rank]
    out = torch.zeros(2)
    dist.reduce_scatter_single(out, torch.ones(2), group=mine)
    got: list[Any] = [None]
    dist.all_gather_object(got, "me", group=mine)
    swapped = torch.zeros(2)
    dist.all_to_all_single(swapped, torch.ones(2), group=mine)
    dist.barrier(mine)
    return total(mine, 5), out, got, swapped


def split(side: Side):
    """torch splits groups of an accelerator alone."""
    dist.split_group(side.group, [[0, 1]])


def not_a_member(side: Side):
    group = new(side, [0])
    return dist.get_rank(group), dist.get_world_size(group)
