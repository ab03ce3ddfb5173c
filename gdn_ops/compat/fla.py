"""Provide flash-linear-attention's functions of the gated delta rule's family, run by gdn_ops.

    import gdn_ops.compat.fla as fla_ops

is the whole migration: names, defaults and returns are those of `gated_delta_rule`, `kda`, `gdn2`,
`gated_delta_product` and `gla` in `fla.ops`. What gdn_ops cannot do raises by name; no argument is
dropped. Arguments that only tell FLA's kernels how to work, such as `cu_seqlens_cpu` and
`chunk_indices`, which go with `cu_seqlens`, are accepted and not needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn_ops.compat.fla_arguments import (
    check_channels,
    check_kinds,
    check_packing,
    check_switches,
    required,
)
from gdn_ops.compat.fla_calls import (
    beta_of,
    channel_decay,
    head_decay,
    product,
    refuse,
    refuse_switches,
    run,
    v_first,
)
from gdn_ops.compat.fla_family import (
    chunk_gated_delta_product,
    chunk_gdn2,
    chunk_gla,
    fused_recurrent_gdn2,
    fused_recurrent_gla,
)

__all__ = [
    "chunk_gated_delta_product",
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "chunk_gdn2",
    "chunk_gla",
    "chunk_kda",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "fused_recurrent_gdn2",
    "fused_recurrent_gla",
    "fused_recurrent_kda",
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
    refuse(name, {"cp_context": cp_context}, "context parallelism over devices is not supported")
    check_packing(name, cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu, chunk_indices=chunk_indices)
    chunk_size = kwargs.pop("chunk_size", None)
    use_gate_in_kernel, A_log, dt_bias = (
        kwargs.pop(key, None) for key in ("use_gate_in_kernel", "A_log", "dt_bias")
    )
    is_v_first = v_first(chunk_gated_delta_rule, state_v_first, kwargs)
    check_kinds(name, locals())
    log_alpha = head_decay(name, g, use_gate_in_kernel, A_log, dt_bias)
    strength = beta_of(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "beta": strength}
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel), "chunk_size": chunk_size}
    return run(name, tokens, initial_state, output_final_state, is_v_first, cu_seqlens, options)


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
        gk: (B, T, HV, K) log of a decay of every key channel, beside which g multiplies, or None.
        gv: not supported: a decay of every value channel.
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
    refuse(name, {"gv": gv}, "a decay of every value channel is not supported")
    if isinstance(gk, Tensor) and gk.dim() == 3:
        why = "it looks like beta, which older versions of FLA have in this place; pass it by name"
        refuse(name, {"gk": gk}, why)
    is_v_first = v_first(fused_recurrent_gated_delta_rule, state_v_first, kwargs)
    check_kinds(name, locals())
    log_alpha = head_decay(name, g, use_gate_in_kernel, A_log, dt_bias)
    if gk is not None:
        check_channels(name, "gk", gk, q, v)
        log_alpha = product(name, log_alpha, gk)
    strength = beta_of(name, beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "beta": strength}
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel)}
    return run(name, tokens, initial_state, output_final_state, is_v_first, cu_seqlens, options)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
    use_graph: bool = False,
    max_num_seqs: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run Kimi Delta Attention over whole sequences, as FLA's function of this name.

    Args:
        g: (B, T, HV, K) log of a decay of every key channel, or with `use_gate_in_kernel` raw.
        lower_bound: of log α in [-5, 0), or None: log α = lower_bound sigmoid(exp(A_log) (g +
            dt_bias)) with it, else −exp(A_log) softplus(g + dt_bias).
        safe_gate: whether the bound is there; where gates are given it tells FLA's kernels how to
            work, and is not needed.
        disable_recompute: not needed.
        return_intermediate_states, cp_context, use_graph, max_num_seqs: not supported.
        kwargs: `A_log` (HV,), or None for a rate of 1 with a bound; `dt_bias` (HV K,) or (HV, K);
            `chunk_size`, and `transpose_state_layout`.

    Other arguments and results are as in `chunk_gated_delta_rule`.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops, or is not supported.
    """
    name = "chunk_kda"
    refuse(name, {"cp_context": cp_context}, "context parallelism over devices is not supported")
    check_packing(name, cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    off = {"return_intermediate_states": return_intermediate_states, "use_graph": use_graph}
    refuse_switches(name, **off)
    refuse(name, {"max_num_seqs": max_num_seqs}, "it takes effect with use_graph=True only")
    chunk_size, A_log, dt_bias = (kwargs.pop(x, None) for x in ("chunk_size", "A_log", "dt_bias"))
    is_v_first = v_first(chunk_kda, state_v_first, kwargs)
    check_kinds(name, locals())
    check_switches(name, safe_gate=safe_gate, disable_recompute=disable_recompute)
    raw = (use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate)
    log_alpha = channel_decay(name, (q, v, g), *raw)
    given = required(name, "beta", beta)
    strength = beta_of(name, given, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "beta": strength}
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel), "chunk_size": chunk_size}
    return run(name, tokens, initial_state, output_final_state, is_v_first, cu_seqlens, options)


def fused_recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run Kimi Delta Attention, as FLA's function of this name; it has gradients here.

    Arguments are as in `chunk_kda`, and one token is a single step.

    Returns:
        o (B, T, HV, V), and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops, or is not supported.
    """
    name = "fused_recurrent_kda"
    is_v_first = v_first(fused_recurrent_kda, state_v_first, kwargs)
    check_kinds(name, locals())
    raw = (use_gate_in_kernel, A_log, dt_bias, lower_bound)
    log_alpha = channel_decay(name, (q, v, g), *raw)
    given = required(name, "beta", beta)
    strength = beta_of(name, given, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": log_alpha, "beta": strength}
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel)}
    return run(name, tokens, initial_state, output_final_state, is_v_first, cu_seqlens, options)


chunk_gdn = chunk_gated_delta_rule
fused_recurrent_gdn = fused_recurrent_gated_delta_rule
