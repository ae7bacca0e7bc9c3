"""FtkitProcessGroup: a torch ProcessGroup over a Group, for everything torch does with one.

Each collective (`calls`) comes under every name that torch looks up, the un-trampolined
ones (`gather`, `all_gather_single`, ...) and the coalesced ones included. Where torch passes
lists, the n-th entries of all lists are one operation.
"""

# torch overloads each method for callers that do not exist in 2.13 but for C++ ones.
# mypy: disable-error-code="override, assignment"

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import wraps
from typing import Any, TypeVar, cast

import torch

from ftkit.collectives.calls import Calls, Issue
from ftkit.collectives.channel import Channel
from ftkit.collectives.group import Group
from ftkit.collectives.handle import Handle, finished
from ftkit.collectives.identity import Identity
from ftkit.collectives.nccl import NcclLane
from ftkit.collectives.work import FtkitWork, join
from ftkit.core.world import World

Method = TypeVar("Method", bound=Callable[..., Any])


def _of_cpu(method: Method) -> Method:
    """`method` for tensors on the CPU; NCCL's of the same name for those on a CUDA device.

    Tensors on "meta" have no bytes to move: such a call is done when it is made.
    """

    @wraps(method)
    def call(self: "FtkitProcessGroup", *args: Any, **more: Any) -> Any:
        first = _first(*args, *more.values())
        if first is not None and first.is_meta:
            return FtkitWork(finished(None), args[:1], self._end)
        if first is not None and first.is_cuda:
            return self._lane().call(method.__name__, *args, **more)
        return method(self, *args, **more)

    return cast("Method", call)


