"""Provide FLA's functions of GDN-2, of products of several factors, and of GLA.

`gdn_ops.compat.fla` is where they are imported from, and says what holds for all of its functions.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gdn_ops.compat.fla_arguments import (
    check_channels,
    check_gate,
    check_kinds,
    check_packing,
    check_switches,
    required,
)
from gdn_ops.compat.fla_calls import (
    FLA_NAMES,
    channel_decay,
    refuse,
    refuse_switches,
    run,
    v_first,
)


def chunk_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    safe_gate: bool = False,
    lower_bound: float | None = None,
    disable_recompute: bool = False,
    return_intermediate_states: bool = False,
    state_v_first: bool = False,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run GDN-2 over whole sequences, as FLA's function of this name.

    Args:
        q, k, v: (B, T, H, K) twice, and (B, T, HV, V): HV may be a multiple of H here.
        g: (B, T, HV, K) log of a decay of every key channel, or raw, as in `chunk_kda`.
        b: (B, T, HV, K), strength in [0, 2] at which every key channel erases.
        w: (B, T, HV, V), strength in [0, 2] at which every value channel writes.
        kwargs: `A_log`, `dt_bias`, `chunk_size`, `transpose_state_layout`, as in `chunk_kda`.

    Other arguments are as in `chunk_kda`, from `scale` to `cp_context`.

    Returns:
        o (B, T, HV, V) in the dtype of q, and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops, or is not supported.
    """
    name = "chunk_gdn2"
    refuse(name, {"cp_context": cp_context}, "context parallelism over devices is not supported")
    check_packing(name, cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    refuse_switches(name, return_intermediate_states=return_intermediate_states)
    chunk_size, A_log, dt_bias = (kwargs.pop(x, None) for x in ("chunk_size", "A_log", "dt_bias"))
    is_v_first = v_first(chunk_gdn2, state_v_first, kwargs)
    check_kinds(name, locals())
    check_switches(name, safe_gate=safe_gate, disable_recompute=disable_recompute)
    raw = (use_gate_in_kernel, A_log, dt_bias, lower_bound, safe_gate)
    log_alpha = channel_decay(name, (q, v, g), *raw)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": log_alpha} | _strengths(name, q, v, b, w)
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel), "chunk_size": chunk_size}
    common = (initial_state, output_final_state, is_v_first, cu_seqlens, options)
    return run(name, tokens, *common, dtype_of="q")


