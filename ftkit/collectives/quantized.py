"""The quantized all-reduce: each value is rounded twice, whatever the number of ranks.

The vector is cut into one chunk a rank. Everybody codes its part of a chunk once and sends it
to the chunk's owner; the owner adds all parts in float32 in the order of the ranks (its own
part uncoded), codes the sum once, and sends those bytes to all; everybody, the owner too,
decodes the same bytes. So all ranks end with the same bits, and the error does not grow with
the world as it does where a ring codes anew at every hop.

    rank r   x ──code──► owner of the chunk:  Σ in rank order ──code──► all ──decode──► out
                   1st rounding                            2nd rounding

Per rank 2 (n - 1) / n coded copies of the vector go out and come in, as in a ring; messages
go directly, segment by segment, so that coding, sending and adding overlap.
"""

from collections.abc import Generator
from typing import TypeAlias

import numpy as np
import torch

from ftkit.collectives.arithmetic import Bytes, as_bytes, bounds
from ftkit.collectives.block_codec import BLOCK, Codec, codec_named, convert
from ftkit.collectives.channel import HasChannel
from ftkit.collectives.handle import Handle
from ftkit.collectives.link import Ticket
from ftkit.collectives.op import Op, Program, Wait

_PART, _RESULT = 0, 1

#: Values of one message: long enough that its frame is cheap, short enough to overlap.
_SEGMENT = 512 * BLOCK

#: Of error feedback: what is owed now, and where to write what will be owed.
Owed: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class ErrorFeedback:
    """What rounding has held back from one tensor's sums so far, to be added to the next.

    Each rank keeps what its own codings lost: of its parts, and, for the chunk it owns, of the
    sum. Nothing is lost for good, so over many steps the mean error goes to zero, however
    coarse the codec (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847). A rank that
    dies takes its share along: at most one rounding. One for each tensor; float32, as long as
    the tensor, twice while a reduction runs.
    """

    def __init__(self) -> None:
        self.residual: torch.Tensor | None = None
        """float32, flat; what is owed. None before the first reduction."""
        self._next: torch.Tensor | None = None

    def begin(self, count: int) -> Owed:
        """For the program: what is owed now, and where to write what will be owed."""
        if self.residual is None or self.residual.numel() != count:
            self.residual = torch.zeros(count)
        # New memory each time: an aborted program may hold on to the old.
        self._next = torch.empty(count)
        return self.residual, self._next

    def commit(self) -> None:
        """The reduction counts. Until then a retry begins from the same residual."""
        if self._next is not None:
            self.residual, self._next = self._next, None


def all_reduce_quantized(
    group: HasChannel,
    tensor: torch.Tensor,
    *,
    codec: str = "int8",
    op: str = "sum",
    feedback: ErrorFeedback | None = None,
    out: torch.Tensor | None = None,
    timeout_s: float | None = None,
) -> Handle[None]:
    """Sum a contiguous floating CPU tensor over all ranks, coded on the way. Does not block.

    The same bits on every rank. In a world of one nothing is coded and nothing rounded. What
    becomes of values that are not finite: see `block_codec`. Takes about three coded copies
    of the tensor for as long as it runs.

    Args:
      group: whose members take part; all call with the same shape, dtype, codec and op.
      tensor: any floating dtype and size. Read until the handle completes.
      codec: "int8", "fp8" or "bf16".
      op: "sum" or "avg".
      feedback: carries this rank's rounding errors from one call to the next; a reduction that
        fails leaves it as it was.
      out: where the result goes, same shape and dtype; `tensor` itself when None. After a
        failure its content is undefined; a `tensor` that is not `out` stays as it was.
      timeout_s: after it the generation is aborted; None waits for ever.

    Returns:
      A handle that completes when `out` is filled. Fails with GenerationAborted.

    Raises:
      ValueError: not a floating dtype, an unknown codec or op, or `out` is not alike.
    """
    out = tensor if out is None else out
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise ValueError(f"only float tensors of 16 bits or more are quantized, not {tensor.dtype}")
    if (out.shape, out.dtype) != (tensor.shape, tensor.dtype):
        raise ValueError("out must have the shape and dtype of tensor")
    if op not in ("sum", "avg"):
        raise ValueError(f"a quantized reduction is a sum or an avg, not {op!r}")
    nbytes = max(as_bytes(t).size for t in (tensor, out))  # refuses what is not dense
    program = reduce_quantized(
        tensor.detach().reshape(-1),
        out.detach().reshape(-1),
        codec_named(codec),
        mean=op == "avg",
        feedback=feedback,
    )
    handle = group.channel.issue(
        "all_reduce_quantized", program, nbytes=nbytes, timeout_s=timeout_s
    )
    return handle if feedback is None else handle.then(lambda _: feedback.commit())


