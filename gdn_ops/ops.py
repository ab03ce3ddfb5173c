"""The public functions: bind, select, run."""

from __future__ import annotations

import inspect
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gdn_ops import library, registry
from gdn_ops.backend import Explanation
from gdn_ops.bind import bind
from gdn_ops.describe import docstring
from gdn_ops.gated_delta import GATED_DELTA, GATED_DELTA_STEP

_GATES_AND_STATES = ("alpha", "beta", "log_alpha", "initial_state", "state")


def _is_traced(q: Any) -> bool:
    """Whether the call must be one opaque operator: traced, on meta, or a tensor subclass."""
    if torch.compiler.is_compiling():
        return True
    if not isinstance(q, Tensor):
        return False
    return q.is_meta or type(q) not in (Tensor, torch.nn.Parameter)


def _autocast(arguments: dict[str, Any]) -> None:
    """Give q, k, v the autocast dtype and keep gates and states out of it."""
    q = arguments["q"]
    if not isinstance(q, Tensor) or not library.is_autocast_on(q.device.type):
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
    if _is_traced(q):
        o, state = _traced(arguments)
    else:
        call = bind(GATED_DELTA, arguments)
        o, state = library.run(registry.select(call, arguments["backend"]), call)
    return (o, state) if return_state else o


def _traced(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    values = [arguments[name] for name in library.schema_names(GATED_DELTA)]
    save = torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in values
    )
    o, state, _ = torch.ops.gdn_ops.gated_delta(*values, save)
    return o, state


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
        "inplace": inplace,
        "backend": registry.resolve(backend),
    }
    _autocast(arguments)
    if not _is_traced(q):
        call = bind(GATED_DELTA_STEP, arguments)
        return library.run_step(registry.select(call, arguments["backend"]), call)
    return _traced_step(arguments)


def _traced_step(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Trace through a backend made of plain torch ops; keep any other opaque."""
    if registry.traceable_step(arguments["backend"], arguments["q"].device.type):
        call = bind(GATED_DELTA_STEP, arguments, check_values=False)
        return registry.select(call, arguments["backend"]).step(call)
    values = [arguments[name] for name in library.schema_names(GATED_DELTA_STEP)]
    if arguments["inplace"]:
        state: Tensor = arguments["state"]
        return torch.ops.gdn_ops.gated_delta_step_(*values), state
    return torch.ops.gdn_ops.gated_delta_step(*values)  # type: ignore[no-any-return]


def explain(*args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run a call and why no other does.

    Args:
        args, kwargs: the arguments of `gated_delta`, or of `gated_delta_step` if q has three
            dimensions.

    Returns:
        An Explanation; `print` it for a table.

    Raises:
        SpecError: the call breaks the spec.
    """
    q = args[0] if args else kwargs.get("q")
    is_step = isinstance(q, Tensor) and q.dim() == 3
    spec, function = (GATED_DELTA_STEP, gated_delta_step) if is_step else (GATED_DELTA, gated_delta)
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments["backend"] = registry.resolve(arguments["backend"])
    _autocast(arguments)
    return registry.explain_call(bind(spec, arguments), arguments["backend"])


gated_delta.__doc__ = docstring(GATED_DELTA)
gated_delta_step.__doc__ = docstring(GATED_DELTA_STEP)