def fused_recurrent_gdn2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    b: Tensor,
    w: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run GDN-2, as FLA's function of this name; it has gradients here.

    Arguments are as in `chunk_gdn2`, and one token is a single step.

    Returns:
        o (B, T, HV, V) in the dtype of v, and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops, or is not supported.
    """
    name = "fused_recurrent_gdn2"
    is_v_first = v_first(fused_recurrent_gdn2, state_v_first, kwargs)
    check_kinds(name, locals())
    raw = (use_gate_in_kernel, A_log, dt_bias, lower_bound)
    log_alpha = channel_decay(name, (q, v, g), *raw)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": log_alpha} | _strengths(name, q, v, b, w)
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel)}
    return run(name, tokens, initial_state, output_final_state, is_v_first, cu_seqlens, options)


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    cp_context: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """Run a product of n factors per token over whole sequences, as FLA's function of this name.

    Args:
        q: (B, T, H, K), in any dtype of the ops, float32 too.
        k, v: (B, n T, H, K) and (B, n T, HV, V): the factors of a token stand behind one another.
        g: (B, T, HV) log of the decay of a token, before its first factor, or None for no decay.
        beta: (B, n T, HV).
        num_householder: n.
        scale: factor on q; K**-0.5 when not given.
        initial_state: (N, HV, K, V).
        output_final_state: whether to return the final state.
        use_qk_l2norm_in_kernel: whether to normalise q and k.
        cu_seqlens: (N+1,) boundaries of packed sequences, counted in tokens of q.
        cu_seqlens_cpu: not needed.
        cp_context: not supported.

    Returns:
        o (B, T, HV, V) in the dtype of q, and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops, or is not supported.
    """
    name = "chunk_gated_delta_product"
    refuse(name, {"cp_context": cp_context}, "context parallelism over devices is not supported")
    check_packing(name, cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    check_kinds(name, locals())
    if g is not None and q.dim() == v.dim() == 4:
        check_gate(name, "g", g, "(B, T, HV)", (*q.shape[:2], v.shape[2]))
    strength = required(name, "beta", beta)
    if k.dim() == v.dim() == 4:
        check_gate(name, "v", v, "(B, n T, HV, V)", (*k.shape[:2], *v.shape[2:]))
        check_gate(name, "beta", strength, "(B, n T, HV)", tuple(v.shape[:3]))
    tokens = {"q": q, "k": k, "v": v, "log_alpha": g, "beta": strength}
    options = {"scale": scale, "qk_l2norm": bool(use_qk_l2norm_in_kernel)}
    options["num_householder"] = num_householder
    common = (initial_state, output_final_state, False, cu_seqlens, options)
    return run(name, tokens, *common, dtype_of="q")


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run gated linear attention over whole sequences, as FLA's function of this name.

    Args:
        q, k, v: (B, T, H, K) twice, and (B, T, HV, V): HV may be a multiple of H here.
        g: (B, T, HV, K) log of a decay of every key channel.
        scale: factor on q; K**-0.5 when not given.
        initial_state: (N, HV, K, V), or (N, HV, V, K) with `state_v_first`.
        output_final_state: whether to return the final state.
        state_v_first: whether states are (N, HV, V, K).
        cu_seqlens: (N+1,) boundaries of packed sequences.
        cu_seqlens_cpu: not needed.

    Returns:
        o (B, T, HV, V) in the dtype of v, and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops.
    """
    name = "chunk_gla"
    check_packing(name, cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    check_kinds(name, locals())
    check_switches(name, state_v_first=state_v_first)
    check_channels(name, "g", required(name, "g", g), q, v)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": g}
    options = {"scale": scale, "rule": "gated"}
    common = (initial_state, output_final_state, bool(state_v_first), cu_seqlens, options)
    return run(name, tokens, *common)


def fused_recurrent_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run gated linear attention, as FLA's function of this name; one token is a single step.

    Args:
        q, k, v, scale, initial_state, output_final_state, state_v_first, cu_seqlens: as in
            `chunk_gla`.
        gk: (B, T, HV, K) log of a decay of every key channel, or None for no decay.
        gv: not supported: a decay of every value channel.
        reverse: not supported: from the last token to the first.
        kwargs: `transpose_state_layout`, the older name of `state_v_first`.

    Returns:
        o (B, T, HV, V) in the dtype of q, and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops, or is not supported.
    """
    name = "fused_recurrent_gla"
    refuse(name, {"gv": gv}, "a decay of every value channel is not supported")
    refuse_switches(name, reverse=reverse)
    is_v_first = v_first(fused_recurrent_gla, state_v_first, kwargs)
    check_kinds(name, locals())
    if gk is not None:
        check_channels(name, "gk", gk, q, v)
    tokens = {"q": q, "k": k, "v": v, "log_alpha": gk}
    options = {"scale": scale, "rule": "linear" if gk is None else "gated"}
    common = (initial_state, output_final_state, is_v_first, cu_seqlens, options)
    return run(name, tokens, *common, dtype_of="q", said=FLA_NAMES | {"log_alpha": "gk"})


def _strengths(
    name: str, q: Tensor, v: Tensor, b: Tensor | None, w: Tensor | None
) -> dict[str, Tensor]:
    """Return the erase and write strengths of every channel, by their names in the ops."""
    erase, write = required(name, "b", b), required(name, "w", w)
    if q.dim() == v.dim() == 4:
        check_gate(name, "b", erase, "(B, T, HV, K)", (*v.shape[:3], q.shape[3]))
        check_gate(name, "w", write, "(B, T, HV, V)", tuple(v.shape))
    return {"erase": erase, "write": write}