class FtkitProcessGroup(Identity):
    """See the module. Methods return at once with an `FtkitWork`."""

    def __init__(
        self,
        group: Group,
        channel: Channel,
        *,
        calls: Calls | None = None,
        timeout: timedelta,
        on_shutdown: Callable[[], None],
    ) -> None:
        """Speak for `channel` of `group`.

        Args:
          group: shared with other process groups.
          channel: the members this one spans.
          calls: how collectives are issued on `channel`, and what a loss does to them.
          timeout: longest an operation may take; then its generation is aborted.
          on_shutdown: called once by `destroy_process_group`.
        """
        super().__init__(channel)
        self.group = group
        self._calls = calls or Calls(channel)
        self._timeout = timeout
        self._on_shutdown: Callable[[], None] | None = on_shutdown
        self._coalescing: list[Handle[Any]] | None = None
        self._cuda: NcclLane | None = None
        self.renumber: Callable[[World], None] | None = None
        """Keeps torch's table of ranks right after an edit; set by the backend."""

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    @property
    def timeout_s(self) -> float | None:
        """Longest an operation may take whose caller names nothing; None for ever."""
        return self._timeout.total_seconds() or None

    def abort(self) -> None:
        """End the current generation for all its members."""
        self._end("ProcessGroup.abort() was called")

    def shutdown(self) -> None:
        if self._cuda is not None:
            self._cuda.close()
        if self._on_shutdown is not None:
            on_shutdown, self._on_shutdown = self._on_shutdown, None
            on_shutdown()

    # -- reductions -------------------------------------------------------------------------

    @_of_cpu
    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> FtkitWork:
        """Accepts (tensors, AllreduceOptions), (tensors, ReduceOp) and (tensor, ReduceOp)."""
        return self._each(self._calls.all_reduce, opts, _listed(tensors))

    @_of_cpu
    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> FtkitWork:
        return self._each(self._calls.reduce, opts, tensors)

    @_of_cpu
    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> FtkitWork:
        """An output and a list of inputs, or several of each; also as torch's C++ calls it."""
        return self._each(self._calls.reduce_scatter, opts, outputs, inputs)

    @_of_cpu
    def reduce_scatter_single(self, output: Any, input: Any, opts: Any = None) -> FtkitWork:  # noqa: A002 - torch passes it by this name
        return self._each(self._calls.reduce_scatter_whole, opts, [output], [input])

    @_of_cpu
    def reduce_scatter_single_coalesced(
        self, outputs: Any, inputs: Any, opts: Any = None
    ) -> FtkitWork:
        return self._each(self._calls.reduce_scatter_whole, opts, outputs, inputs)

    @_of_cpu
    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> FtkitWork:
        return self._each(self._calls.all_reduce, opts, tensors)

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # -- moves ------------------------------------------------------------------------------

    @_of_cpu
    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> FtkitWork:
        """Accepts (tensors, BroadcastOptions) and (tensor, root)."""
        return self._each(self._calls.broadcast, opts, _listed(tensors))

    @_of_cpu
    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> FtkitWork:
        """One list of outputs, an entry a rank, for each input."""
        return self._each(self._calls.all_gather, opts, outputs, inputs)

    @_of_cpu
    def all_gather_single(self, output: Any, input: Any, opts: Any = None) -> FtkitWork:  # noqa: A002
        return self._each(self._calls.all_gather_whole, opts, [output], [input])

    @_of_cpu
    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> FtkitWork:
        return self._each(self._calls.all_gather_whole, opts, outputs, inputs)

    @_of_cpu
    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> FtkitWork:
        return self._each(self._calls.all_gather, opts, outputs, inputs)

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    @_of_cpu
    def gather(self, outputs: Any, inputs: Any, opts: Any = None) -> FtkitWork:
        # Elsewhere than at the root torch passes no outputs at all.
        return self._each(self._calls.gather, opts, outputs or [[]], inputs)

    @_of_cpu
    def scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> FtkitWork:
        return self._each(self._calls.scatter, opts, outputs, inputs or [[]])

    @_of_cpu
    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> FtkitWork:
        return self._each(self._calls.all_to_all, opts, [outputs], [inputs])

    @_of_cpu
    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> FtkitWork:
        splits = [output_split_sizes], [input_split_sizes]
        return self._each(self._calls.all_to_all_whole, opts, [output], [input], *splits)

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None, timeout: Any = None) -> FtkitWork:
        return self._work([self._calls.barrier(self._limit_s(opts))], [])

    # -- point to point ---------------------------------------------------------------------

    @_of_cpu
    def send(self, tensors: Sequence[torch.Tensor], dst: int, tag: int = 0) -> FtkitWork:
        (tensor,) = tensors
        return self._work([self._calls.send(tensor, dst, tag, self._limit_s(None))], [tensor])

    @_of_cpu
    def recv(self, tensors: Sequence[torch.Tensor], src: int, tag: int = 0) -> FtkitWork:
        (tensor,) = tensors
        return self._work([self._calls.recv(tensor, src, tag, self._limit_s(None))], [tensor])

    @_of_cpu
    def recv_anysource(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> FtkitWork:
        (tensor,) = tensors
        return self._work([self._calls.recv(tensor, None, tag, self._limit_s(None))], [tensor])

    # -- coalescing -------------------------------------------------------------------------

    def _start_coalescing(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._lane().call("_start_coalescing", device)
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> Any:
        if device.type == "cuda":
            return self._lane().call("_end_coalescing", device)
        handles, self._coalescing = self._coalescing or [], None
        return FtkitWork(join(handles), [], self._end)

    # -- helpers ----------------------------------------------------------------------------

    def _lane(self) -> NcclLane:
        if self._cuda is None:
            self._cuda = NcclLane(self.group, self.channel, self._timeout)
        return self._cuda

    def _each(self, call: Callable[..., Issue], opts: Any, *lists: Any) -> FtkitWork:
        """`call` on the n-th entries of all `lists`; the work of them all."""
        limit_s = self._limit_s(opts)
        issues = [call(*entries, opts, limit_s) for entries in zip(*lists, strict=True)]
        return self._work(issues, list(lists[0]))

    def _work(self, issues: Sequence[Issue], result: object) -> FtkitWork:
        handles = [issue() for issue in issues]
        if self._coalescing is not None:
            self._coalescing.extend(handles)
        return FtkitWork(join(handles), result, self._end)

    def _limit_s(self, opts: Any) -> float | None:
        given = getattr(opts, "timeout", None)
        seconds = given.total_seconds() if isinstance(given, timedelta) else 0.0
        # torch leaves a negative timeout where the caller named none.
        return seconds if seconds > 0 else self.timeout_s

    def _end(self, reason: str) -> None:
        self.group.abort(self.group.world.generation, reason)


def _listed(tensors: Any) -> list[torch.Tensor]:
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def _first(*args: Any) -> torch.Tensor | None:
    """The first tensor among nested lists."""
    for arg in args:
        found = arg if isinstance(arg, torch.Tensor) else None
        if isinstance(arg, (list, tuple)):
            found = _first(*arg)
        if found is not None:
            return found
    return None
