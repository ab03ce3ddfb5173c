"""Run the rule of a layer on tokens, in one call of an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gdn_ops.ops import gated_delta, gated_delta_step


def run_rule(
    tokens: Mapping[str, Tensor | None],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run `gated_delta`, or `gated_delta_step` for one token that is neither packed nor chunked.

    Args:
        tokens: q, k, v and the gates by their names in `gated_delta`, each (B, T, ...) or None.
        state: (N, HV, K, V), or None for zeros.
        cu_seqlens, chunk_size: of `gated_delta`.
        options: of both functions.

    Returns:
        o (B, T, HV, V) and the final state.
    """
    sequence: Callable[..., tuple[Tensor, Tensor]] = gated_delta
    step: Callable[..., tuple[Tensor, Tensor]] = gated_delta_step
    q = tokens["q"]
    is_token = q is not None and q.dim() == 4 and q.shape[1] == 1
    if is_token and cu_seqlens is None and chunk_size is None:
        one = {name: None if x is None else x.squeeze(1) for name, x in tokens.items()}
        o, final = step(**one, state=state, **options)
        return o.unsqueeze(1), final
    packing = {"cu_seqlens": cu_seqlens, "chunk_size": chunk_size}
    return sequence(**tokens, initial_state=state, return_state=True, **packing, **options)
