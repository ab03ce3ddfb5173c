"""Define the public functions: each binds a call, selects a backend and runs it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, Never, overload

from torch import Tensor

from gdn_ops.call.bind import Arguments, Tokens, arguments_of, bind
from gdn_ops.call.pointers import refuse_unknown
from gdn_ops.dispatch import registry
from gdn_ops.dispatch.explain import Explanation, explain_call
from gdn_ops.environment import certificate as certificate  # registers its veto
from gdn_ops.spec.docs import docstring
from gdn_ops.spec.errors import SpecError, SpecTypeError
from gdn_ops.spec.language import OpSpec
from gdn_ops.spec.ops import GATED_DELTA, GATED_DELTA_STEP, GATED_DELTA_STEPS
from gdn_ops.torch_ops import eager, tracing


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
    **unknown: Never,
) -> Tensor | tuple[Tensor, Tensor]:
    if unknown:
        refuse_unknown(GATED_DELTA, unknown)
    tokens, start = eager.autocast(Tokens(q, k, v, alpha, log_alpha, beta), initial_state)
    arguments = Arguments(
        tokens,
        start,
        cu_seqlens,
        rule=rule,
        scale=scale,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        return_state=return_state,
        backend=registry.resolve(backend),
    )
    if eager.is_traced(q):
        o, state = tracing.traced_sequence(arguments)
    else:
        call = bind(GATED_DELTA, arguments)
        o, state = eager.run_sequence(registry.select(call, arguments.backend), call)
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
    **unknown: Never,
) -> tuple[Tensor, Tensor]:
    if unknown:
        refuse_unknown(GATED_DELTA_STEP, unknown)
    tokens, start = eager.autocast(Tokens(q, k, v, alpha, log_alpha, beta), state)
    arguments = Arguments(
        tokens,
        state if inplace else start,
        state_indices=state_indices,
        rule=rule,
        scale=scale,
        qk_l2norm=qk_l2norm,
        inplace=inplace,
        backend=registry.resolve(backend),
    )
    if eager.is_traced(q):
        return tracing.traced_step(arguments)
    call = bind(GATED_DELTA_STEP, arguments)
    return eager.run_step(registry.select(call, arguments.backend), call)


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
    **unknown: Never,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    if unknown:
        refuse_unknown(GATED_DELTA_STEPS, unknown)
    tokens, start = eager.autocast(Tokens(q, k, v, alpha, log_alpha, beta), state)
    arguments = Arguments(
        tokens,
        state if inplace else start,
        state_indices=state_indices,
        rule=rule,
        scale=scale,
        qk_l2norm=qk_l2norm,
        inplace=inplace,
        return_states=return_states,
        backend=registry.resolve(backend),
    )
    states: Tensor | None
    if eager.is_traced(q):
        o, new_state, states = tracing.traced_steps(arguments)
    else:
        call = bind(GATED_DELTA_STEPS, arguments)
        o, new_state, states = eager.run_steps(registry.select(call, arguments.backend), call)
    if not return_states:
        return o, new_state
    assert states is not None
    return o, new_state, states


def explain(*args: Any, op: str | Callable[..., Any] = "gated_delta", **kwargs: Any) -> Explanation:
    """Say which backend would run a call and why no other does.

    Args:
        args, kwargs: the arguments of the call.
        op: which op is called, by name or as the function: "gated_delta", "gated_delta_step",
            "gated_delta_steps". The function may also stand before the arguments of the call:
            `explain(gated_delta_step, q, k, v)`.

    Returns:
        An Explanation; `print` it for a table.

    Raises:
        SpecError: the call breaks the spec, or there is no such op.
        TypeError: the op has no such argument.

    Example:
        >>> import torch
        >>> from gdn_ops import explain
        >>> q = torch.randn(1, 100, 4, 16)
        >>> explain(q, q, q, rule="linear", backend="torch").backend
        'torch'
    """
    if args and callable(args[0]) and not isinstance(args[0], Tensor):
        first, *args = args  # type: ignore[assignment]
        if op not in ("gated_delta", first, getattr(first, "__name__", None)):
            raise SpecError(
                "explain: the op is given twice, first and as op=, should be given once"
            )
        op = first
    name = op if isinstance(op, str) else getattr(op, "__name__", None)
    if name not in _FUNCTIONS:
        what = f"has type {type(op).__name__}" if name is None else f"is {name!r}"
        raise SpecError(f"explain: op {what}, should be one of {', '.join(_FUNCTIONS)}")
    spec, function = _FUNCTIONS[name]
    unknown = [key for key in kwargs if key not in {arg.name for arg in spec.args}]
    try:
        if unknown:
            refuse_unknown(spec, unknown)
        named = inspect.signature(function).bind(*args, **kwargs).arguments
    except SpecTypeError as error:
        raise SpecTypeError(f"explain: {error}; op= says which op is called") from None
    except TypeError as error:
        raise TypeError(f"explain: {name}: {error}; op= says which op is called") from None
    arguments = arguments_of(spec, named)
    tokens, start = eager.autocast(arguments.tokens, arguments.state)
    backend = registry.resolve(arguments.backend)
    start = arguments.state if arguments.inplace else start
    arguments = arguments._replace(tokens=tokens, state=start, backend=backend)
    return explain_call(bind(spec, arguments), arguments.backend)


_FUNCTIONS: dict[str, tuple[OpSpec, Callable[..., Any]]] = {
    "gated_delta": (GATED_DELTA, gated_delta),
    "gated_delta_step": (GATED_DELTA_STEP, gated_delta_step),
    "gated_delta_steps": (GATED_DELTA_STEPS, gated_delta_steps),
}
"""The spec and the public function of every op, by its name."""

for _spec, _function in _FUNCTIONS.values():
    _function.__doc__ = docstring(_spec)
    # Arguments that an op does not have are taken only to be refused. Python would name missing
    # ones first, though they are there by another name: here they are None, which is refused too.
    _signature = inspect.signature(_function)
    _own = [p for p in _signature.parameters.values() if p.name != "unknown"]
    _function.__signature__ = _signature.replace(parameters=_own)  # type: ignore[attr-defined]
    _function.__defaults__ = (None,) * 3 + (_function.__defaults__ or ())
