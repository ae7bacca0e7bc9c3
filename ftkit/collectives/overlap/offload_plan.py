"""How many token rows of a block's activations go to the host, and how many are recomputed. Pure.

MEMO (SIGMOD'25): nearly everything in a transformer block is computed token by token, so backward may
take some tokens' activations from the host and compute those of the others again. Of a fraction f of
the tokens

    copied    always + f rows         bytes, which hide behind the block's forward: rate * compute_s
    recomputed        (1 - f)         of a forward, which nothing hides

Backward takes about twice as long as forward, so what was hidden there is hidden on its way back.
"""

from dataclasses import dataclass

#: Tokens are divided at multiples of this, where kernels begin a tile anyway.
ALIGN = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCosts:
    """What was measured of one block and one shape of its input."""

    tokens: int
    row_bytes: int
    """Of all tokens, what can be recomputed."""
    always_bytes: int
    """What is copied whatever the fraction is: the input, and what attention saves."""
    compute_s: float
    """Of the block's forward."""
    recompute_s: float
    """Of all tokens' forward without attention."""
    copy_rate: float
    """Bytes a second to the host."""

    def copied(self, fraction: float) -> float:
        """Bytes that go to the host."""
        return self.always_bytes + fraction * self.row_bytes

    def added_s(self, fraction: float) -> float:
        """By how much a step grows: what is recomputed, and what of the copy is not hidden."""
        copy_s = self.copied(fraction) / self.copy_rate if self.copy_rate else float("inf")
        if not self.copied(fraction):
            copy_s = 0.0
        return max(0.0, copy_s - self.compute_s) + (1 - fraction) * self.recompute_s


def best_fraction(costs: BlockCosts, *, host_bytes: int | None = None) -> float:
    """The fraction in [0, 1] that adds least to a step; of equal ones the smallest.

    The cost is piecewise linear, so it is one of: nothing copied, as much as hides, as much as the
    host has room for, all. More than what hides is copied only where recomputing takes longer still.

    Args:
      costs: as measured.
      host_bytes: room on the host for this block; None for as much as it takes.
    """
    most = 1.0
    if host_bytes is not None and costs.row_bytes:
        most = min(1.0, max(0.0, (host_bytes - costs.always_bytes) / costs.row_bytes))
    corners = {0.0, most}
    if costs.row_bytes:
        hidden = (costs.copy_rate * costs.compute_s - costs.always_bytes) / costs.row_bytes
        corners.add(min(most, max(0.0, hidden)))
    return min(sorted(corners), key=costs.added_s)


def split_at(fraction: float, tokens: int, align: int = ALIGN) -> int:
    """How many of the first tokens go to the host: never more than the fraction says, aligned."""
    rows = min(tokens, int(fraction * tokens + 1e-9))
    return rows if rows == tokens else rows // align * align
