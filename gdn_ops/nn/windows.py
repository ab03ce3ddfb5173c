"""Convolve sequences behind their past inputs, in operations that autograd and compilers see.

A window is a row of inputs, the k − 1 before the first token in front.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn_ops.nn.blocks import runs_in_blocks
from gdn_ops.nn.causal import causal_convolution, convolved_window


def advance(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    *,
    silu: bool,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolve whole sequences or the next tokens.

    Args:
        x: (B, T, D).
        weight: (D, k), its last column being of the token itself.
        bias: (D,) or None.
        state: (N, D, k − 1), the inputs before x, latest last; or None for zeros.
        silu: whether y = silu(p), else y = p.
        lengths: (B,) number of tokens of each row, what follows them being padding; or None.
        cu_seqlens: (N+1,) boundaries of sequences packed along T with B = 1, or None.

    Returns:
        y like x, and the state after the last token of every sequence, in the dtype of x.
    """
    reach = weight.shape[1] - 1
    if state is None:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = x.new_zeros((sequences, x.shape[2], reach))
    past = state.mT.to(x.dtype)
    if cu_seqlens is not None:
        return _packed(x, weight, bias, past, cu_seqlens, silu)
    tokens = x.shape[1]
    window = torch.cat([past, x], 1)
    if lengths is None:
        last = window[:, tokens:]
    else:
        # The token at index i of a row stands at i + reach of its window.
        index = lengths[:, None] + torch.arange(reach, device=x.device)
        last = window.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    # A copy: a view would keep the whole window alive.
    return _convolved(window, weight, bias, silu), last.mT.contiguous()


def _convolved(window: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Convolve (B, reach + T, D) to (B, T, D)."""
    reach = weight.shape[1] - 1
    if window.shape[1] > reach + 1 and runs_in_blocks(window):
        return causal_convolution(window, weight, bias, silu=silu)[:, reach:]
    return convolved_window(window, weight, bias, silu=silu)


def _packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor,
    cu_seqlens: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Convolve packed sequences as one long row, each behind its own past inputs (N, reach, D)."""
    sequences, reach, channels = past.shape
    cuts = cu_seqlens.long()
    token, sequence, step = (
        torch.arange(count, device=cuts.device) for count in (x.shape[1], sequences, reach)
    )
    own = torch.searchsorted(cuts[1:].contiguous(), token, right=True)
    # Indices into the row: (N, reach) of what precedes a sequence, (T,) of the tokens, and
    # (N, reach) of the last inputs of each sequence, its past included.
    past_slots = (cuts[:-1] + sequence * reach)[:, None] + step
    token_slots = token + (own + 1) * reach
    last_slots = (cuts[1:] + sequence * reach)[:, None] + step
    window = x.new_zeros(x.shape[1] + past_slots.numel(), channels)
    window = window.index_copy(0, past_slots.flatten(), past.flatten(0, 1))
    window = window.index_copy(0, token_slots, x[0])
    y = _convolved(window.unsqueeze(0), weight, bias, silu)[:, token_slots - reach]
    return y, window[last_slots].mT.contiguous()
