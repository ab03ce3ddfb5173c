"""Provide flash-linear-attention's functions of the gated delta rule, computed by gdn_ops.

    import gdn_ops.compat.fla as fla_ops

is the whole migration: names, defaults and returns are those of `fla.ops.gated_delta_rule`. What
gdn_ops cannot do raises by name; no argument is dropped. Arguments that only tell FLA's kernels
how to work, `cu_seqlens_cpu` and `chunk_indices`, are accepted beside `cu_seqlens` and not needed.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.pointers import unknown_option
from gdn_ops.compat.fla_arguments import (
    OLDER_NAMES,
    check_gate_parameter,
    check_kinds,
    check_packing,
    check_switches,
    promoted,
)
from gdn_ops.compat.states import check_state
from gdn_ops.nn.gated_delta_net import run_rule
from gdn_ops.nn.gates import gate
from gdn_ops.spec.errors import SpecError, SpecTypeError

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
]


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the gated delta rule over whole sequences, as FLA's function of this name.

    Args:
        q, k: (B, T, H, K).
        v: (B, T, HV, V).
        g: (B, T, HV) log α, or with `use_gate_in_kernel` what the gate is made from.
        beta: (B, T, HV), or with `use_beta_sigmoid_in_kernel` its logits.
        scale: factor on q; K**-0.5 when not given.
        initial_state: (N, HV, K, V), or (N, HV, V, K) with `state_v_first`.
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: whether to normalise q and k.
        use_beta_sigmoid_in_kernel: whether β is sigmoid(beta).
        allow_neg_eigval: whether β is 2 sigmoid(beta) then.
        state_v_first: whether states are (N, HV, V, K).
        cu_seqlens: (N+1,) boundaries of packed sequences.
        cu_seqlens_cpu, chunk_indices: not needed.
        cp_context: not supported.
        kwargs: `use_gate_in_kernel` (g is then raw, and log α = −exp(A_log) softplus(g + dt_bias)),
            `A_log` and `dt_bias` (HV,), `chunk_size`, and the older name `transpose_state_layout`
            of `state_v_first`.

    Returns:
        o (B, T, HV, V) in the dtype of v, and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops, or is not supported.
    """
    name = "chunk_gated_delta_rule"
    _refuse(name, {"cp_context": cp_context}, "context parallelism over devices is not supported")
    check_packing(name, cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu, chunk_indices=chunk_indices)
    chunk_size = kwargs.pop("chunk_size", None)
    use_gate_in_kernel, A_log, dt_bias = (
        kwargs.pop(key, None) for key in ("use_gate_in_kernel", "A_log", "dt_bias")
    )
    is_v_first = _v_first(name, state_v_first, kwargs)
    check_kinds(name, locals())
    log_alpha = _log_alpha(name, g, use_gate_in_kernel, A_log, dt_bias)
    strength = _beta(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "beta": strength}
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel), "chunk_size": chunk_size}
    return _run(name, tokens, initial_state, output_final_state, is_v_first, cu_seqlens, options)


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run the gated delta rule, as FLA's function of this name; it has gradients here.

    Args:
        q, k, v, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel: as in
            `chunk_gated_delta_rule`; one token is a single step.
        g: (B, T, HV), or None for no decay.
        gk, gv: not supported: a decay per channel.
        beta: (B, T, HV), or None for 1.
        use_gate_in_kernel, A_log, dt_bias: as in `chunk_gated_delta_rule`.
        use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first, cu_seqlens: likewise.
        kwargs: `transpose_state_layout`, the older name of `state_v_first`.

    Returns:
        o (B, T, HV, V), and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops, or is not supported.
    """
    name = "fused_recurrent_gated_delta_rule"
    why = "a decay per channel is not supported; g is one decay per head"
    if isinstance(gk, Tensor) and gk.dim() == 3:
        why = "it looks like beta, which older versions of FLA have in this place; pass it by name"
    _refuse(name, {"gk": gk, "gv": gv}, why)
    is_v_first = _v_first(name, state_v_first, kwargs)
    check_kinds(name, locals())
    log_alpha = _log_alpha(name, g, use_gate_in_kernel, A_log, dt_bias)
    strength = _beta(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "beta": strength}
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel)}
    return _run(name, tokens, initial_state, output_final_state, is_v_first, cu_seqlens, options)


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def _refuse(name: str, given: Mapping[str, Any], why: str) -> None:
    """Refuse arguments that are not supported, where they are given."""
    for argument, value in given.items():
        if value is not None:
            raise SpecError(f"{name}: {argument} is given, should be None: {why}")


def _v_first(name: str, state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """Return whether states are V-first, by either name of the keyword; refuse any other one."""
    if "transpose_state_layout" in kwargs:
        if state_v_first:
            raise SpecError(
                f"{name}: state_v_first and transpose_state_layout are both given, should be "
                f"state_v_first: the other is its older name"
            )
        warnings.warn(
            f"{name}: transpose_state_layout is the older name of state_v_first",
            DeprecationWarning,
            stacklevel=3,
        )
        state_v_first = kwargs.pop("transpose_state_layout")
    head_first = kwargs.pop("head_first", False)
    check_switches(name, state_v_first=state_v_first, head_first=head_first)
    if head_first:
        raise SpecError(
            f"{name}: head_first is True, should be False: tokens come before heads, "
            f"(B, T, H, K); q.transpose(1, 2) turns (B, H, T, K)"
        )
    for other in kwargs:
        known = inspect.signature(globals()[name]).parameters
        raise SpecTypeError(unknown_option(name, other, [*known][:-1], OLDER_NAMES))
    return bool(state_v_first)


def _run(
    name: str,
    tokens: dict[str, Any],
    state: Tensor | None,
    is_returned: bool,
    is_v_first: bool,
    cu_seqlens: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Run a call of either function, whose states may be V-first."""
    tokens, dtype = promoted(tokens)
    q, v, log_alpha, beta = (tokens[key] for key in ("q", "v", "log_alpha", "beta"))
    if beta is not None and beta.dim() == v.dim() == 4:
        raise SpecError(
            f"{name}: beta has shape {tuple(beta.shape)}, should be (B, T, HV) = "
            f"{tuple(v.shape[:3])}: a write strength per channel is not supported"
        )
    if state is not None and is_v_first and state.dim() != 4:
        raise SpecError(
            f"{name}: initial_state has shape {tuple(state.shape)}, should be (N, HV, V, K): "
            f"4 dimensions, not {state.dim()}"
        )
    if state is not None and q.dim() == v.dim() == 4:
        is_packed = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1
        rows = cu_seqlens.shape[0] - 1 if is_packed else q.shape[0]  # type: ignore[union-attr]
        shape = (rows, v.shape[2], q.shape[3], v.shape[3])
        if not is_v_first:
            check_state(name, "initial_state", state, shape)
        elif tuple(state.mT.shape) != shape:
            raise SpecError(
                f"{name}: initial_state has shape {tuple(state.shape)}, should be (N, HV, V, K) = "
                f"{(*shape[:2], shape[3], shape[2])}"
            )
    state = state.mT.contiguous() if state is not None and is_v_first else state
    if state is not None and state.is_floating_point():
        # FLA keeps states in float32, whatever the dtype of the one that it is given.
        state = state.to(torch.promote_types(q.dtype, torch.float32))
    rule = "delta" if log_alpha is None else "gated_delta"
    try:
        o, final = run_rule(tokens, state, cu_seqlens, rule=rule, **options)
    except SpecError as error:
        _explain(name, log_alpha, error)
        raise
    o = o.to(dtype)
    if not is_returned:
        return o, None
    return o, final.mT.contiguous() if is_v_first else final


