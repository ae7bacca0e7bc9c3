"""FtkitProcessGroup: a torch ProcessGroup over a Group, for everything torch does with one.

Every method comes under the names torch looks up, the un-trampolined ones (`gather`,
`all_gather_single`, ...) included. Tensors are used in place; one that is not contiguous is
copied and copied back. `size()` and `rank()` follow the world through each edit.
"""

# torch overloads each method for callers that do not exist in 2.13 but for C++ ones.
# mypy: disable-error-code="override, assignment"

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ftkit.collectives import moves, reductions
from ftkit.collectives.arithmetic import Bytes, as_bytes, check
from ftkit.collectives.channel import Channel
from ftkit.collectives.group import Group
from ftkit.collectives.handle import Handle
from ftkit.collectives.op import Program
from ftkit.collectives.work import FtkitWork, join
from ftkit.core.errors import UsageError
from ftkit.core.world import World

BACKEND = "ftkit"

_OPS = [
    (dist.ReduceOp.SUM, "sum"),
    (dist.ReduceOp.AVG, "avg"),
    (dist.ReduceOp.PRODUCT, "product"),
    (dist.ReduceOp.MIN, "min"),
    (dist.ReduceOp.MAX, "max"),
    (dist.ReduceOp.BAND, "band"),
    (dist.ReduceOp.BOR, "bor"),
    (dist.ReduceOp.BXOR, "bxor"),
]


