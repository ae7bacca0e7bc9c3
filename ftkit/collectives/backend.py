"""The backend "ftkit" of torch.distributed: `init_process_group("ftkit")`.

After `bind(group)` the default process group speaks for that Group's world. Without it, in a
plain script, each rank makes a Group of its own, and the store carries the addresses and a
random secret.
"""

import atexit
import contextlib
import json
import logging
import secrets
import socket
import zlib
from collections import Counter
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ftkit.collectives.calls import Calls
from ftkit.collectives.channel import Channel
from ftkit.collectives.config import CollectivesConfig, OnLoss
from ftkit.collectives.group import Group
from ftkit.collectives.identity import BACKEND
from ftkit.collectives.mending import Mender
from ftkit.collectives.process_group import FtkitProcessGroup
from ftkit.core.errors import UsageError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.world import Member, World

logger = logging.getLogger(__name__)


class _Registry:
    """Which Group the backend speaks for. One a process; changed by bind and init alone."""

    def __init__(self) -> None:
        self.bound: Group | None = None
        self.current: Group | None = None
        self.mender: Mender | None = None
        self.on_loss = OnLoss.RAISE
        self.made: WeakKeyDictionary[Group, Counter[tuple[int, tuple[MemberId, ...]]]]
        self.made = WeakKeyDictionary()
        """How many groups of the same members were made in each generation: of a Group that
        outlives its process group no channel's id is used twice."""


_registry = _Registry()


def register() -> None:
    """Make "ftkit" known to torch.distributed, for tensors on the CPU and on CUDA. Idempotent."""
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])


def bind(group: Group | None) -> None:
    """Let the next `init_process_group("ftkit")` use `group`; None takes it back.

    The group stays the caller's: destroying the process group does not close it.
    """
    _registry.bound = group


def _create(options: Any, backend_options: Any) -> FtkitProcessGroup:
    timeout: timedelta = options.timeout
    ranks = list(options.global_ranks_in_group)
    if not ranks:
        return _default(options, backend_options, timeout)
    group = _registry.current
    if group is None:
        raise UsageError(
            'new_group(backend="ftkit") needs a default process group of the same backend'
        )
    world = group.world
    members = tuple(world.members[rank].member for rank in ranks)
    # torch's own names count the groups a process has made, and a newcomer has made fewer
    # than a survivor; the members of a group agree on this instead.
    made = _registry.made.setdefault(group, Counter())
    number = made[world.generation, members]
    made[world.generation, members] += 1
    text = json.dumps([world.generation, members, number])
    channel = group.subset(zlib.crc32(text.encode()) or 1, members)
    subset = FtkitProcessGroup(
        group,
        channel,
        calls=_calls(channel, backend_options),
        timeout=timeout,
        on_shutdown=lambda: _let_go(group, subset, None),
    )

    def renumber(world: World) -> None:
        _refresh(subset, {world.rank_of(m): r for r, m in enumerate(members)})

    subset.renumber = renumber
    group.add_edit_listener(renumber)
    return subset


def _default(options: Any, backend_options: Any, timeout: timedelta) -> FtkitProcessGroup:
    rank, size = int(options.group_rank), int(options.group_size)
    bound = _registry.bound
    if bound is not None and (bound.rank, bound.size) != (rank, size):
        raise UsageError(
            f"init_process_group says rank {rank} of {size}, but the session's world has us "
            f"as rank {bound.rank} of {bound.size}; leave rank and world_size to the session"
        )
    group = bound or _standalone(options.store, rank, size, backend_options, timeout)
    _registry.current = group
    default = FtkitProcessGroup(
        group,
        group.channel,
        calls=_calls(group.channel, backend_options),
        timeout=timeout,
        on_shutdown=lambda: _let_go(group, default, group if bound is None else None),
    )

    def renumber(world: World) -> None:
        _refresh(default, {r: r for r in range(world.size)})

    default.renumber = renumber
    group.add_edit_listener(renumber)
    return default


def _checked(options: object) -> CollectivesConfig | None:
    if options is not None and not isinstance(options, CollectivesConfig):
        raise UsageError(f"pg_options must be a CollectivesConfig, not {type(options).__name__}")
    return options


def _calls(channel: Channel, options: object) -> Calls:
    """How this group's collectives meet a loss: as its own options say, or the default group's."""
    config = _checked(options)
    on_loss = _registry.on_loss if config is None else config.on_loss
    if on_loss is not OnLoss.RAISE and _registry.mender is None:
        raise UsageError(
            f'on_loss="{on_loss}" needs a default group that mends itself: pass the option to '
            "init_process_group; in a session, steps are played again instead"
        )
    return Calls(channel, _registry.mender, on_loss)


def _standalone(store: Any, rank: int, size: int, options: object, timeout: timedelta) -> Group:
    config = _checked(options) or CollectivesConfig()
    mender = None if config.on_loss is OnLoss.RAISE else Mender()
    # The store may outlive a process group and be used for the next; a rank's count of
    # turns keeps their keys apart.
    turn = store.add(f"ftkit/turn/{rank}", 1)
    if rank == 0:
        store.set(f"ftkit/{turn}/secret", secrets.token_hex(32))
    secret = bytes.fromhex(store.get(f"ftkit/{turn}/secret").decode())
    group = Group(
        member=MemberId(rank),
        secret=secret,
        host=_reachable_host(store),
        config=config,
        on_fault=_warn if mender is None else mender.take_fault,
        on_tell=None if mender is None else mender.take_statement,
    )
    try:
        store.set(f"ftkit/{turn}/address/{rank}", json.dumps(group.address))
        members = []
        for r in range(size):
            host, port = json.loads(store.get(f"ftkit/{turn}/address/{r}"))
            members.append(
                Member(member=MemberId(r), seat=Seat(r), node=NodeId(0), host=host, port=port)
            )
        group.edit(World.of(Generation(1), members), timeout_s=timeout.total_seconds())
    except BaseException:
        group.close()
        raise
    if mender is not None:
        mender.watch(group)
    _registry.mender, _registry.on_loss = mender, config.on_loss
    # A script that ends without destroy_process_group leaves cleanly all the same.
    atexit.register(group.close)
    return group


def _warn(generation: Generation, lost: frozenset[MemberId], reason: str) -> None:
    logger.warning("the process group failed: %s (lost ranks: %s)", reason, sorted(lost))


def _let_go(group: Group, pg: FtkitProcessGroup, own: Group | None) -> None:
    if pg.renumber is not None:
        group.remove_edit_listener(pg.renumber)
    if pg.channel is not group.channel:
        group.release(pg.channel)
        return
    if _registry.current is group:
        _registry.current = None
    if own is not None:
        own.close()
        atexit.unregister(own.close)
        mender, _registry.mender = _registry.mender, None
        _registry.on_loss = OnLoss.RAISE
        if mender is not None:
            mender.close()


def _reachable_host(store: Any) -> str:
    """The address by which this host talks to the store's: the one the job uses."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    target = getattr(store, "host", None)
    if not target:
        return "127.0.0.1"
    with contextlib.suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(
            target, getattr(store, "port", 0) or 9, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing; the kernel picks the route
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def _refresh(pg: FtkitProcessGroup, ranks: dict[Any, int]) -> None:
    """Tell torch which global rank is which rank of `pg` after an edit."""
    known = getattr(c10d._world, "pg_group_ranks", None)
    if isinstance(known, dict) and pg in known:
        known[pg] = {r: g for r, g in ranks.items() if r is not None}
