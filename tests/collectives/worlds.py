"""Builds groups and worlds for scenarios."""

# mypy: allow-untyped-calls

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.group import Group
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.world import Member, World

SECRET = b"a secret for tests only"


def config(transport: str = "auto", **more: Any) -> CollectivesConfig:
    return CollectivesConfig(transport=Transport(transport), **more)


class Faults(list[Any]):
    """An on_fault callback that remembers: (generation, lost, reason, monotonic time)."""

    def __call__(self, generation, lost, reason):
        self.append((generation, lost, reason, time.monotonic()))

    def wait(self, timeout_s=10.0):
        limit = time.monotonic() + timeout_s
        while not self:
            assert time.monotonic() < limit, "no fault was reported"
            time.sleep(0.002)
        return self[0]


def member(id_: int, address: tuple[str, int], seat: int | None = None) -> Member:
    return Member(
        member=MemberId(id_),
        seat=Seat(id_ if seat is None else seat),
        node=NodeId(0),
        host=address[0],
        port=address[1],
    )


def make_group(
    id_: int, transport: str = "auto", host: str = "127.0.0.1", **more: Any
) -> tuple[Group, Faults]:
    faults = Faults()
    group = Group(
        member=MemberId(id_),
        secret=SECRET,
        host=host,
        on_fault=faults,
        config=config(transport, **more),
    )
    return group, faults


def world(generation: int, addresses: dict[int, tuple[str, int]]) -> World:
    return World.of(
        Generation(generation), [member(id_, a) for id_, a in sorted(addresses.items())]
    )


def join(
    rank: int, talk: Any, transport: str = "auto", **more: Any
) -> tuple[Group, Faults, dict[int, Any]]:
    """A group of all members of the crew, in generation 1."""
    group, faults = make_group(rank, transport, **more)
    addresses = dict(talk.everyone((rank, group.address)))
    group.edit(world(1, addresses), timeout_s=20)
    return group, faults, addresses


def in_one_process(size: int, transport: str = "tcp", **more: Any) -> list[Group]:
    """Groups of one world, all in this process: cheap, and enough where nobody has to die."""
    groups = [make_group(id_, transport, **more)[0] for id_ in range(size)]
    whole = world(1, {id_: group.address for id_, group in enumerate(groups)})
    with ThreadPoolExecutor(size) as threads:
        for entered in [threads.submit(g.edit, whole, timeout_s=20) for g in groups]:
            entered.result()
    return groups
