"""Define the public functions: each binds a call, selects a backend and runs it."""

from __future__ import annotations

import inspect
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gdn_ops.call.bind import bind
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.backend import Explanation
from gdn_ops.environment import certificate as certificate  # registers its veto
from gdn_ops.spec.docs import docstring
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS, OPS
from gdn_ops.torch_ops import operators
from gdn_ops.torch_ops.tracing import is_traced, traced, traced_step, traced_steps

_GATES_AND_STATES = ("alpha", "beta", "log_alpha", "initial_state", "state")


def _autocast(arguments: dict[str, Any]) -> None:
    """Cast, if autocast is on, q, k, v to its dtype and narrow gates and states to float32."""
    q = arguments["q"]
    if not isinstance(q, Tensor) or not operators.is_autocast_on(q.device.type):
        return
    low = torch.get_autocast_dtype(q.device.type)
    for name in ("q", "k", "v"):
        x = arguments[name]
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
            arguments[name] = x.to(low)
    for name in _GATES_AND_STATES:
        x = arguments.get(name)
        if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16):
            arguments[name] = x.to(torch.float32)


@overload
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = ...,
    beta: Tensor | None = ...,
    *,
    log_alpha: Tensor | None = ...,
    rule: str = ...,
    scale: float | None = ...,
    qk_l2norm: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
    cu_seqlens: Tensor | None = ...,
    chunk_size: int | None = ...,
    backend: str = ...,
) -> Tensor: ...
@overload
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = ...,
    beta: Tensor | None = ...,
    *,
    log_alpha: Tensor | None = ...,
    rule: str = ...,
    scale: float | None = ...,
    qk_l2norm: bool = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = ...,
    chunk_size: int | None = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "alpha": alpha,
        "beta": beta,
        "log_alpha": log_alpha,
        "rule": rule,
        "scale": scale,
        "qk_l2norm": qk_l2norm,
        "initial_state": initial_state,
        "return_state": return_state,
        "cu_seqlens": cu_seqlens,
        "chunk_size": chunk_size,
        "backend": registry.resolve(backend),
    }
    _autocast(arguments)
    if is_traced(q):
        o, state = traced(arguments)
    else:
        call = bind(GATED_DELTA, arguments)
        o, state = operators.run(registry.select(call, arguments["backend"]), call)
    return (o, state) if return_state else o


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "alpha": alpha,
        "beta": beta,
        "state": state,
        "log_alpha": log_alpha,
        "rule": rule,
        "scale": scale,
        "qk_l2norm": qk_l2norm,
        "state_indices": state_indices,
        "inplace": inplace,
        "backend": registry.resolve(backend),
    }
    _autocast(arguments)
    if not is_traced(q):
        call = bind(GATED_DELTA_STEP, arguments)
        return operators.run_step(registry.select(call, arguments["backend"]), call)
    return traced_step(arguments)


@overload
def gated_delta_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = ...,
    beta: Tensor | None = ...,
    state: Tensor | None = ...,
    *,
    log_alpha: Tensor | None = ...,
    rule: str = ...,
    scale: float | None = ...,
    qk_l2norm: bool = ...,
    state_indices: Tensor | None = ...,
    inplace: bool = ...,
    return_states: Literal[False] = ...,
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def gated_delta_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = ...,
    beta: Tensor | None = ...,
    state: Tensor | None = ...,
    *,
    log_alpha: Tensor | None = ...,
    rule: str = ...,
    scale: float | None = ...,
    qk_l2norm: bool = ...,
    state_indices: Tensor | None = ...,
    inplace: bool = ...,
    return_states: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
def gated_delta_steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor | None = None,
    beta: Tensor | None = None,
    state: Tensor | None = None,
    *,
    log_alpha: Tensor | None = None,
    rule: str = "gated_delta",
    scale: float | None = None,
    qk_l2norm: bool = False,
    state_indices: Tensor | None = None,
    inplace: bool = False,
    return_states: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "alpha": alpha,
        "beta": beta,
        "state": state,
        "log_alpha": log_alpha,
        "rule": rule,
        "scale": scale,
        "qk_l2norm": qk_l2norm,
        "state_indices": state_indices,
        "inplace": inplace,
        "return_states": return_states,
        "backend": registry.resolve(backend),
    }
    _autocast(arguments)
    states: Tensor | None
    if is_traced(q):
        o, new_state, states = traced_steps(arguments)
    else:
        call = bind(GATED_DELTA_STEPS, arguments)
        chosen = registry.select(call, arguments["backend"])
        o, new_state, states = operators.run_steps(chosen, call)
    if not return_states:
        return o, new_state
    assert states is not None
    return o, new_state, states


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run a call and why no other does.

    Args:
        args, kwargs: the arguments of `gated_delta_step` if q has three dimensions, else those
            of `gated_delta`; where they name what only `gated_delta_steps` has, like `state`,
            those of `gated_delta_steps`.

    Returns:
        An Explanation; `print` it for a table.

    Raises:
        SpecError: the call breaks the spec.
    """
    spec, arguments = _arguments_of_some_op(args, kwargs)
    arguments["backend"] = registry.resolve(arguments["backend"])
    _autocast(arguments)
    return registry.explain_call(bind(spec, arguments), arguments["backend"])


def _arguments_of_some_op(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[OpSpec, dict[str, Any]]:
    """Return the spec of the op that arguments are meant for, and all its arguments by name."""
    q = args[0] if args else kwargs.get("q")
    is_step = isinstance(q, Tensor) and q.dim() == 3
    spec, function = (GATED_DELTA_STEP, gated_delta_step) if is_step else (GATED_DELTA, gated_delta)
    own = {name for name, _, _ in GATED_DELTA_STEPS.parameters()} - set(GATED_DELTA.tensor)
    own -= {attr.name for attr in GATED_DELTA.attrs}
    if not is_step and (len(args) > 5 or own & set(kwargs)):
        spec, function = GATED_DELTA_STEPS, gated_delta_steps
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return spec, dict(bound.arguments)


for _function, _spec in zip((gated_delta, gated_delta_step, gated_delta_steps), OPS, strict=True):
    _function.__doc__ = docstring(_spec)
