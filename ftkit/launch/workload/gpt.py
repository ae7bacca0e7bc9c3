"""A small byte-level GPT in plain torch, the same bits on every CPU process that builds it.

Shape suffixes: B samples of a slot, T positions, C width, H heads, D width of a head,
V the 256 values of a byte.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """The shape of one model."""

    width: int = 96
    """Features of a position, a multiple of `heads`."""
    depth: int = 2
    """Transformer blocks."""
    heads: int = 4
    """Attention heads of a block."""
    context: int = 64
    """Positions the model can look back over, in bytes."""
    dropout: float = 0.0
    """Probability of dropping a feature while training; 0 draws no random numbers at all."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} does not divide into {self.heads} heads; "
                f"choose a multiple of {self.heads}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is a probability below 1, got {self.dropout}")


#: Models of a known size for benchmarks; the name is the number of parameters.
PRESETS: dict[str, GPTConfig] = {
    "4m": GPTConfig(width=256, depth=5, heads=4),
    "25m": GPTConfig(width=512, depth=8, heads=8),
}


class GPT(nn.Module):
    """Predicts the next byte. Pre-norm blocks; the embedding is the output matrix too."""

    def __init__(self, config: GPTConfig, *, seed: int) -> None:
        """Build the model on the CPU in float32.

        The parameters depend on `config` and `seed` alone: they are drawn from a generator
        of their own, so the global random state is neither read nor moved, and every rank
        and every respawned rank starts from the same bits.
        """
        super().__init__()
        self.config = config
        # torch's layers draw their own first values from the global state; ours replace them.
        with torch.random.fork_rng(devices=[]):
            self.token = nn.Embedding(BYTES, config.width)
            self.position = nn.Embedding(config.context, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
            self.norm = nn.LayerNorm(config.width)
            self.drop = nn.Dropout(config.dropout)
        self._draw(seed)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Score the byte after each position.

        Args:
          tokens_BT: int64, shape (B, T) with T at most `context`, values 0..255.

        Returns:
          float32 logits, shape (B, T, 256), newly allocated.
        """
        length = tokens_BT.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} positions, the model's context is {self.config.context}")
        places_T = torch.arange(length, device=tokens_BT.device)
        hidden_BTC = self.drop(self.token(tokens_BT) + self.position(places_T))
        for block in self.blocks:
            hidden_BTC = block(hidden_BTC)
        return functional.linear(self.norm(hidden_BTC), self.token.weight)

    def _draw(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        # Two residual branches a block: scaling their last layers keeps the variance of the
        # residual stream at 1 whatever the depth (GPT-2).
        residual_std = 0.02 / (2 * self.config.depth) ** 0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
                elif "norm" in name:
                    parameter.fill_(1.0)
                else:
                    std = residual_std if name.endswith("out.weight") else 0.02
                    parameter.normal_(0.0, std, generator=generator)


class Block(nn.Module):
    """Causal attention, then a feed-forward layer, each added to what came in."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention_in = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.feed_norm = nn.LayerNorm(config.width)
        self.feed_in = nn.Linear(config.width, 4 * config.width)
        self.feed_out = nn.Linear(4 * config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, hidden_BTC: Tensor) -> Tensor:
        """Map float32 (B, T, C) to the same shape, newly allocated."""
        hidden_BTC = hidden_BTC + self.drop(self._attend(self.attention_norm(hidden_BTC)))
        wide = functional.gelu(self.feed_in(self.feed_norm(hidden_BTC)))
        fed: Tensor = hidden_BTC + self.drop(self.feed_out(wide))
        return fed

    def _attend(self, hidden_BTC: Tensor) -> Tensor:
        B, T, C = hidden_BTC.shape
        split = self.attention_in(hidden_BTC).view(B, T, 3, self.heads, C // self.heads)
        query_BHTD, key_BHTD, value_BHTD = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTD = functional.scaled_dot_product_attention(
            query_BHTD, key_BHTD, value_BHTD, is_causal=True
        )
        mixed: Tensor = self.attention_out(mixed_BHTD.transpose(1, 2).reshape(B, T, C))
        return mixed


def next_byte_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy in nats over the B * T predictions; a float32 scalar."""
    return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def parameters_digest(model: nn.Module) -> str:
    """SHA-256 (hex) of every parameter's name, dtype, shape and bytes, in order of names.

    Two models have the same digest exactly when their parameters are equal bit for bit
    (0.0 and -0.0 differ). Copies one parameter at a time to host memory; blocks.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()