def _log_alpha(
    name: str,
    g: Tensor | None,
    in_kernel: bool | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> Tensor | None:
    if not in_kernel:
        why = "it takes effect with use_gate_in_kernel=True only"
        _refuse(name, {"A_log": A_log, "dt_bias": dt_bias}, why)
        return g
    for argument, value in (("g", g), ("A_log", A_log)):
        if value is None:
            raise SpecError(
                f"{name}: {argument} is None, should be a torch.Tensor: use_gate_in_kernel is True"
            )
    for argument, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if value is not None:
            check_gate_parameter(name, argument, value, g)  # type: ignore[arg-type]
    return gate(g, A_log, dt_bias)  # type: ignore[arg-type]


def _beta(name: str, beta: Tensor | None, in_kernel: bool, allow_neg: bool) -> Tensor | None:
    if not in_kernel:
        if allow_neg:
            raise SpecError(
                f"{name}: allow_neg_eigval is True, should be False: it takes effect with "
                f"use_beta_sigmoid_in_kernel=True only"
            )
        return beta
    if beta is None:
        raise SpecError(
            f"{name}: beta is None, should be a torch.Tensor: use_beta_sigmoid_in_kernel is True"
        )
    strength = beta.float().sigmoid() if beta.dtype != torch.float64 else beta.sigmoid()
    return 2.0 * strength if allow_neg else strength


def _explain(name: str, log_alpha: Tensor | None, error: SpecError) -> None:
    """Raise an error about g in FLA's words."""
    if log_alpha is None or "log_alpha" not in str(error):
        return
    if not (log_alpha.is_meta or log_alpha.numel() == 0) and log_alpha.detach().amax() > 0:
        low, high = (float(x) for x in log_alpha.detach().aminmax())
        raise SpecError(
            f"{name}: g has values in [{low:.4g}, {high:.4g}], should be in [-inf, 0]: "
            f"it is log α; from α, g = alpha.log()"
        ) from error
    text = str(error).partition(": ")[2].replace("log_alpha", "g")
    raise type(error)(f"{name}: {text}") from error
