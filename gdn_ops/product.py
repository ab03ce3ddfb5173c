"""Run products of several factors per token, lowered onto the op over whole sequences."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.pointers import MEANT, unknown_option
from gdn_ops.ops import gated_delta
from gdn_ops.spec.errors import SpecError, SpecTypeError

NAME = "gated_delta_product"


def gated_delta_product(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None, *,
    num_householder: int, log_alpha: Tensor | None = None, erase: Tensor | None = None,
    write: Tensor | None = None, cu_seqlens: Tensor | None = None, return_state: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Run the gated delta rule with n writes per token: a product of n generalised Householders.

        S' = alpha_t S_{t-1}
        S' ← S' + beta_tj k_tj (v_tj - S'^T k_tj)^T,   j = 1, ..., n
        S_t = S',   o_t = scale S_t^T q_t

    It is `gated_delta` over n T micro-steps: only the first one of a token decays, and q is read
    behind the last one. It runs on every backend that runs such a call, with its gradients.

    Args:
        q: (B, T, H, K), queries.
        k: (B, n T, H, K), keys: the n factors of a token stand behind one another. Dtype of q.
        v: (B, n T, HV, V), values. Dtype of q.
        alpha, log_alpha: (B, T, HV), or (B, T, HV, K), the decay of a token, as in `gated_delta`.
        beta, erase, write: over the n T micro-steps of k and v, as in `gated_delta`.
        num_householder: n, how many factors a token has.
        cu_seqlens: (N+1,), boundaries of N sequences packed along T, counted in tokens of q.
        return_state: whether to return the final state too.
        options: rule ("gated_delta", or "delta" for no decay), scale, qk_l2norm, initial_state,
            chunk_size (in micro-steps) and backend, as in `gated_delta`.

    Returns:
        o (B, T, HV, V), or (o, final_state) with return_state=True. final_state is (N, HV, K, V),
        float32 (float64 for float64 inputs).

    Raises:
        SpecError: an argument breaks the specification of `gated_delta`, or k has not n T tokens.
        BackendUnsupportedError: the backend, or every backend, has a reason not to run it.

    Source:
        Siems et al.: DeltaProduct, arXiv 2502.10297

    Example:
        >>> import torch
        >>> from gdn_ops import gated_delta_product
        >>> q, k, v = torch.randn(1, 5, 2, 8), torch.randn(1, 10, 2, 8), torch.randn(1, 10, 2, 4)
        >>> alpha, beta = torch.rand(1, 5, 2), 2 * torch.rand(1, 10, 2)
        >>> gated_delta_product(q, k, v, alpha, beta, num_householder=2, qk_l2norm=True).shape
        torch.Size([1, 5, 2, 4])
    """
    _check_options(options)
    n = _factors(q, k, num_householder)
    options |= {"erase": erase, "write": write, "return_state": True}
    options |= {"q": _at_micro_step(q, n, n - 1, 0.0), "alpha": _at_micro_step(alpha, n, 0, 1.0)}
    options |= {"log_alpha": _at_micro_step(log_alpha, n, 0, 0.0)}
    options |= {"cu_seqlens": cu_seqlens * n if isinstance(cu_seqlens, Tensor) else cu_seqlens}
    o, state = gated_delta(k=k, v=v, beta=beta, **options)
    o = o[:, n - 1 :: n]
    return (o, state) if return_state else o


_OPTIONS = ("rule", "scale", "qk_l2norm", "initial_state", "chunk_size", "backend")


def _check_options(options: dict[str, Any]) -> None:
    """Check the names of the options, and that the rule has an error term."""
    for name in options:
        if name not in _OPTIONS:
            own = [*inspect.signature(gated_delta_product).parameters][:-1]
            raise SpecTypeError(unknown_option(NAME, name, [*own, *_OPTIONS], MEANT))
    rule = options.get("rule", "gated_delta")
    if rule not in ("gated_delta", "delta"):
        raise SpecError(f"{NAME}: rule is {rule!r}, should be one of gated_delta, delta")


def _factors(q: Tensor, k: Tensor, count: int) -> int:
    """Return the number of factors of a token, for which k must have tokens."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise SpecTypeError(
            f"{NAME}: num_householder has type {type(count).__name__}, should be a positive integer"
        )
    if count < 1:
        raise SpecError(f"{NAME}: num_householder is {count}, should be a positive integer")
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise SpecTypeError(
                f"{NAME}: {name} has type {type(x).__name__}, should be a torch.Tensor"
            )
        if x.dim() != 4:
            raise SpecError(
                f"{NAME}: {name} has shape {tuple(x.shape)}, should have 4 dimensions, "
                f"not {x.dim()}"
            )
    if k.shape[1] != count * q.shape[1]:
        raise SpecError(
            f"{NAME}: k has {k.shape[1]} tokens, should have {count * q.shape[1]}: "
            f"{count} factors for each of the {q.shape[1]} tokens of q"
        )
    return count


def _at_micro_step(x: Tensor | None, n: int, place: int, other: float) -> Tensor | None:
    """Return tokens (B, T, ...) as (B, n T, ...), the rest of a token filled with a number."""
    if x is None or n == 1 or not isinstance(x, Tensor) or x.dim() < 2:
        return x
    fill = torch.full_like(x, other)
    steps = [x if j == place else fill for j in range(n)]
    return torch.stack(steps, 2).flatten(1, 2)
