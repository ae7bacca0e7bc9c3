"""Calls: each collective on tensors, once; checked, then ready to be issued on a channel.

The process group gives them torch's many names. Tensors are used in place; one that is not
contiguous is copied and copied back.
"""

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch

from ftkit.collectives import arithmetic, checks, moves, reductions, sparse
from ftkit.collectives.arithmetic import Bytes
from ftkit.collectives.channel import Channel
from ftkit.collectives.config import OnLoss
from ftkit.collectives.handle import Handle
from ftkit.collectives.homes import Home, restored, source
from ftkit.collectives.mended_op import Again
from ftkit.collectives.mending import Mender
from ftkit.collectives.op import Op, Program, Wait
from ftkit.core.errors import Refused

#: Issues what was checked; does not block.
Issue: TypeAlias = Callable[[], Handle[Any]]


class Calls:
    """See the module. Every method checks, copies what it must, and sends nothing yet.

    `limit_s` is the operation's timeout. What torch gives several of at once is checked whole
    before the first of it is issued.
    """

    def __init__(
        self, channel: Channel, mender: Mender | None = None, on_loss: OnLoss = OnLoss.RAISE
    ) -> None:
        """Issue on `channel`, by way of `mender` unless losses are to be raised."""
        self._channel = channel
        self._mender = None if on_loss is OnLoss.RAISE else mender
        self._on_loss = on_loss

    def all_reduce(self, tensor: torch.Tensor, opts: Any, limit_s: float | None) -> Issue:
        op = checks.op_of(opts, tensor.dtype)
        if tensor.layout != torch.strided:
            return self._all_reduce_sparse(tensor, op, limit_s)
        home = Home(tensor)
        program = reductions.all_reduce(home.data, tensor.dtype, op)
        summed = tensor.dtype if op == "sum" and tensor.dtype.is_floating_point else None
        again = Again(home.data, summed)
        name = arithmetic.signature("all_reduce", op, tensor.dtype)
        return self._start([home], name, program, home.data.size, limit_s, again)

    def reduce(self, tensor: torch.Tensor, opts: Any, limit_s: float | None) -> Issue:
        op = checks.op_of(opts, tensor.dtype)
        root = checks.root_of(opts, self._channel.size)
        home = Home(tensor)
        program = reductions.reduce(home.data, tensor.dtype, op, root)
        name = arithmetic.signature("reduce", op, tensor.dtype)
        return self._start([home], name, program, home.data.size, limit_s)

    def reduce_scatter(
        self, out: torch.Tensor, ins: Sequence[torch.Tensor], opts: Any, limit_s: float | None
    ) -> Issue:
        op = checks.op_of(opts, out.dtype)
        checks.count(ins, "inputs", self._channel.size)
        checks.one_dtype(out, *ins)
        checks.same_shape(out, ins[self._channel.rank])
        return self._scatter_reduced(out, [source(t) for t in ins], op, limit_s)

    def reduce_scatter_whole(
        self, out: torch.Tensor, whole: torch.Tensor, opts: Any, limit_s: float | None
    ) -> Issue:
        op = checks.op_of(opts, out.dtype)
        checks.one_a_rank(whole, out, self._channel.size)
        return self._scatter_reduced(out, _even(source(whole), self._channel.size), op, limit_s)

    def broadcast(self, tensor: torch.Tensor, opts: Any, limit_s: float | None) -> Issue:
        root = self._channel.members[checks.root_of(opts, self._channel.size)]
        home = Home(tensor)

        def program(op: Op) -> Generator[Wait, None, Any]:
            # Ranks change when a member is lost; the root stays who it is.
            return moves.broadcast(home.data, op.members.index(root))(op)

        again = Again(home.data, root=root)
        return self._start([home], "broadcast", program, home.data.size, limit_s, again)

    def all_gather(
        self, outs: Sequence[torch.Tensor], mine: torch.Tensor, opts: Any, limit_s: float | None
    ) -> Issue:
        checks.count(outs, "outputs", self._channel.size)
        checks.one_dtype(mine, *outs)
        checks.same_shape(outs[self._channel.rank], mine)
        homes = [Home(t) for t in outs]
        return self._gathered(homes, [h.data for h in homes], source(mine), limit_s)

    def all_gather_whole(
        self, whole: torch.Tensor, mine: torch.Tensor, opts: Any, limit_s: float | None
    ) -> Issue:
        checks.one_a_rank(whole, mine, self._channel.size)
        home = Home(whole)
        outs = _even(home.data, self._channel.size)
        return self._gathered([home], outs, source(mine), limit_s)

    def gather(
        self, outs: Sequence[torch.Tensor], mine: torch.Tensor, opts: Any, limit_s: float | None
    ) -> Issue:
        """`outs` at the root alone."""
        root = checks.root_of(opts, self._channel.size)
        homes: list[Home] = []
        if self._channel.rank == root:
            checks.count(outs, "outputs", self._channel.size)
            checks.one_dtype(mine, *outs)
            checks.same_shape(outs[root], mine)
            homes = [Home(t) for t in outs]
        data = source(mine)
        program = moves.gather([h.data for h in homes], data, root)
        return self._start(homes, "gather", program, data.size, limit_s)

    def scatter(
        self, out: torch.Tensor, ins: Sequence[torch.Tensor], opts: Any, limit_s: float | None
    ) -> Issue:
        """`ins` at the root alone."""
        root = checks.root_of(opts, self._channel.size)
        if self._channel.rank == root:
            checks.count(ins, "inputs", self._channel.size)
            checks.one_dtype(out, *ins)
            checks.same_shape(out, ins[root])
        home = Home(out)
        program = moves.scatter(home.data, [source(t) for t in ins], root)
        return self._start([home], "scatter", program, home.data.size, limit_s)

    def all_to_all(
        self,
        outs: Sequence[torch.Tensor],
        ins: Sequence[torch.Tensor],
        opts: Any,
        limit_s: float | None,
    ) -> Issue:
        size, rank = self._channel.size, self._channel.rank
        checks.count(outs, "outputs", size)
        checks.count(ins, "inputs", size)
        checks.one_dtype(*outs, *ins)
        checks.same_shape(outs[rank], ins[rank])
        homes = [Home(t) for t in outs]
        data = [source(t) for t in ins]
        return self._exchanged(homes, [h.data for h in homes], data, limit_s)

    def all_to_all_whole(
        self,
        out: torch.Tensor,
        whole: torch.Tensor,
        out_rows: Sequence[int],
        in_rows: Sequence[int],
        opts: Any,
        limit_s: float | None,
    ) -> Issue:
        """Rows per rank, or none for even pieces."""
        size, rank = self._channel.size, self._channel.rank
        checks.one_dtype(out, whole)
        home = Home(out)
        outs = _rows(home.data, out, out_rows, size)
        ins = _rows(source(whole), whole, in_rows, size)
        if outs[rank].size != ins[rank].size:
            raise Refused(
                f"{ins[rank].size} bytes to ourselves do not fit the {outs[rank].size} bytes "
                "that we take from ourselves"
            )
        return self._exchanged([home], outs, ins, limit_s)

    def barrier(self, limit_s: float | None) -> Issue:
        nothing: Bytes = np.empty(0, dtype=np.uint8)
        return self._start([], "barrier", moves.exchange(nothing), 0, limit_s, Again(nothing))

    def send(self, tensor: torch.Tensor, target: int, tag: int, limit_s: float | None) -> Issue:
        checks.rank(target, self._channel.size)
        data = source(tensor)
        return partial(
            self._channel.issue_p2p,
            "send",
            target,
            checks.tag(tag),
            moves.send(data, target),
            nbytes=data.size,
            timeout_s=limit_s,
        )

    def recv(
        self, tensor: torch.Tensor, origin: int | None, tag: int, limit_s: float | None
    ) -> Issue:
        """From anybody, when `origin` is None."""
        number = -1 if origin is None else checks.rank(origin, self._channel.size)
        home = Home(tensor)
        issue = partial(
            self._channel.issue_p2p,
            "recv",
            number,
            checks.tag(tag),
            moves.recv(home.data, number),
            nbytes=home.data.size,
            timeout_s=limit_s,
        )
        return lambda: restored([home], issue())

    # -- helpers ----------------------------------------------------------------------------

    def _all_reduce_sparse(self, tensor: torch.Tensor, op: str, limit_s: float | None) -> Issue:
        sparse.check(tensor, op)
        mine = tensor.detach().coalesce()
        program = sparse.all_reduce(mine, op)
        name = arithmetic.signature("all_reduce_sparse", op, tensor.dtype)
        issue = self._start([], name, program, sparse.nbytes(mine), limit_s)
        return lambda: issue().then(lambda total: sparse.replace(tensor, total))

    def _scatter_reduced(
        self, out: torch.Tensor, ins: Sequence[Bytes], op: str, limit_s: float | None
    ) -> Issue:
        home = Home(out)
        program = reductions.reduce_scatter(home.data, ins, out.dtype, op)
        nbytes = sum(data.size for data in ins)
        name = arithmetic.signature("reduce_scatter", op, out.dtype)
        return self._start([home], name, program, nbytes, limit_s)

    def _gathered(
        self, homes: Sequence[Home], outs: Sequence[Bytes], mine: Bytes, limit_s: float | None
    ) -> Issue:
        program = moves.all_gather(outs, mine)
        return self._start(homes, "all_gather", program, mine.size, limit_s)

    def _exchanged(
        self,
        homes: Sequence[Home],
        outs: Sequence[Bytes],
        ins: Sequence[Bytes],
        limit_s: float | None,
    ) -> Issue:
        nbytes = sum(data.size for data in ins)
        return self._start(homes, "all_to_all", moves.all_to_all(outs, ins), nbytes, limit_s)

    def _start(
        self,
        homes: Sequence[Home],
        name: str,
        program: Program,
        nbytes: int,
        limit_s: float | None,
        again: Again | None = None,
    ) -> Issue:
        """What issues `program`, and brings its results to where they belong."""
        if self._mender is None:
            issue = partial(self._channel.issue, name, program, nbytes=nbytes, timeout_s=limit_s)
        else:
            issue = partial(
                self._mender.issue,
                self._channel,
                name,
                program,
                nbytes=nbytes,
                limit_s=limit_s,
                mode=self._on_loss,
                again=again,
            )
        return lambda: restored(homes, issue())


def _even(data: Bytes, count: int) -> list[Bytes]:
    step = data.size // count
    return [data[r * step : (r + 1) * step] for r in range(count)]


def _rows(data: Bytes, tensor: torch.Tensor, counts: Sequence[int], size: int) -> list[Bytes]:
    """One piece a rank along the first dimension: even ones, or `counts` rows each."""
    rows = tensor.shape[0] if tensor.ndim else 1
    if not counts:
        if rows % size:
            raise Refused(f"{rows} rows cannot be divided evenly between {size} ranks")
        return _even(data, size)
    if len(counts) != size or sum(counts) != rows or min(counts) < 0:
        raise Refused(f"splits {list(counts)} do not divide {rows} rows between {size} ranks")
    row = data.size // rows if rows else 0
    starts = [sum(counts[:i]) * row for i in range(size + 1)]
    return [data[starts[i] : starts[i + 1]] for i in range(size)]