class FtkitProcessGroup(dist.ProcessGroup):
    """See the module. Methods return at once with an `FtkitWork`."""

    def __init__(
        self,
        group: Group,
        channel: Channel,
        *,
        timeout: timedelta,
        on_shutdown: Callable[[], None],
    ) -> None:
        """Speak for `channel` of `group`.

        Args:
          group: shared with other process groups.
          channel: the members this one spans.
          timeout: longest an operation may take; then its generation is aborted.
          on_shutdown: called once by `destroy_process_group`.
        """
        super().__init__(channel.rank, channel.size)  # type: ignore[call-arg]
        self.group = group
        self.channel = channel
        self._timeout = timeout
        self._on_shutdown: Callable[[], None] | None = on_shutdown
        self._name = self._desc = "undefined"
        self._coalescing: list[Handle[Any]] | None = None
        self.renumber: Callable[[World], None] | None = None
        """Keeps torch's table of ranks right after an edit; set by the backend."""

    # -- identity ---------------------------------------------------------------------------

    def size(self) -> int:
        return self.channel.size

    def rank(self) -> int:
        return self.channel.rank

    def getSize(self) -> int:  # noqa: N802 - torch's name
        return self.channel.size

    def getRank(self) -> int:  # noqa: N802
        return self.channel.rank

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def name(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._desc

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802
        self._desc = desc

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    @property
    def group_desc(self) -> str:
        return self._desc

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout

    def abort(self) -> None:
        """End the current generation for all its members."""
        self._end("ProcessGroup.abort() was called")

    def shutdown(self) -> None:
        if self._on_shutdown is not None:
            on_shutdown, self._on_shutdown = self._on_shutdown, None
            on_shutdown()

    # -- reductions -------------------------------------------------------------------------

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> FtkitWork:
        """Accepts (tensors, AllreduceOptions), (tensors, ReduceOp) and (tensor, ReduceOp)."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        op = _op_of(opts)
        return self._work([self._reduce_all(t, op, opts) for t in tensors], tensors)

    def allreduce_coalesced(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> FtkitWork:
        return self.allreduce(list(tensors), opts)

    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> FtkitWork:
        op, root = _op_of(opts), int(opts.rootRank)
        handles = []
        for tensor in tensors:
            check(tensor.dtype, op)
            home = _Home(tensor)
            program = reductions.reduce(home.data, tensor.dtype, op, root)
            handles.append(home.restored(self._issue("reduce", program, home.data.size, opts)))
        return self._work(handles, list(tensors))

    def reduce_scatter(
        self,
        output_tensors: Sequence[torch.Tensor],
        input_tensors: Sequence[Sequence[torch.Tensor]],
        opts: Any = None,
    ) -> FtkitWork:
        handles = [
            self._scatter_reduced(out, list(ins), opts)
            for out, ins in zip(output_tensors, input_tensors, strict=True)
        ]
        return self._work(handles, list(output_tensors))

    def reduce_scatter_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002 - torch passes it by this name
        opts: Any = None,
    ) -> FtkitWork:
        pieces = _pieces(input, self.channel.size)
        return self._work([self._scatter_reduced(output, pieces, opts)], [output])

    def reduce_scatter_single_coalesced(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        opts: Any = None,
    ) -> FtkitWork:
        handles = [
            self._scatter_reduced(out, _pieces(whole, self.channel.size), opts)
            for out, whole in zip(outputs, inputs, strict=True)
        ]
        return self._work(handles, list(outputs))

    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # -- moves ------------------------------------------------------------------------------

    def broadcast(self, tensors: Any, opts: Any = None, timeout: Any = None) -> FtkitWork:
        """Accepts (tensors, BroadcastOptions) and (tensor, root)."""
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        root = opts if isinstance(opts, int) else int(opts.rootRank)
        handles = []
        for tensor in tensors:
            home = _Home(tensor)
            program = moves.broadcast(home.data, root)
            handles.append(home.restored(self._issue("broadcast", program, home.data.size, opts)))
        return self._work(handles, tensors)

    def allgather(
        self,
        output_tensors: Sequence[Sequence[torch.Tensor]],
        input_tensors: Sequence[torch.Tensor],
        opts: Any = None,
    ) -> FtkitWork:
        handles = [
            self._gather_all(list(outs), mine, opts)
            for outs, mine in zip(output_tensors, input_tensors, strict=True)
        ]
        return self._work(handles, [list(outs) for outs in output_tensors])

    def allgather_coalesced(
        self,
        output_lists: Sequence[Sequence[torch.Tensor]],
        input_list: Sequence[torch.Tensor],
        opts: Any = None,
    ) -> FtkitWork:
        # Outputs come as one list a tensor, each with one entry a rank.
        handles = [
            self._gather_all(list(outs), mine, opts)
            for outs, mine in zip(output_lists, input_list, strict=True)
        ]
        return self._work(handles, [list(outs) for outs in output_lists])

    def all_gather_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002 - torch passes it by this name
        opts: Any = None,
    ) -> FtkitWork:
        return self._work([self._gather_into(output, input, opts)], [output])

    def all_gather_single_coalesced(
        self,
        outputs: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        opts: Any = None,
    ) -> FtkitWork:
        handles = [
            self._gather_into(out, mine, opts) for out, mine in zip(outputs, inputs, strict=True)
        ]
        return self._work(handles, list(outputs))

    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(
        self,
        output_tensors: Sequence[Sequence[torch.Tensor]],
        input_tensors: Sequence[torch.Tensor],
        opts: Any = None,
    ) -> FtkitWork:
        root = int(opts.rootRank)
        homes = [_Home(t) for t in output_tensors[0]] if self.channel.rank == root else []
        mine = as_bytes(input_tensors[0].contiguous())
        program = moves.gather([h.data for h in homes], mine, root)
        handle = self._issue("gather", program, mine.size, opts)
        return self._work([_restored(homes, handle)], list(output_tensors))

    def scatter(
        self,
        output_tensors: Sequence[torch.Tensor],
        input_tensors: Sequence[Sequence[torch.Tensor]],
        opts: Any = None,
    ) -> FtkitWork:
        root = int(opts.rootRank)
        home = _Home(output_tensors[0])
        ins = []
        if self.channel.rank == root:
            ins = [as_bytes(t.contiguous()) for t in input_tensors[0]]
        program = moves.scatter(home.data, ins, root)
        handle = self._issue("scatter", program, home.data.size, opts)
        return self._work([home.restored(handle)], list(output_tensors))

    def alltoall(
        self,
        output_tensors: Sequence[torch.Tensor],
        input_tensors: Sequence[torch.Tensor],
        opts: Any = None,
    ) -> FtkitWork:
        homes = [_Home(t) for t in output_tensors]
        ins = [as_bytes(t.contiguous()) for t in input_tensors]
        handle = self._all_to_all([h.data for h in homes], ins, opts)
        return self._work([_restored(homes, handle)], list(output_tensors))

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,  # noqa: A002 - torch passes it by this name
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
    ) -> FtkitWork:
        home = _Home(output)
        source = as_bytes(input.contiguous())
        outs = _cut(home.data, output, list(output_split_sizes), self.channel.size)
        ins = _cut(source, input, list(input_split_sizes), self.channel.size)
        return self._work([home.restored(self._all_to_all(outs, ins, opts))], [output])

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None, timeout: Any = None) -> FtkitWork:
        program = moves.exchange(np.empty(0, dtype=np.uint8))
        return self._work([self._issue("barrier", program, 0, opts)], [])

    # -- point to point ---------------------------------------------------------------------

    def send(self, tensors: Sequence[torch.Tensor], dst: int, tag: int = 0) -> FtkitWork:
        (tensor,) = tensors
        data = as_bytes(tensor.contiguous())
        handle = self.channel.issue_p2p(
            "send", dst, tag, moves.send(data, dst), nbytes=data.size, timeout_s=self._limit_s(None)
        )
        return self._work([handle], [tensor])

    def recv(self, tensors: Sequence[torch.Tensor], src: int, tag: int = 0) -> FtkitWork:
        (tensor,) = tensors
        home = _Home(tensor)
        handle = self.channel.issue_p2p(
            "recv",
            src,
            tag,
            moves.recv(home.data, src),
            nbytes=home.data.size,
            timeout_s=self._limit_s(None),
        )
        return self._work([home.restored(handle)], [tensor])

    def recv_anysource(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> FtkitWork:
        return self.recv(tensors, -1, tag)

    # -- coalescing and bookkeeping ----------------------------------------------------------

    def _start_coalescing(self, device: torch.device) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: torch.device) -> FtkitWork:
        handles, self._coalescing = self._coalescing or [], None
        return FtkitWork(join(handles), [], self._end)

    def _has_hooks(self) -> bool:
        return False

    def _wait_for_pending_works(self) -> None:
        """Nothing to wait for: hooks do not exist here."""

    def _set_sequence_number_for_group(self) -> None:
        """Numbers begin at 0 in each generation by themselves."""

    # -- helpers ----------------------------------------------------------------------------

    def _reduce_all(self, tensor: torch.Tensor, op: str, opts: Any) -> Handle[Any]:
        check(tensor.dtype, op)
        home = _Home(tensor)
        program = reductions.all_reduce(home.data, tensor.dtype, op)
        return home.restored(self._issue("all_reduce", program, home.data.size, opts))

    def _scatter_reduced(
        self, out: torch.Tensor, ins: Sequence[torch.Tensor], opts: Any
    ) -> Handle[Any]:
        op = _op_of(opts)
        check(out.dtype, op)
        home = _Home(out)
        parts = [as_bytes(t.contiguous()) for t in ins]
        _expect(len(parts) == self.channel.size, f"{len(parts)} inputs", self.channel.size)
        _expect(
            parts[self.channel.rank].size == home.data.size,
            f"an output of {home.data.size} bytes for inputs of {parts[0].size}",
            self.channel.size,
        )
        program = reductions.reduce_scatter(home.data, parts, out.dtype, op)
        return home.restored(
            self._issue("reduce_scatter", program, sum(p.size for p in parts), opts)
        )

    def _gather_all(
        self, outs: Sequence[torch.Tensor], mine: torch.Tensor, opts: Any
    ) -> Handle[Any]:
        _expect(len(outs) == self.channel.size, f"{len(outs)} outputs", self.channel.size)
        homes = [_Home(t) for t in outs]
        data = as_bytes(mine.contiguous())
        program = moves.all_gather([h.data for h in homes], data)
        return _restored(homes, self._issue("all_gather", program, data.size, opts))

    def _gather_into(self, out: torch.Tensor, mine: torch.Tensor, opts: Any) -> Handle[Any]:
        home = _Home(out)
        data = as_bytes(mine.contiguous())
        size = self.channel.size
        _expect(
            home.data.size == size * data.size,
            f"an output of {home.data.size} bytes for an input of {data.size}",
            size,
        )
        outs = [home.data[r * data.size : (r + 1) * data.size] for r in range(size)]
        program = moves.all_gather(outs, data)
        return home.restored(self._issue("all_gather", program, data.size, opts))

    def _all_to_all(self, outs: Sequence[Bytes], ins: Sequence[Bytes], opts: Any) -> Handle[Any]:
        size = self.channel.size
        _expect(len(outs) == len(ins) == size, f"{len(outs)} outputs, {len(ins)} inputs", size)
        rank = self.channel.rank
        _expect(
            outs[rank].size == ins[rank].size,
            f"{ins[rank].size} bytes to itself into {outs[rank].size}",
            size,
        )
        return self._issue(
            "all_to_all", moves.all_to_all(outs, ins), sum(p.size for p in ins), opts
        )

    def _issue(self, name: str, program: Program, nbytes: int, opts: Any) -> Handle[Any]:
        return self.channel.issue(name, program, nbytes=nbytes, timeout_s=self._limit_s(opts))

    def _work(self, handles: Sequence[Handle[Any]], result: object) -> FtkitWork:
        if self._coalescing is not None:
            self._coalescing.extend(handles)
        return FtkitWork(join(handles), result, self._end)

    def _limit_s(self, opts: Any) -> float | None:
        given = getattr(opts, "timeout", None)
        seconds = given.total_seconds() if isinstance(given, timedelta) else 0.0
        # torch leaves a negative timeout where the caller named none.
        return seconds if seconds > 0 else self._timeout.total_seconds() or None

    def _end(self, reason: str) -> None:
        self.group.abort(self.group.world.generation, reason)


class _Home:
    """A tensor's bytes to write to; when it is not contiguous, those of a copy."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._dense = tensor if tensor.is_contiguous() else tensor.contiguous()
        self.data = as_bytes(self._dense)

    def restored(self, handle: Handle[Any]) -> Handle[Any]:
        """`handle`, after which the tensor itself holds the result."""
        return _restored([self], handle)

    def restore(self) -> None:
        if self._dense is not self._tensor:
            with torch.no_grad():
                self._tensor.copy_(self._dense)

    @property
    def away(self) -> bool:
        return self._dense is not self._tensor


def _restored(homes: Sequence[_Home], handle: Handle[Any]) -> Handle[Any]:
    if not any(home.away for home in homes):
        return handle

    def restore(value: Any) -> Any:
        for home in homes:
            home.restore()
        return value

    return handle.then(restore)


def _op_of(opts: Any) -> str:
    op = getattr(opts, "reduceOp", opts)
    if op is None:
        return "sum"
    for candidate, name in _OPS:
        if op == candidate:
            return name
    raise ValueError(f"ftkit does not implement {op}")


def _pieces(whole: torch.Tensor, count: int) -> list[torch.Tensor]:
    flat = whole.contiguous().reshape(-1)
    _expect(flat.numel() % count == 0, f"{flat.numel()} elements", count)
    return list(torch.split(flat, flat.numel() // count)) if flat.numel() else [flat] * count


def _cut(data: Bytes, tensor: torch.Tensor, sizes: list[int], count: int) -> list[Bytes]:
    """Pieces along the first dimension: even ones, or `sizes` rows each."""
    if not sizes:
        _expect(data.size % count == 0, f"{data.size} bytes", count)
        step = data.size // count
        return [data[r * step : (r + 1) * step] for r in range(count)]
    rows = tensor.shape[0]
    _expect(len(sizes) == count and sum(sizes) == rows, f"splits {sizes} of {rows} rows", count)
    row = data.size // rows if rows else 0
    starts = [sum(sizes[:i]) * row for i in range(count + 1)]
    return [data[starts[i] : starts[i + 1]] for i in range(count)]


def _expect(fits: bool, what: str, size: int) -> None:
    if not fits:
        raise UsageError(f"{what} do not fit a group of {size} ranks")
