"""The CUDA lane of a process group: NCCL for tensors on a device, a communicator a generation.

Who is a member, and that a generation has ended, comes from the Group, whose links are on the
CPU; NCCL is told. At the first CUDA collective of a generation rank 0 opens a store, its
address goes round in an exchange, and every rank builds its end. A generation that ends by a
fault has its communicator aborted, by a thread of its own: NCCL's abort may block for as long
as the operation it ends. It is never destroyed in order, which would wait for the dead.

After an edit without a fault the communicator is kept where the members are the same, and
shrunk where torch's NCCL can and members only left. Nothing can be saved of an aborted one,
and torch 2.13 cannot grow one: then it is built anew. An operation that an abort cut off fails
with torch's own error; CUDA collectives are not run again by `mending`.
"""

import json
import logging
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public, not listed

from ftkit.collectives import moves
from ftkit.collectives.channel import Channel
from ftkit.collectives.group import Group
from ftkit.core.errors import GenerationAborted, UsageError
from ftkit.core.ids import Generation, MemberId
from ftkit.core.world import World

logger = logging.getLogger(__name__)

Build = Callable[[Store, int, int, timedelta], Any]
"""(store, rank, size, timeout) -> a torch ProcessGroup for one generation."""


class Way(Enum):
    """How a communicator of some members becomes one of others."""

    KEEP = "keep"
    SHRINK = "shrink"
    BUILD = "build"


def way(
    old: Sequence[MemberId], new: Sequence[MemberId], *, aborted: bool, can_shrink: bool
) -> Way:
    """The cheapest way from a communicator of `old` members to one of `new` ones. Pure.

    Shrinking keeps the order of ranks, so the new members must stand in the old order.
    """
    if aborted or not old:
        return Way.BUILD
    if tuple(old) == tuple(new):
        return Way.KEEP
    left = [member for member in old if member in set(new)]
    return Way.SHRINK if can_shrink and left == list(new) else Way.BUILD


class NcclLane:
    """See the module. `call` may be used from any thread; it blocks while a group is built."""

    def __init__(
        self,
        group: Group,
        channel: Channel,
        timeout: timedelta,
        build: Build | None = None,
    ) -> None:
        """Nothing is built before the first call.

        Args:
          group: tells when a generation is over.
          channel: the members.
          timeout: of every operation.
          build: makes the torch group of one generation; torch's NCCL unless given.
        """
        self._group = group
        self._channel = channel
        self._timeout = timeout
        self._build = build or build_nccl
        self._lock = threading.Lock()
        self._made: Any = None
        self._generation = Generation(-1)
        self._members: tuple[MemberId, ...] = ()
        self._aborted = False
        self._ended = Generation(-1)
        """The last generation that ended by a fault."""
        group.add_fault_listener(self._abort)

    def call(self, name: str, *args: Any, **more: Any) -> Any:
        """What `ProcessGroup.<name>` of the current generation's NCCL group returns.

        Raises:
          GenerationAborted: the generation has ended, perhaps while its group was being built.
        """
        with self._lock:
            world = self._group.world
            if self._generation != world.generation:
                self._renew(world)
            made = self._made
            if self._ended >= world.generation:
                self._abort(self._ended)  # which may have come while there was nothing to abort
                raise GenerationAborted(
                    f"generation {world.generation} ended before {name} was given to the device"
                )
        return getattr(made, name)(*args, **more)

    def close(self) -> None:
        """Abort what there is."""
        self._group.remove_fault_listener(self._abort)
        self._abort(self._generation)

    def _renew(self, world: World) -> None:
        old, self._made = self._made, None
        members = self._channel.members
        can_shrink = old is not None and _can_shrink(old)
        match way(self._members, members, aborted=self._aborted, can_shrink=can_shrink):
            case Way.KEEP:
                self._made = old
            case Way.SHRINK:
                gone = [r for r, member in enumerate(self._members) if member not in members]
                self._made = _shrunk(old, gone)
            case Way.BUILD:
                if old is not None and not self._aborted:
                    _abort_aside(old)
        if self._made is None:
            self._made = self._build(
                self._store(), self._channel.rank, self._channel.size, self._timeout
            )
        self._generation, self._members, self._aborted = world.generation, members, False

    def _store(self) -> Store:
        """A store of this generation: rank 0's, at an address that all are told."""
        store, mine = None, b""
        if self._channel.rank == 0:
            store = TCPStore(self._group.address[0], 0, is_master=True, wait_for_workers=False)
            mine = json.dumps([store.host, store.port]).encode()
        payload = np.frombuffer(mine, dtype=np.uint8)
        handle = self._channel.issue(
            "nccl_store",
            moves.exchange(payload),
            nbytes=payload.size,
            timeout_s=self._timeout.total_seconds(),
        )
        told = handle.wait()
        if store is None:
            host, port = json.loads(told[0])
            store = TCPStore(str(host), int(port), is_master=False)
        return store

    def _abort(self, generation: Generation) -> None:
        """The generation is over: free whoever waits for the device. On the communication thread."""
        self._ended = max(self._ended, generation)
        made = self._made
        if made is not None and self._generation <= generation and not self._aborted:
            self._aborted = True
            _abort_aside(made)


def build_nccl(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """Torch's NCCL, behind the ProcessGroup that gives its methods the names `dist` uses.

    Raises:
      UsageError: this torch has no NCCL.
    """
    if not dist.is_nccl_available():
        raise UsageError("tensors on a CUDA device need a torch that was built with NCCL")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    backend = dist.ProcessGroupNCCL(store, rank, size, options)
    return _named(backend, store)


def _named(backend: Any, store: Store) -> Any:
    made: Any = dist.ProcessGroup(store, backend.rank(), backend.size())
    made._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, backend)
    made._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    made._set_group_name("ftkit nccl")
    return made


def _nccl_of(made: Any) -> Any:
    return made._get_backend(torch.device("cuda"))


def _can_shrink(made: Any) -> bool:
    try:
        return bool(_nccl_of(made).supports_shrinking)
    except (AttributeError, RuntimeError):
        return False


def _shrunk(made: Any, excluded: list[int]) -> Any:
    """The group without some ranks; None when that fails."""
    try:
        backend = _nccl_of(made).shrink(excluded, dist.distributed_c10d.SHRINK_DEFAULT, None)
        shrunk = _named(backend, made.get_group_store())
    except Exception as error:  # noqa: BLE001 - whatever NCCL says, building anew is the answer
        logger.warning("NCCL could not shrink its communicator (%s); it is built anew", error)
        return None
    return shrunk


def _abort_aside(made: Any) -> None:
    def abort() -> None:
        try:
            made.abort()
        except RuntimeError as error:
            logger.warning("aborting a device group failed: %s", error)

    threading.Thread(target=abort, name="ftkit-nccl-abort", daemon=True).start()
