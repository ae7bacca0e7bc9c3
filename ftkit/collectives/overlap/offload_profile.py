"""Profile: which of what a block saves belongs to which tokens, and what it costs to keep or recompute.

The block is run a few times, and nothing of it kept: over all tokens, and over some. Where a saved
tensor is shorter the second time, there are its tokens; where its rows have the same bits, they may be
computed again alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ftkit.collectives.overlap.offload_plan import BlockCosts, best_fraction, split_at
from ftkit.collectives.overlap.offload_trace import (
    Block,
    BlockTrace,
    Cut,
    Key,
    input_rows,
    nbytes_of,
    trace_block,
    worth_sending,
)
from ftkit.core.errors import UsageError

Tensor = torch.Tensor
Fraction: TypeAlias = float | Literal["auto"]

#: How far a token's result may be off when it is computed without the others, of the largest.
_ROUNDING = 0.02

_MEET = (
    "tokens computed alone come out otherwise: they meet in this block outside of "
    "scaled_dot_product_attention, or it draws random numbers (dropout); offload a block that does neither"
)


@dataclass(frozen=True, slots=True)
class BlockProfile:
    """What was found out about a block and a shape of its input."""

    cuts: dict[Key, Cut | None]
    """Of each tensor saved; None: it stays where it is."""
    rows: int
    """Tokens whose activations go to the host."""
    tokens: int
    exact: bool
    """Whether recomputed rows have the same bits."""
    costs: BlockCosts


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiler:
    """Profiles blocks."""

    fraction: Fraction
    dim: int
    exact: bool
    host_bytes: int | None
    clock: Callable[[], float]
    rate: Callable[[Tensor], float]
    """Bytes a second to the host, measured with a tensor."""

    def profile(self, block: Block, inputs: Sequence[Tensor]) -> BlockProfile:
        """Run the block a few times. Blocks."""
        tokens = inputs[0].shape[self.dim]
        if any(x.shape[self.dim] != tokens for x in inputs):
            found = [x.shape[self.dim] for x in inputs]
            raise UsageError(
                f"inputs have {found} tokens in dimension {self.dim}: all need the same number there"
            )
        whole = trace_block(block, inputs, clock=self.clock)
        cuts, recompute_s = dict[Key, Cut | None](), 0.0
        if tokens > 1:
            first = split_at(0.5, tokens) or tokens // 2
            part = trace_block(
                block, self._from(inputs, first), whole.outputs, first, clock=self.clock
            )
            outer = inputs[0].shape[: self.dim].numel()
            cuts = _cuts(whole, part, tokens, first, outer)
            _check_rows(whole, part, self.dim, first)
            recompute_s = part.seconds * tokens / (tokens - first)
        costs = self._costs(block, inputs, whole, cuts, recompute_s)
        if self.fraction == "auto":
            fraction = best_fraction(costs, host_bytes=self.host_bytes)
        else:
            fraction = self.fraction
        rows = split_at(fraction, tokens) if cuts else tokens
        exact = rows == tokens or self._same(block, inputs, cuts, rows, bits=True)
        if not exact and not self.exact:
            if not self._same(block, inputs, cuts, rows, bits=False):
                raise UsageError(_MEET)
        elif not exact:
            # All or nothing, then: of whole matrices the bits are the same.
            none = self.fraction == "auto" and costs.added_s(0.0) < costs.added_s(1.0)
            exact = none and self._same(block, inputs, cuts, 0, bits=True)
            rows, exact = (0, True) if exact else (tokens, True)
        return BlockProfile(cuts, rows, tokens, exact, costs)

    def _costs(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        whole: BlockTrace,
        cuts: Mapping[Key, Cut | None],
        recompute_s: float,
    ) -> BlockCosts:
        rate = compute_s = 0.0
        if self.fraction == "auto":
            # Once more: the first one was to warm up.
            compute_s = trace_block(block, inputs, clock=self.clock).seconds
            rate = self.rate(inputs[0].detach())
        kept = [*inputs, *whole.outputs]
        return BlockCosts(
            tokens=inputs[0].shape[self.dim],
            row_bytes=sum(whole.seen[key].nbytes for key, cut in cuts.items() if cut),
            always_bytes=whole.attention_bytes + sum(nbytes_of(x.shape, x.dtype) for x in kept),
            compute_s=compute_s,
            recompute_s=recompute_s,
            copy_rate=rate,
        )

    def _same(
        self,
        block: Block,
        inputs: Sequence[Tensor],
        cuts: Mapping[Key, Cut | None],
        rows: int,
        *,
        bits: bool,
    ) -> bool:
        """Whether the rows after the first `rows` come out the same alone; to the bit, or about."""
        whole = trace_block(block, inputs, clock=self.clock, cuts=cuts, marked=rows)
        part = trace_block(
            block, self._from(inputs, rows), whole.outputs, rows, clock=self.clock, cuts=cuts
        )
        for key, seen in whole.seen.items():
            a, b = seen.mark, part.seen[key].mark
            if a is None or b is None:
                continue
            if bits and not (torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])):
                return False
            if not bits and not bool((a[1] - b[1]).abs() <= 1e-3 * a[2]):
                return False
        return True

    def _from(self, inputs: Sequence[Tensor], first: int) -> list[Tensor]:
        return [input_rows(x, self.dim, first, grad=x.requires_grad) for x in inputs]


def _cuts(
    whole: BlockTrace, part: BlockTrace, tokens: int, first: int, outer: int
) -> dict[Key, Cut | None]:
    """How each saved tensor is cut: by the dimension that is shorter where there are fewer tokens."""
    if whole.seen.keys() != part.seen.keys():
        raise UsageError(
            f"a block saves {len(whole.seen)} tensors for {tokens} tokens and {len(part.seen)} for "
            f"{tokens - first}: it must do the same however many there are"
        )
    cuts = dict[Key, Cut | None]()
    for key, a in whole.seen.items():
        b = part.seen[key]
        differ = [d for d, (x, y) in enumerate(zip(a.shape, b.shape, strict=False)) if x != y]
        if not differ:
            cuts[key] = None
            continue
        dim = differ[0]
        times = a.shape[dim] // tokens
        if len(differ) > 1 or (a.shape[dim], b.shape[dim]) != (
            times * tokens,
            times * (tokens - first),
        ):
            raise UsageError(
                f"a block saves a tensor of shape {a.shape} for {tokens} tokens and {b.shape} for "
                f"{tokens - first}: where its tokens are cannot be told"
            )
        if isinstance(key, tuple):
            cut = Cut(dim)
        elif times % outer == 0:
            cut = Cut(dim, outer, times // outer)
        else:
            cut = Cut(dim, 1, times)
        cuts[key] = cut if worth_sending(a) else None
    return cuts


def _check_rows(whole: BlockTrace, part: BlockTrace, dim: int, first: int) -> None:
    """Raise UsageError unless a token's result does not depend on the others'."""
    rows = whole.result.narrow(dim, first, whole.result.shape[dim] - first)
    wide, alone = rows.double().nan_to_num(), part.result.double().nan_to_num()
    if not bool((wide - alone).abs().max() <= _ROUNDING * wide.abs().max()):
        raise UsageError(_MEET)