def reduce_quantized(
    values: torch.Tensor,
    out: torch.Tensor,
    codec: Codec,
    *,
    mean: bool,
    feedback: ErrorFeedback | None,
) -> Program:
    """The program. `values` and `out` are flat, and may be the same memory.

    `feedback` is not committed: the caller does, once it knows that the reduction counts.
    """

    def program(op: Op) -> Generator[Wait, None, None]:
        if op.size == 1 or not values.numel():
            _alone(values, out, feedback)
            return
        limits = bounds(values.numel(), op.size)
        chunks = [slice(limits[r], limits[r + 1]) for r in range(op.size)]
        owed = None if feedback is None else feedback.begin(values.numel())
        others, mine = op.others(), chunks[op.rank]
        # All receives are posted before anything is sent, so that no link ever stalls.
        parts = {r: _Coded(codec, mine, _PART) for r in others}
        results = {r: _Coded(codec, chunks[r], _RESULT) for r in others}
        for rank in others:
            parts[rank].receive(op, rank)
            results[rank].receive(op, rank)

        sent: list[Ticket] = []
        going = {r: _Coded(codec, chunks[r], _PART) for r in others}
        for index in range(max((len(g) for g in going.values()), default=0)):
            for rank in others:
                if index < len(going[rank]):
                    segment, coded = going[rank][index]
                    exact = _owing(values[segment], owed, segment)
                    codec.encode(exact, coded)
                    _owe(owed, segment, exact, codec, coded)
                    sent.append(going[rank].send(op, rank, index))
            yield None

        total = _Coded(codec, mine, _RESULT)
        for index in range(len(total)):
            segment, coded = total[index]
            yield [parts[r].tickets[index] for r in others]
            acc = torch.empty(segment.stop - segment.start)
            own = _owing(values[segment], owed, segment)
            for rank in range(op.size):
                if rank != op.rank:
                    codec.decode(parts[rank][index][1], acc, add=rank > 0)
                elif rank:
                    np.add(acc.numpy(), own.numpy(), out=acc.numpy())
                else:
                    convert(own, acc)
            codec.encode(acc, coded)
            _owe(owed, segment, acc, codec, coded)
            sent += [total.send(op, rank, index) for rank in others]
            # Only now: in place, what is overwritten here was our own part of the sum.
            _settle(codec, coded, out[segment], op.size if mean else 1)
            yield None

        for index in range(max((len(g) for g in results.values()), default=0)):
            for rank in others:
                if index < len(results[rank]):
                    segment, coded = results[rank][index]
                    yield results[rank].tickets[index]
                    _settle(codec, coded, out[segment], op.size if mean else 1)
            yield None
        yield sent

    return program


class _Coded:
    """One chunk in coded form, a segment at a time."""

    def __init__(self, codec: Codec, chunk: slice, tag: int) -> None:
        self._segments = [
            slice(at, min(at + _SEGMENT, chunk.stop))
            for at in range(chunk.start, chunk.stop, _SEGMENT)
        ]
        sizes = [codec.nbytes(s.stop - s.start) for s in self._segments]
        # Whole segments are multiples of 4 bytes long, so each begins aligned.
        memory = torch.empty(sum(sizes), dtype=torch.uint8)
        self._coded = list(torch.split(memory, sizes)) if sizes else []
        self._tag = tag
        self.tickets: list[Ticket] = []

    def __len__(self) -> int:
        return len(self._segments)

    def __getitem__(self, index: int) -> tuple[slice, torch.Tensor]:
        return self._segments[index], self._coded[index]

    def receive(self, op: Op, source: int) -> None:
        self.tickets = [
            op.recv(source, _bytes(coded), tag=self._tag, part=index)
            for index, coded in enumerate(self._coded)
        ]

    def send(self, op: Op, target: int, index: int) -> Ticket:
        return op.send(target, _bytes(self._coded[index]), tag=self._tag, part=index)


def _bytes(coded: torch.Tensor) -> Bytes:
    flat: Bytes = coded.numpy()
    return flat


# On float32 numpy does the arithmetic: it stays on the communication thread (`arithmetic`).


def _alone(values: torch.Tensor, out: torch.Tensor, feedback: ErrorFeedback | None) -> None:
    """One rank: its values are the sum; what it still owes is paid at once."""
    if feedback is not None and feedback.residual is not None and values.numel():
        owed = feedback.begin(values.numel())
        convert(_owing(values, owed, slice(0, values.numel())), out)
        owed[1].zero_()
    elif out.data_ptr() != values.data_ptr():
        convert(values, out)


def _owing(values: torch.Tensor, owed: Owed | None, segment: slice) -> torch.Tensor:
    """What we mean to send: float32, with what was held back before."""
    exact = values
    if values.dtype != torch.float32:
        exact = torch.empty(values.numel())
        convert(values, exact)
    if owed is not None:
        exact = torch.from_numpy(np.add(exact.numpy(), owed[0][segment].numpy()))
    return exact


def _owe(
    owed: Owed | None, segment: slice, exact: torch.Tensor, codec: Codec, coded: torch.Tensor
) -> None:
    """Remember what the coding of `exact` held back."""
    if owed is None:
        return
    codec.decode(coded, owed[1][segment])
    held = owed[1][segment].numpy()
    np.subtract(exact.numpy(), held, out=held)
    # What was delivered as NaN or infinite is not owed; it would spoil every later sum.
    held[~np.isfinite(held)] = 0.0


def _settle(codec: Codec, coded: torch.Tensor, out: torch.Tensor, ranks: int) -> None:
    """Decode the sum, or the mean of `ranks`, into `out`: the same operations on every rank."""
    total = out if out.dtype == torch.float32 else torch.empty(out.numel())
    codec.decode(coded, total)
    if ranks > 1:
        np.divide(total.numpy(), np.float32(ranks), out=total.numpy())
    if total is not out:
        convert(total, out)
