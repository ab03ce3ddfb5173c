"""Apply full causal softmax attention by torch's own kernel, with a cache that is written in place.

y_t = W Σ_j softmax_j(q_tᵀ k_j / √D) v_j,   j ≤ t,   q, k rotated by their positions

It is the other side of every comparison, so it does nothing that attention does not need: a prefill
keeps the keys and values that it computed anyway, a token writes its own and copies no others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gdn_ops.nn.attention import rotate


class KeyValueCache(NamedTuple):
    """Hold keys and values of a text.

    Attributes:
        keys: (B, heads, capacity, D), rotated by their positions.
        values: (B, heads, capacity, D).
        tokens: how many of them are of tokens; the others are free.
    """

    keys: Tensor
    values: Tensor
    tokens: int


class FullAttention(nn.Module):
    """Apply multi-head attention to all earlier tokens, the token itself included.

    Args:
        hidden_size: width of the input and output.
        num_heads: heads; each is hidden_size / num_heads wide, an even number.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.head_dim = hidden_size // num_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size, bias=False, device=device, dtype=dtype)
            for _ in range(4)
        )

    def forward(
        self, x: Tensor, state: KeyValueCache | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        """Attend within whole sequences, or continue one by a token.

        Args:
            x: (B, T, hidden_size); T = 1 with a state.
            state: with room for one token more, which is written into it.

        Returns:
            y like x, and the cache after the last token.
        """
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        past = 0 if state is None else state.tokens
        positions = torch.arange(past, past + x.shape[1], device=x.device)
        q, k = rotate(q, positions), rotate(k, positions)
        attention = functional.scaled_dot_product_attention
        if state is None:
            o, after = attention(q, k, v, is_causal=True), KeyValueCache(k, v, x.shape[1])
        else:
            after = KeyValueCache(state.keys, state.values, past + 1)
            after.keys[:, :, past : past + 1] = k
            after.values[:, :, past : past + 1] = v
            o = attention(q, after.keys[:, :, : past + 1], after.values[:, :, : past + 1])
        y: Tensor = self.o_proj(o.transpose(1, 2).flatten(-2))
        return y, after

    def empty_cache(self, rows: int, capacity: int) -> KeyValueCache:
        """Return a cache with room for `capacity` tokens, and none in it."""
        like = self.k_proj.weight
        shape = (rows, self.num_heads, capacity, self.head_dim)
        keys, values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        return KeyValueCache(keys, values, 0)
