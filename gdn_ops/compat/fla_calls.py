"""Run calls that bear FLA's names: make gates, turn states, and say errors in its words."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gdn_ops.call.pointers import unknown_option
from gdn_ops.compat.fla_arguments import (
    OLDER_NAMES,
    check_channels,
    check_gate_parameter,
    check_heads,
    check_logarithm,
    check_switches,
    promoted,
    required,
)
from gdn_ops.compat.states import check_state
from gdn_ops.gates import check_lower_bound, log_bounded_decay, log_decay, write_strength
from gdn_ops.nn.rule import run_rule
from gdn_ops.product import gated_delta_product
from gdn_ops.spec.errors import SpecError, SpecTypeError

FLA_NAMES = {"log_alpha": "g", "erase": "b", "write": "w"}
"""FLA's names of gates, by ours."""


def refuse(name: str, given: Mapping[str, Any], why: str) -> None:
    """Refuse arguments that are not supported, where they are given."""
    for argument, value in given.items():
        if value is not None:
            raise SpecError(f"{name}: {argument} is given, should be None: {why}")


def refuse_switches(name: str, **values: Any) -> None:
    """Refuse switches that are not supported, where they are on."""
    check_switches(name, **values)
    for argument, value in values.items():
        if value:
            raise SpecError(f"{name}: {argument} is True, should be False: it is not supported")


