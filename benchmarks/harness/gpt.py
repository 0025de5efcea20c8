"""The small pre-norm transformer of the benchmarks: characters in, logits of the next one out."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), causal: (batch, tokens, width) → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Tokens (batch, tokens) → logits (batch, tokens, vocabulary).

    Args:
        depth: layers. width: channels. heads: of the attention; by default of 64 channels each.
        vocabulary: how many tokens there are.
        length: the most tokens, each of whose places is embedded; None: places are not embedded.
    """

    def __init__(
        self, depth: int, width: int = 256, heads: int | None = None, vocabulary: int = 256, length: int | None = None
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.places = None if length is None else nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads or width // 64) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.places is not None:
            x = x + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.layers(x)))