def v_first(function: Callable[..., Any], state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """Return whether states are V-first, by either name of the keyword; refuse any other one."""
    name = function.__name__
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
        known = inspect.signature(function).parameters
        raise SpecTypeError(unknown_option(name, other, [*known][:-1], OLDER_NAMES))
    return bool(state_v_first)


def run(
    name: str,
    tokens: dict[str, Any],
    state: Tensor | None,
    is_returned: bool,
    is_v_first: bool,
    cu_seqlens: Tensor | None,
    options: dict[str, Any],
    *,
    dtype_of: str = "v",
    said: Mapping[str, str] = FLA_NAMES,
) -> tuple[Tensor, Tensor | None]:
    """Run a call of one of the functions, whose states may be V-first.

    Args:
        name: what messages start with.
        tokens: q, k, v and gates, as the ops name them.
        state, is_returned, is_v_first, cu_seqlens: as FLA's functions take them.
        options: of `gated_delta`, or with `num_householder` of `gated_delta_product`.
        dtype_of: which of the tokens o has the dtype of.
        said: what the function calls gates, by their names in the ops.

    Returns:
        o, and the final state or None.

    Raises:
        SpecError: an argument breaks the spec of gdn_ops.
    """
    dtype = tokens[dtype_of].dtype
    tokens, _ = promoted(tokens)
    q, v, beta = tokens["q"], tokens["v"], tokens.get("beta")
    log_alpha = tokens.get("log_alpha")
    if beta is not None and beta.dim() == v.dim() == 4:
        raise SpecError(
            f"{name}: beta has shape {tuple(beta.shape)}, should be (B, T, HV) = "
            f"{tuple(v.shape[:3])}: a beta per value channel, which erases each by its own "
            f"strength, is not supported; w of chunk_gdn2 writes each by its own"
        )
    state = _as_the_ops_take(name, state, q, v, cu_seqlens, is_v_first)
    options = {"rule": "delta" if log_alpha is None else "gated_delta", **options}
    is_product = "num_householder" in options
    try:
        function = _product_of_factors if is_product else run_rule
        o, final = function(tokens, state, cu_seqlens, **options)
    except SpecError as error:
        _explain(name, tokens, said, error)
        raise
    o = o.to(dtype)
    if not is_returned:
        return o, None
    return o, final.mT.contiguous() if is_v_first else final


def _as_the_ops_take(
    name: str, state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Any, is_v_first: bool
) -> Tensor | None:
    """Return a state that may be V-first as (N, HV, K, V), in the dtype that it is kept in."""
    if state is not None and is_v_first and state.dim() != 4:
        raise SpecError(
            f"{name}: initial_state has shape {tuple(state.shape)}, should be (N, HV, V, K): "
            f"4 dimensions, not {state.dim()}"
        )
    if state is not None and q.dim() == v.dim() == 4:
        is_packed = isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1
        rows = cu_seqlens.shape[0] - 1 if is_packed else q.shape[0]
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
    return state


def _product_of_factors(
    tokens: dict[str, Any], state: Tensor | None, cu_seqlens: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Run `gated_delta_product` as `run_rule` runs the other ops."""
    packing: dict[str, Any] = {"initial_state": state, "cu_seqlens": cu_seqlens}
    o, final = gated_delta_product(**tokens, **packing, **options, return_state=True)
    return o, final


def head_decay(
    name: str,
    g: Tensor | None,
    in_kernel: bool | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
) -> Tensor | None:
    """Return log α of one decay per head, which may be raw."""
    check_heads(name, g)
    if not in_kernel:
        why = "it takes effect with use_gate_in_kernel=True only"
        refuse(name, {"A_log": A_log, "dt_bias": dt_bias}, why)
        return g
    why = "use_gate_in_kernel is True"
    g, A_log = required(name, "g", g, why), required(name, "A_log", A_log, why)
    for argument, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if value is not None:
            check_gate_parameter(name, argument, value, g)
    return log_decay(g, A_log, dt_bias)


def product(name: str, log_alpha: Tensor | None, gk: Tensor) -> Tensor:
    """Return the logarithm of the product of a decay per head, or none, and one per channel.

    Args:
        name: what messages start with.
        log_alpha: (B, T, HV) or None.
        gk: (B, T, HV, K), which is checked already.

    Raises:
        SpecError: the decay per head has positive values, which the sum might hide.
    """
    if log_alpha is None:
        return gk
    check_logarithm(name, "g", log_alpha)
    wide = torch.promote_types(torch.promote_types(log_alpha.dtype, gk.dtype), torch.float32)
    return log_alpha.to(wide).unsqueeze(-1) + gk.to(wide)


def channel_decay(
    name: str,
    qvg: tuple[Tensor, Tensor, Tensor | None],
    in_kernel: bool | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    lower_bound: float | None,
    safe_gate: bool | None = False,
) -> Tensor:
    """Return log α of a decay of every key channel, which may be raw.

    Args:
        name: what messages start with.
        qvg: q, v, and g (B, T, HV, K).
        in_kernel: whether g is raw.
        A_log, dt_bias, lower_bound, safe_gate: as `chunk_kda` takes them.

    Raises:
        SpecError: shapes do not fit, or arguments are missing, in vain or out of range.
    """
    q, v, given = qvg
    g = required(name, "g", given)
    check_channels(name, "g", g, q, v, has_domain=not in_kernel)
    if not in_kernel:
        why = "it takes effect with use_gate_in_kernel=True only"
        refuse(name, {"A_log": A_log, "dt_bias": dt_bias, "lower_bound": lower_bound}, why)
        return g
    if lower_bound is None:
        if safe_gate:
            raise SpecError(
                f"{name}: lower_bound is None, should be a number in [-5, 0): safe_gate is True"
            )
        required(name, "A_log", A_log, "use_gate_in_kernel is True and lower_bound is None")
    else:
        check_lower_bound(name, lower_bound)
    for argument, value in (("A_log", A_log), ("dt_bias", dt_bias)):
        if value is not None:
            check_gate_parameter(name, argument, value, g)
    heads, width = g.shape[2:]
    rate = None if A_log is None else A_log.reshape(heads, 1)
    bias = None if dt_bias is None else dt_bias.reshape(heads, width)
    if lower_bound is not None:
        return log_bounded_decay(g, rate, bias, float(lower_bound))
    assert rate is not None
    return log_decay(g, rate, bias)


def beta_of(name: str, beta: Tensor | None, in_kernel: bool, allow_neg: bool) -> Tensor | None:
    """Return β, which may be given as its logits."""
    if not in_kernel:
        if allow_neg:
            raise SpecError(
                f"{name}: allow_neg_eigval is True, should be False: it takes effect with "
                f"use_beta_sigmoid_in_kernel=True only"
            )
        return beta
    logits = required(name, "beta", beta, "use_beta_sigmoid_in_kernel is True")
    return write_strength(logits, allow_neg)


def _explain(name: str, tokens: dict[str, Any], said: Mapping[str, str], error: SpecError) -> None:
    """Raise an error about a gate, or of a product, in FLA's words."""
    text = str(error)
    log_alpha = tokens.get("log_alpha")
    if log_alpha is not None and "log_alpha" in text:
        g = said["log_alpha"]
        if not (log_alpha.is_meta or log_alpha.numel() == 0) and log_alpha.detach().amax() > 0:
            low, high = (float(x) for x in log_alpha.detach().aminmax())
            raise SpecError(
                f"{name}: {g} has values in [{low:.4g}, {high:.4g}], should be in [-inf, 0]: "
                f"it is log α; from α, {g} = alpha.log()"
            ) from error
    op, _, rest = text.partition(": ")
    words = {ours: theirs for ours, theirs in said.items() if tokens.get(ours) is not None}
    ours = re.compile(rf"\b({'|'.join(words)})\b") if words else None
    if op == "gated_delta_product" or (ours is not None and ours.search(rest)):
        rest = rest if ours is None else ours.sub(lambda found: words[found[1]], rest)
        raise type(error)(f"{name}: {rest}") from error
